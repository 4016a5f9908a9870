r"""Pictures of FLUX.1 by the command line:
`python -m tiltjax.flux --model FOLDER --prompt "..." --reward blueness --method plug-in`.

| method | a picture is |
|---|---|
| `none` | a sample of the model |
| `plug-in` | guided as published: `--particles` draws, `--snr-factor`, gradients of `--length`, `--guided` steps from `--first` |
| `fmrg` | the same without noise added: one look ahead along the flow map |
| `damped` | the same as plug-in, damped with `--sigma` |
| `best-of-n` | the best of `--particles` samples |
| `conjugate` | guided by variational conjugate tilting at `--scale`: no gradient of the network; its variance is calibrated first |
| `weighted` | drawn by weight from `--particles` weighted particles (sequential Monte Carlo) at `--scale` |

Picture i depends on the seed and i alone. An interrupted batch is continued by the same command;
see `tiltjax.flux.album`.
"""

import argparse
import os
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

import tiltjax as tj
from tiltjax import _checks
from tiltjax.images import flux, folders, prompts
from tiltjax.images import rewards as image_rewards
from tiltjax.images.flux import FluxModel, Lookahead, published
from tiltjax.images.networks import clip

REGIONS = {
    "top-right": image_rewards.top_right_circle,
    "center": image_rewards.center_circle,
    "bottom": image_rewards.bottom_half,
}
REWARDS: dict[str, Callable[[argparse.Namespace], Callable]] = {
    "blueness": lambda options: image_rewards.blueness,
    "blue-minus-red-green": lambda options: image_rewards.blue_minus_red_green,
    "blue-minus-half-red-green": lambda options: image_rewards.blue_minus_half_red_green,
    "brightness": lambda options: image_rewards.MaskedBrightness(
        REGIONS[options.region](options.height, options.width)
    ),
    "symmetry": lambda options: image_rewards.symmetry,
    "antisymmetry": lambda options: image_rewards.antisymmetry,
    "rotation": lambda options: image_rewards.rotation,
    "palette": lambda options: image_rewards.Palette(_color(options.palette)),
    "clip": lambda options: _clip_score(options),
}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
_CALIBRATION = {"num": 4, "levels": 12}


def main(arguments: list[str] | None = None) -> int:
    """Make the pictures; the exit status is 0, 2 after a sentence about what was wrong, or 130 when
    interrupted.
    """
    options = _parse(arguments)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *rest: print(
                f"tiltjax: {message}", file=sys.stderr
            )
            warnings.simplefilter("always", UserWarning)
            _make(options)
    except MemoryError as error:
        print(f"tiltjax: {error}. {_LESS}", file=sys.stderr)
        return 2
    except (ValueError, TypeError, OSError, FloatingPointError, ImportError) as error:
        print(f"tiltjax: {error}", file=sys.stderr)
        return 2
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print(
            f"tiltjax: the device is out of memory ({str(error).splitlines()[0]}). {_LESS}",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("tiltjax: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


_LESS = "Here: --dtype bfloat16, --remat, --attention cudnn (on a GPU), fewer --particles, --batch 1, a smaller --size"


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tiltjax.flux",
        description="Reward-guided pictures of FLUX.1.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", required=True, help="a folder laid out as published, a hub name, or tiny")
    add("--adapters", help="safetensors of low-rank adapters to merge, such as those of a flow map")
    add("--prompt", required=True)
    add("--output", default="pictures", help="folder of the pictures")
    add("--images", type=int, default=1, help="how many pictures")
    add("--seed", type=int, default=0)
    add(
        "--size",
        type=_size,
        default=None,
        metavar="N or HxW",
        help="multiples of 16 (None: 512, or what a smaller model was trained on)",
    )
    add("--steps", type=int, default=28)
    add(
        "--cfg",
        type=float,
        default=None,
        help="the distilled guidance scale (None: 3.5 where there is one)",
    )
    add("--reward", choices=sorted(REWARDS), default="blueness")
    add("--region", choices=sorted(REGIONS), default="center", help="of brightness")
    add(
        "--palette",
        default="ocean",
        help=f"{', '.join(image_rewards.PALETTES)}, or R,G,B in [0, 1]",
    )
    add(
        "--clip",
        help="folder of a CLIP of both towers, for the reward clip (None: the one that comes with the model)",
    )
    add("--method", choices=sorted(METHODS), default="plug-in")
    add(
        "--particles",
        type=int,
        default=1,
        help="draws of plug-in and damped, candidates of best-of-n, particles of weighted",
    )
    add("--scale", type=float, default=1.0, help="of the reward: in weights, and of the tilt")
    add(
        "--length",
        type=float,
        default=10.0,
        help="of every gradient; 0 leaves it scale times what it is",
    )
    add(
        "--snr-factor", type=float, default=5.0, help="by which the snr falls before the look ahead"
    )
    add("--sigma", type=float, default=1.0, help="of the damping, in units of a latent")
    add("--limit", type=float, default=20.0, help="of the coefficient (1 - t) / t")
    add("--first", type=int, default=1, help="the first guided step, from 0")
    add("--guided", type=int, default=5, help="how many steps are guided")
    add(
        "--batch",
        type=int,
        default=None,
        help="how many particles are evaluated at once (None: all)",
    )
    add(
        "--dtype",
        choices=sorted(DTYPES),
        default="float32" if jax.default_backend() == "cpu" else "bfloat16",
    )
    add(
        "--remat",
        action="store_true",
        help="compute blocks again for the gradient: less memory, more time",
    )
    add("--attention", choices=("xla", "cudnn"), default="xla")
    add("--quiet", action="store_true", help="no progress bar")
    return parser.parse_args(arguments)


def _size(value: str) -> tuple[int, int]:
    try:
        sides = [int(side) for side in value.lower().split("x")]
    except ValueError:
        sides = []
    if len(sides) not in (1, 2):
        raise argparse.ArgumentTypeError(
            f"expected a number, or HxW such as 512x768, got {value!r}"
        )
    return sides[0], sides[-1]


def _color(value: str) -> Any:
    if value in image_rewards.PALETTES:
        return image_rewards.PALETTES[value]
    try:
        return [float(part) for part in value.split(",")]
    except ValueError:
        raise ValueError(
            f"--palette is one of {', '.join(image_rewards.PALETTES)}, or R,G,B, got {value!r}"
        ) from None


def _clip_score(options: argparse.Namespace) -> Callable:
    folder = words = options.clip
    if folder is None:
        folder, words = (flux.located(options.model) / part for part in ("clip", "tokenizer"))
        if not folder.is_dir():
            raise ValueError(
                "the reward clip needs --clip, the folder of a CLIP such as a copy of "
                "openai/clip-vit-large-patch14"
            )
    judge = clip.load(folder)
    tokenizer = prompts.clip_tokenizer(words, judge.config.text_config.max_position_embeddings)
    return image_rewards.ClipScore(judge, tokenizer(options.prompt))


# What does not decide a picture.
_ASIDE = ("output", "images", "quiet", "batch", "size")


def _make(options: argparse.Namespace) -> None:
    num, particles = (
        _checks.count(options.images, "--images"),
        _checks.count(options.particles, "--particles"),
    )
    if not 0 <= options.seed < 2**32:
        raise ValueError(f"--seed must lie between 0 and 2^32 - 1, got {options.seed}")
    if options.particles > 1 and options.method in ("none", "fmrg", "conjugate"):
        raise ValueError(
            f"--method {options.method} makes a picture of one particle: leave --particles out"
        )
    options.height, options.width = options.size or (flux.usual_size(options.model),) * 2
    reward = REWARDS[options.reward](options)
    settings = {name: value for name, value in sorted(vars(options).items()) if name not in _ASIDE}
    notes = {
        "tiltjax": tj.__version__,
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
    }
    book = folders.Album(options.output, settings, notes)
    missing = book.missing(num)
    if len(missing) < num:
        print(f"{num - len(missing)} of {num} pictures are there")
    if missing:
        _fill(book, missing, options, reward, particles)
    values = np.asarray([book.rewards[number] for number in range(num)])
    error = f" ± {values.std(ddof=1) / np.sqrt(num):.4f}" if num > 1 else ""
    print(f"mean {options.reward} of {num}: {values.mean():+.4f}{error}, in {book.folder}")


def _fill(
    book: folders.Album,
    missing: list[int],
    options: argparse.Namespace,
    reward: Callable,
    particles: int,
) -> None:
    guides = options.method in ("plug-in", "fmrg", "damped")
    at_once = particles if options.batch is None or guides else min(options.batch, particles)
    model = flux.load_model(
        options.model,
        options.prompt,
        height=options.height,
        width=options.width,
        guidance=options.cfg,
        adapters=options.adapters,
        dtype=DTYPES[options.dtype],
        remat=options.remat,
        attention=options.attention,
        batch=at_once,
        gradient=guides,
        available=_host_memory() if jax.default_backend() == "cpu" else None,
    )
    grid = flux.schedule(options.model, model, options.steps)
    run = METHODS[options.method](model, reward, grid, options)
    judge = tj.rewards.as_reward(reward)
    for number in missing:
        start = time.perf_counter()
        latent = run(jax.random.fold_in(jax.random.key(options.seed), number))
        picture, value = _judged(model, judge, latent)
        path = book.add(number, np.asarray(picture), float(value))
        print(
            f"{path.name}  {options.reward} {float(value):+.4f}  {time.perf_counter() - start:.1f} "
            "s",
            flush=True,
        )


@eqx.filter_jit
def _judged(model: FluxModel, reward: Callable, latent: Array) -> tuple[Array, Array]:
    picture = model.decode(latent)
    return picture, reward(jnp.clip(picture, 0, 1))


def _host_memory() -> int | None:
    """Bytes of this machine, where it says."""
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# Each method: the settings, prepared once; then a latent for a key.
Run = Callable[[Array], Array]


def _unguided(model: FluxModel, reward: Callable, grid: Array, options: argparse.Namespace) -> Run:
    plain = _plain(model, grid, options)
    return lambda key: tj.sample(key, num=1, **plain).x[0]


def _plain(model: FluxModel, grid: Array, options: argparse.Namespace) -> dict[str, Any]:
    leaping = model.leaping(grid) if model.parts.transformer.config.dual_time else model
    return {
        "model": leaping,
        "times": grid,
        "solver": tj.Euler(),
        "batch": options.batch,
        "progress": not options.quiet,
    }


def _guided(
    model: FluxModel, reward: Callable, grid: Array, options: argparse.Namespace, **over: Any
) -> Run:
    settings = {"k": options.particles, "snr_factor": options.snr_factor, **over}
    settings |= {"scale": options.scale, "length": options.length or None, "limit": options.limit}
    run = published(
        model, reward, first=options.first, guided=options.guided, grid=grid, **settings
    )
    return lambda key: tj.sample(key, num=1, **run, progress=not options.quiet).x[0]


def _best(model: FluxModel, reward: Callable, grid: Array, options: argparse.Namespace) -> Run:
    plain, judge = _plain(model, grid, options), image_rewards.Decoded(model.decode, reward)
    n = options.particles
    return lambda key: tj.best_of_n(tj.sample(key, num=n, **plain), judge, n).x[0]


def _conjugate(model: FluxModel, reward: Callable, grid: Array, options: argparse.Namespace) -> Run:
    # Calibrated on the model's own samples, from keys that no picture has.
    first, second = jax.random.split(jax.random.key(2**31))
    data = tj.sample(first, num=_CALIBRATION["num"], **_plain(model, grid, options)).x
    variance = tj.calibrate(
        model, second, levels=_CALIBRATION["levels"], data=data, chunk_size=options.batch
    )
    guidance = tj.Conjugate(
        model, image_rewards.Decoded(model.decode, reward), options.scale, variance=variance
    )
    run = {"times": grid, "solver": tj.Euler(), "progress": not options.quiet}
    return lambda key: tj.sample(key, model, guidance, num=1, **run).x[0]


def _weighted(model: FluxModel, reward: Callable, grid: Array, options: argparse.Namespace) -> Run:
    dual = model.parts.transformer.config.dual_time
    posterior = Lookahead(model, options.snr_factor) if dual else tj.Tweedie(model)
    twist = tj.PlugIn(posterior, image_rewards.Decoded(model.decode, reward), options.scale)
    settings = {
        "num": options.particles,
        "times": grid,
        "proposal": tj.weighted.proposals.Base(),
        "batch": options.batch,
    }

    def run(key: Array) -> Array:
        key_run, key_draw = jax.random.split(key)
        found = tj.smc(key_run, model, twist, **settings, progress=not options.quiet)
        return found.resample(key_draw, 1)[0]

    return run


METHODS: dict[str, Callable[..., Run]] = {
    "none": _unguided,
    "plug-in": _guided,
    "fmrg": lambda *given: _guided(*given, snr_factor=1.0),
    "damped": lambda model, reward, grid, options: _guided(
        model, reward, grid, options, sigma=options.sigma
    ),
    "best-of-n": _best,
    "conjugate": _conjugate,
    "weighted": _weighted,
}
if __name__ == "__main__":
    sys.exit(main())
