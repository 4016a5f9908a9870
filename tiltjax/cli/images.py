r"""`tiltjax images` makes images of FLUX.1:
`tiltjax images --model FOLDER --prompt "..." --reward blueness --method plug-in`.

| method | an image is |
|---|---|
| `none` | a sample of the model |
| `plug-in` | guided as published: `--particles` draws, gradients of `--length`, `--guided` steps |
| `fmrg` | the same without noise added: one prediction along the flow map |
| `damped` | the same as plug-in, damped with `--sigma` |
| `best-of-n` | the best of `--particles` samples |
| `conjugate` | guided by variational conjugate tilting at `--scale`, without network gradients |
| `weighted` | drawn by weight from `--particles` particles (sequential Monte Carlo) at `--scale` |

Image i depends on the seed and i alone. The same command continues an interrupted run; see
`tiltjax.images.folders`. The variance of `conjugate` is calibrated first.
"""

import os
import sys
import time
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

import tiltjax as tj
from tiltjax.images import flux, folders, prompts, rewards
from tiltjax.images.networks import clip

REGIONS = {
    "top-right": rewards.top_right_circle,
    "center": rewards.center_circle,
    "bottom": rewards.bottom_half,
}
REWARDS: dict[str, Callable[[SimpleNamespace], Callable]] = {
    "blueness": lambda options: rewards.blueness,
    "blue-minus-red-green": lambda options: rewards.blue_minus_red_green,
    "blue-minus-half-red-green": lambda options: rewards.blue_minus_half_red_green,
    "brightness": lambda options: rewards.MaskedBrightness(
        REGIONS[options.region](options.height, options.width)
    ),
    "symmetry": lambda options: rewards.symmetry,
    "antisymmetry": lambda options: rewards.antisymmetry,
    "rotation": lambda options: rewards.rotation,
    "palette": lambda options: rewards.Palette(_color(options.palette)),
    "clip": lambda options: _clip_score(options),
}
_ONE_PARTICLE = ("none", "fmrg", "conjugate")
_GRADIENT = ("plug-in", "fmrg", "damped")
_WITHOUT_EFFECT = ("output", "images", "quiet", "chunk_size", "size")  # on an image
_CALIBRATION = {"num": 4, "levels": 12}
_LESS_MEMORY = (
    "Options that take less: --dtype bfloat16, --remat, --attention cudnn (on a GPU), fewer "
    "--particles, --chunk-size 1, a smaller --size"
)


def run(options: SimpleNamespace) -> None:
    """Make the images that are missing. `options`: those of the command, by name.

    **Raises:** `MemoryError`, also for that of the device, which names options that take less.
    """
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *rest: print(f"tiltjax: {message}", file=sys.stderr)
        warnings.simplefilter("always", UserWarning)
        try:
            _make(options)
        except MemoryError as error:
            raise MemoryError(f"{error}. {_LESS_MEMORY}") from error
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            reason = str(error).splitlines()[0]
            raise MemoryError(f"the device is out of memory ({reason}). {_LESS_MEMORY}") from error


def _make(options: SimpleNamespace) -> None:
    if options.particles > 1 and options.method in _ONE_PARTICLE:
        raise ValueError(
            f"--method {options.method} makes an image of one particle: leave --particles out"
        )
    options.height, options.width = _size(options.size) or (flux.usual_size(options.model),) * 2
    on_cpu = jax.default_backend() == "cpu"
    options.dtype = options.dtype or ("float32" if on_cpu else "bfloat16")
    reward = REWARDS[options.reward](options)
    settings = {
        name: value for name, value in sorted(vars(options).items()) if name not in _WITHOUT_EFFECT
    }
    notes = {
        "tiltjax": tj.__version__,
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
    }
    folder = folders.ImageFolder(options.output, settings, notes)
    num = options.images
    missing = folder.missing(num)
    if len(missing) < num:
        print(f"{num - len(missing)} of {num} images are there")
    if missing:
        _fill(folder, missing, options, reward)
    values = np.asarray([folder.rewards[number] for number in range(num)])
    error = f" ± {values.std(ddof=1) / np.sqrt(num):.4f}" if num > 1 else ""
    print(f"mean {options.reward} of {num}: {values.mean():+.4f}{error}, in {folder.folder}")


def _size(value: str | None) -> tuple[int, int] | None:
    """Height and width."""
    if value is None:
        return None
    try:
        sides = [int(side) for side in value.lower().split("x")]
    except ValueError:
        sides = []
    if len(sides) not in (1, 2):
        raise ValueError(f"--size must be a number, or HxW such as 512x768, got {value!r}")
    return sides[0], sides[-1]


def _color(value: str) -> Any:
    if value in rewards.PALETTES:
        return rewards.PALETTES[value]
    try:
        return [float(part) for part in value.split(",")]
    except ValueError:
        raise ValueError(
            f"--palette must be one of {', '.join(rewards.PALETTES)}, or R,G,B, got {value!r}"
        ) from None


def _clip_score(options: SimpleNamespace) -> Callable:
    folder = tokenizer_folder = options.clip
    if folder is None:
        model = flux.located(options.model)
        folder, tokenizer_folder = model / "clip", model / "tokenizer"
        if not folder.is_dir():
            raise ValueError(
                "the reward clip needs --clip, the folder of a CLIP such as a copy of "
                "openai/clip-vit-large-patch14"
            )
    network = clip.load(folder)
    positions = network.config.text_config.max_position_embeddings
    tokenizer = prompts.clip_tokenizer(tokenizer_folder, positions)
    return rewards.ClipScore(network, tokenizer(options.prompt))


def _fill(
    folder: folders.ImageFolder, missing: list[int], options: SimpleNamespace, reward: Callable
) -> None:
    gradient = options.method in _GRADIENT
    chunk_size = options.particles
    if options.chunk_size is not None and not gradient:
        chunk_size = min(options.chunk_size, chunk_size)
    model = flux.load_model(
        options.model,
        options.prompt,
        height=options.height,
        width=options.width,
        guidance=options.cfg,
        adapters=options.adapters,
        dtype=jnp.dtype(options.dtype),
        remat=options.remat,
        attention=options.attention,
        chunk_size=chunk_size,
        gradient=gradient,
        available=_system_memory() if jax.default_backend() == "cpu" else None,
    )
    grid = flux.schedule(options.model, model, options.steps)
    draw = METHODS[options.method](model, reward, grid, options)
    scalar = tj.rewards.as_reward(reward)
    for number in missing:
        start = time.perf_counter()
        latent = draw(jax.random.fold_in(jax.random.key(options.seed), number))
        image, value = _decoded(model, scalar, latent)
        file = folder.add(number, np.asarray(image), float(value))
        seconds = time.perf_counter() - start
        print(f"{file.name}  {options.reward} {float(value):+.4f}  {seconds:.1f} s", flush=True)


@eqx.filter_jit
def _decoded(model: flux.FluxModel, reward: Callable, latent: Array) -> tuple[Array, Array]:
    """The image of a latent, and its reward."""
    image = model.decode(latent)
    return image, reward(jnp.clip(image, 0, 1))


def _system_memory() -> int | None:
    """Bytes of this machine, where the system tells them."""
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# A method makes its settings once, and returns the function that draws a latent for a key.
Draw = Callable[[Array], Array]
Prepare = Callable[[flux.FluxModel, Callable, Array, SimpleNamespace], Draw]


def _unguided(
    model: flux.FluxModel, reward: Callable, grid: Array, options: SimpleNamespace
) -> Draw:
    settings = _unguided_settings(model, grid, options)
    return lambda key: tj.sample(key, num=1, **settings).x[0]


def _unguided_settings(
    model: flux.FluxModel, grid: Array, options: SimpleNamespace
) -> dict[str, Any]:
    return {
        "model": model.leaping(grid) if model.parts.transformer.config.dual_time else model,
        "times": grid,
        "solver": tj.Euler(),
        "chunk_size": options.chunk_size,
        "progress": not options.quiet,
    }


def _published(
    model: flux.FluxModel,
    reward: Callable,
    grid: Array,
    options: SimpleNamespace,
    **changes: Any,
) -> Draw:
    settings = {
        "grid": grid,
        "first": options.first,
        "guided": options.guided,
        "k": options.particles,
        "snr_factor": options.snr_factor,
        "scale": options.scale,
        "length": options.length or None,
        "limit": options.limit,
        "progress": not options.quiet,
        **changes,
    }
    return lambda key: flux.published(key, model, reward, **settings).x[0]


def _fmrg(model: flux.FluxModel, reward: Callable, grid: Array, options: SimpleNamespace) -> Draw:
    return _published(model, reward, grid, options, snr_factor=1.0)


def _damped(model: flux.FluxModel, reward: Callable, grid: Array, options: SimpleNamespace) -> Draw:
    return _published(model, reward, grid, options, sigma=options.sigma)


def _best_of_n(
    model: flux.FluxModel, reward: Callable, grid: Array, options: SimpleNamespace
) -> Draw:
    settings, n = _unguided_settings(model, grid, options), options.particles
    of_latent = rewards.Decoded(model.decode, reward)
    return lambda key: tj.best_of_n(tj.sample(key, num=n, **settings), of_latent, n).x[0]


def _conjugate(
    model: flux.FluxModel, reward: Callable, grid: Array, options: SimpleNamespace
) -> Draw:
    # Calibrated on the model's own samples, from keys of no image.
    key_samples, key_levels = jax.random.split(jax.random.key(2**31))
    settings = _unguided_settings(model, grid, options)
    data = tj.sample(key_samples, num=_CALIBRATION["num"], **settings).x
    variance = tj.calibrate(
        key_levels,
        model,
        levels=_CALIBRATION["levels"],
        data=data,
        chunk_size=options.chunk_size,
        progress=not options.quiet,
    )
    of_latent = rewards.Decoded(model.decode, reward)
    guidance = tj.Conjugate(model, of_latent, options.scale, variance=variance)
    settings = {"times": grid, "solver": tj.Euler(), "progress": not options.quiet}
    return lambda key: tj.sample(key, model, guidance, num=1, **settings).x[0]


def _weighted(
    model: flux.FluxModel, reward: Callable, grid: Array, options: SimpleNamespace
) -> Draw:
    dual = model.parts.transformer.config.dual_time
    posterior = flux.Lookahead(model, options.snr_factor) if dual else tj.Tweedie(model)
    twist = tj.PlugIn(posterior, rewards.Decoded(model.decode, reward), options.scale)
    settings = {
        "num": options.particles,
        "times": grid,
        "proposal": tj.weighted.proposals.Base(),
        "chunk_size": options.chunk_size,
        "progress": not options.quiet,
    }

    def draw(key: Array) -> Array:
        key_run, key_draw = jax.random.split(key)
        return tj.smc(key_run, model, twist, **settings).resample(key_draw, 1)[0]

    return draw


METHODS: dict[str, Prepare] = {
    "none": _unguided,
    "plug-in": _published,
    "fmrg": _fmrg,
    "damped": _damped,
    "best-of-n": _best_of_n,
    "conjugate": _conjugate,
    "weighted": _weighted,
}
