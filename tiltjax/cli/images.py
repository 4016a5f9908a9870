r"""`tiltjax images` makes images with FLUX.1:
`tiltjax images --model FOLDER --prompt "..." --reward blue --method plug-in`.

| method | an image is |
|---|---|
| `none` | a sample of the model |
| `plug-in` | guided as published: `--particles` draws, gradients of `--length`, `--guided` steps |
| `fmrg` | the same without added noise: one prediction along the flow map |
| `damped` | the same as plug-in, damped with `--sigma` |
| `best-of-n` | the best of `--particles` samples |
| `conjugate` | guided by variational conjugate tilting at `--scale`, without network gradients |
| `weighted` | drawn by weight from `--particles` particles (sequential Monte Carlo) at `--scale` |

Image i depends on the seed and on i alone. The same command continues an interrupted run; see
`tiltjax.images.folders`. With `--compare`, the unguided images of the same seeds are made too, in
the folder `unguided`. `sheet.png` shows both, with their rewards.
"""

import os
import sys
import textwrap
import time
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

import tiltjax as tj
from tiltjax.cli import _usual
from tiltjax.cli._status import Status
from tiltjax.images import flux, folders, prompts, rewards, shapes, sheets
from tiltjax.images.networks import clip

REGIONS = {
    "top-right": rewards.top_right_circle,
    "center": rewards.center_circle,
    "bottom": rewards.bottom_half,
}
REWARDS: dict[str, Callable[[SimpleNamespace], Callable]] = {
    "blue": lambda options: rewards.blue_minus_half_red_green,
    "blue-channel": lambda options: rewards.blueness,
    "blue-minus-red-green": lambda options: rewards.blue_minus_red_green,
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
# Options that change no image, and those that change an unguided image or its reward.
_WITHOUT_EFFECT = ("output", "images", "quiet", "chunk_size", "size", "compare", "sheet")
_UNGUIDED = (
    *("model", "prompt", "seed", "adapters", "height", "width", "steps", "cfg", "dtype"),
    *("reward", "region", "palette", "clip"),
)
_CALIBRATION = {"num": 4, "levels": 12}
_LESS_MEMORY = (
    "Options that take less: --dtype bfloat16, --remat, --attention cudnn (on a GPU), fewer "
    "--particles, --chunk-size 1, a smaller --size"
)


class Series(NamedTuple):
    """Numbered images in one folder, made with one method: guided ones, or unguided ones."""

    name: str
    folder: folders.ImageFolder
    options: SimpleNamespace


class Job(NamedTuple):
    """What a method needs to make images."""

    model: flux.FluxModel
    reward: Callable
    grid: Array
    options: SimpleNamespace
    say: Status


def run(options: SimpleNamespace, say: Status = lambda phase: None) -> None:
    """Make the images that are missing, then report on all of them.

    **Arguments:** `options`, those of the command, by name; `say`, which is told of each phase.

    **Raises:** `MemoryError` that names options which take less, also for memory of the device.
    """
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *rest: print(f"tiltjax: {message}", file=sys.stderr)
        warnings.simplefilter("always", UserWarning)
        try:
            _make(options, say)
        except MemoryError as error:
            raise MemoryError(f"{error}. {_LESS_MEMORY}") from error
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            reason = str(error).splitlines()[0]
            raise MemoryError(f"the device is out of memory ({reason}). {_LESS_MEMORY}") from error


def _make(options: SimpleNamespace, say: Status) -> None:
    if options.particles is not None and options.particles > 1 and options.method in _ONE_PARTICLE:
        raise ValueError(
            f"--method {options.method} makes an image from one particle: leave --particles out"
        )
    options.height, options.width = _size(options.size) or (flux.usual_size(options.model),) * 2
    on_cpu = jax.default_backend() == "cpu"
    options.dtype = options.dtype or ("float32" if on_cpu else "bfloat16")
    _usual.complete(options)
    _usual.warn(options)
    reward = REWARDS[options.reward](options)
    series = _series(options)
    missing = [each.folder.missing(options.images) for each in series]
    made = options.images - len(missing[-1])
    if made:
        print(f"{made} of {options.images} images exist already")
    sizes = _fill(series, missing, reward, say) if any(missing) else []
    _report(series, sizes)


def _series(options: SimpleNamespace) -> list[Series]:
    """The series to make: the guided one comes last."""
    notes = {
        "tiltjax": tj.__version__,
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
    }
    values = dict(sorted(vars(options).items()))
    settings = {name: value for name, value in values.items() if name not in _WITHOUT_EFFECT}
    folder = folders.ImageFolder(options.output, settings, notes)
    main = Series("unguided" if options.method == "none" else "guided", folder, options)
    if not options.compare:
        return [main]
    settings = {name: value for name, value in values.items() if name in _UNGUIDED}
    folder = folders.ImageFolder(folder.folder / "unguided", settings, notes)
    unguided = SimpleNamespace(**{**values, "method": "none", "particles": 1})
    return [Series("unguided", folder, unguided), main]


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
    series: list[Series], missing: list[list[int]], reward: Callable, say: Status
) -> list[float]:
    """Make the missing images of each series. Returns the effective sample sizes of weighted runs,
    one for each image.
    """
    say("reading the model")
    options = series[-1].options
    model = _load(options)
    grid = flux.schedule(options.model, model, options.steps)
    scalar, sizes = tj.rewards.as_reward(reward), []
    for each, numbers in zip(series, missing, strict=True):
        if not numbers:
            continue
        draw = METHODS[each.options.method](Job(model, reward, grid, each.options, say))
        for number in numbers:
            if number in numbers[:2]:
                compiling = "compiling and " if number == numbers[0] else ""
                say(f"{compiling}sampling {each.name} images")
            start = time.perf_counter()
            latent, size = draw(jax.random.fold_in(jax.random.key(options.seed), number))
            image, value = _decoded(model, scalar, latent)
            file = each.folder.add(number, np.asarray(image), float(value))
            sizes += [] if size is None else [float(size)]
            seconds = time.perf_counter() - start
            print(f"{file}  {options.reward} {float(value):+.4f}  {seconds:.1f} s", flush=True)
    return sizes


def _load(options: SimpleNamespace) -> flux.FluxModel:
    gradient = options.method in _GRADIENT
    chunk_size = options.particles
    if options.chunk_size is not None and not gradient:
        chunk_size = min(options.chunk_size, chunk_size)
    return flux.load_model(
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


@eqx.filter_jit
def _decoded(model: flux.FluxModel, reward: Callable, latent: Array) -> tuple[Array, Array]:
    """The image of a latent, and its reward."""
    image = model.decode(latent)
    return image, reward(jnp.clip(image, 0, 1))


def _system_memory() -> int | None:
    """Bytes of memory of this machine, or `None` where the system does not tell."""
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _report(series: list[Series], sizes: list[float]) -> None:
    """Print a summary, and write the contact sheet."""
    options = series[-1].options
    for each in series:
        values = np.asarray([each.folder.rewards[number] for number in range(options.images)])
        error = f" ± {values.std(ddof=1) / np.sqrt(len(values)):.4f}" if len(values) > 1 else ""
        print(
            f"mean {options.reward} of {len(values)} {each.name}: {values.mean():+.4f}{error}"
            f"{_followed(each)}"
        )
    if sizes:
        print(
            f"effective sample size of {options.particles} particles: {np.mean(sizes):.1f} on "
            f"average, {min(sizes):.1f} at least"
        )
    print(f"images: {', '.join(str(each.folder.folder) for each in reversed(series))}")
    if options.sheet:
        file = series[-1].folder.folder / "sheet.png"
        prompt = textwrap.shorten(options.prompt, 100)
        title = f'"{prompt}", method {options.method}, reward {options.reward}'
        sheets.contact_sheet([_row(each) for each in series], title).save(file)
        print(f"contact sheet: {file}")


def _followed(series: Series) -> str:
    """How many images follow the prompt, for the small model, whose images can be read."""
    options = series.options
    if not _usual.is_tiny(options) or (options.height, options.width) != (shapes.SIDE,) * 2:
        return ""
    scene = shapes.parsed(options.prompt)
    images = (series.folder.image(number) / 255 for number in range(options.images))
    count = sum(shapes.follows(image, scene) for image in images)
    return f", {count} of {options.images} follow the prompt"


def _row(series: Series) -> sheets.Row:
    """The first images of a series and their rewards."""
    values = [series.folder.rewards[number] for number in range(series.options.images)]
    images = [series.folder.image(number) for number in range(min(len(values), sheets.COLUMNS))]
    captions = [f"{value:+.3f}" for value in values[: len(images)]]
    return sheets.Row(f"{series.name}\nmean {np.mean(values):+.3f}", images, captions)


# A method makes its settings once. It returns a function of a key that draws a latent, and tells
# the effective sample size where particles are weighted.
Draw = Callable[[Array], tuple[Array, Array | None]]


def _unguided(job: Job) -> Draw:
    settings = _unguided_settings(job)
    return lambda key: (tj.sample(key, num=1, **settings).x[0], None)


def _unguided_settings(job: Job) -> dict[str, Any]:
    dual = job.model.parts.transformer.config.dual_time
    return {
        "model": job.model.leaping(job.grid) if dual else job.model,
        "times": job.grid,
        "solver": tj.Euler(),
        "chunk_size": job.options.chunk_size,
    }


def _published(job: Job, **changes: Any) -> Draw:
    options = job.options
    settings = {
        "grid": job.grid,
        "first": options.first,
        "guided": options.guided,
        "k": options.particles,
        "snr_factor": options.snr_factor,
        "scale": options.scale,
        "length": options.length or None,
        "limit": options.limit,
        **changes,
    }
    return lambda key: (flux.published(key, job.model, job.reward, **settings).x[0], None)


def _fmrg(job: Job) -> Draw:
    return _published(job, snr_factor=1.0)


def _damped(job: Job) -> Draw:
    return _published(job, sigma=job.options.sigma)


def _best_of_n(job: Job) -> Draw:
    settings, n = _unguided_settings(job), job.options.particles
    of_latent = rewards.Decoded(job.model.decode, job.reward)
    return lambda key: (
        tj.best_of_n(tj.sample(key, num=n, **settings), of_latent, n).x[0],
        None,
    )


def _conjugate(job: Job) -> Draw:
    job.say("calibrating the variance")
    # On samples of the model, whose keys are those of no image.
    key_samples, key_levels = jax.random.split(jax.random.key(2**31))
    settings = _unguided_settings(job)
    data = tj.sample(key_samples, num=_CALIBRATION["num"], **settings).x
    variance = tj.calibrate(
        key_levels,
        job.model,
        levels=_CALIBRATION["levels"],
        data=data,
        chunk_size=job.options.chunk_size,
    )
    of_latent = rewards.Decoded(job.model.decode, job.reward)
    guidance = tj.Conjugate(job.model, of_latent, job.options.scale, variance=variance)
    settings = {"times": job.grid, "solver": tj.Euler()}
    return lambda key: (tj.sample(key, job.model, guidance, num=1, **settings).x[0], None)


def _weighted(job: Job) -> Draw:
    dual = job.model.parts.transformer.config.dual_time
    posterior = flux.Lookahead(job.model, job.options.snr_factor) if dual else tj.Tweedie(job.model)
    # The proposal is the model's own: weights need values of the reward, and no gradient.
    of_latent = tj.rewards.ValueOnly(rewards.Decoded(job.model.decode, job.reward))
    twist = tj.PlugIn(posterior, of_latent, job.options.scale)
    settings = {
        "num": job.options.particles,
        "times": job.grid,
        "proposal": tj.weighted.proposals.Base(),
        "chunk_size": job.options.chunk_size,
    }

    def draw(key: Array) -> tuple[Array, Array]:
        key_run, key_draw = jax.random.split(key)
        particles = tj.smc(key_run, job.model, twist, **settings)
        return particles.resample(key_draw, 1)[0], particles.ess

    return draw


METHODS: dict[str, Callable[[Job], Draw]] = {
    "none": _unguided,
    "plug-in": _published,
    "fmrg": _fmrg,
    "damped": _damped,
    "best-of-n": _best_of_n,
    "conjugate": _conjugate,
    "weighted": _weighted,
}
