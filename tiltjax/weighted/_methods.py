r"""Published methods of weighted particles: Feynman-Kac steering, DAS, TDS, SVDD.

| method | proposal | potential, tempering | resampling |
|---|---|---|---|
| `fk_steering` | `Base()` | `Max()` | multinomial, at one to four fifths of the run |
| `das` | `Shifted()` | `Difference()`, `Exponential` | ssp, where half of the sample size is lost |
| `tds` | `Guided()` | `Difference()` | systematic, after every step |
| `svdd` | `Children(m)` | `Difference()` | none: each particle chooses among its m children |

Each of them is `smc` with these settings, and takes its other arguments. What the published codes
do differently from the mathematics is repaired: weights stay exact.
"""

from collections.abc import Callable
from typing import Any

from jaxtyping import Array

from tiltjax import resampling
from tiltjax.guidance import Guidance, dps
from tiltjax.models import Denoiser, Model
from tiltjax.particles import Particles
from tiltjax.rewards import ValueOnly
from tiltjax.weighted._smc import smc
from tiltjax.weighted.potentials import Max, ResampleFractions
from tiltjax.weighted.proposals import Base, Children, Guided, Shifted
from tiltjax.weighted.tempering import Exponential

# (model, reward, scale) -> Guidance
Guide = Callable[..., Guidance]


def gradient(model: Denoiser, reward: Callable, scale: float | Array) -> Guidance:
    """`dps`, of models whose states are numbers."""
    if isinstance(model, Denoiser) and not isinstance(model, Model):
        raise TypeError(
            f"states of {type(model).__name__} have no gradient to guide by: give "
            "guide=tiltjax.tokens.Completions"
        )
    return dps(model, reward, scale)  # pyright: ignore[reportArgumentType], checked there


def values_only(model: Denoiser, reward: Callable, scale: float | Array) -> Guidance:
    """`dps` of a reward without a gradient: a twist, and no shift."""
    return gradient(model, ValueOnly(reward), scale)


def fk_steering(
    key: Array,
    model: Denoiser,
    reward: Callable,
    *,
    scale: float | Array = 1.0,
    num: int,
    guide: Guide = values_only,
    **settings: Any,
) -> Particles:
    """Feynman-Kac steering: base proposals, `Max` potentials, multinomial resampling. No gradient.

    Published for text to image with 100 steps, of which the 20th, 40th, 60th and 80th resample; a
    run of N steps resamples after the steps nearest to these fractions of it. Two faults of the
    published code are repaired: the last potential completes the reward, and weights that no
    resampling used stay.

    **Arguments:** `key`, `model`, `num`; `reward`, any function of one sample, and `scale`;
    `guide(model, reward, scale)`, the guidance that twists, by default `dps` without gradients (for
    tokens: `tokens.Completions`); `settings` of `smc`, also to replace these.

    **Returns**, **raises:** as `smc`. Source: Singhal et al. (arXiv 2501.06848).
    """
    published: dict[str, Any] = {
        "proposal": Base(),
        "potential": Max(),
        "resample": resampling.multinomial,
        "schedule": ResampleFractions(0.2, 0.4, 0.6, 0.8),
        "ess_threshold": 1.0,
    }
    return _weigh(key, model, guide, reward, scale, published, {"num": num, **settings})


def das(
    key: Array,
    model: Denoiser,
    reward: Callable,
    *,
    scale: float | Array = 1.0,
    num: int,
    gamma: float | Array | None = None,
    guide: Guide = gradient,
    **settings: Any,
) -> Particles:
    """DAS: `Shifted` proposals, exponential tempering, ssp resampling below half of the effective
    sample size.

    **Arguments:** as in `fk_steering`, with a reward that has a gradient; `gamma` of the tempering
    `(1 + gamma)^i - 1`, by default the published .008 of 100 steps: a run of N steps then has the
    same factors at the same fractions of its way. Not for tokens, which have no score.

    The published code forgets twists when it resamples; here everything follows its ancestor.
    Source: Kim et al. (arXiv 2501.05803).
    """
    published: dict[str, Any] = {
        "proposal": Shifted(),
        "tempering": Exponential(0.008, steps=100) if gamma is None else Exponential(gamma),
        "resample": resampling.ssp,
        "ess_threshold": 0.5,
    }
    return _weigh(key, model, guide, reward, scale, published, {"num": num, **settings})


def tds(
    key: Array,
    model: Denoiser,
    reward: Callable,
    *,
    scale: float | Array = 1.0,
    num: int,
    guide: Guide = gradient,
    **settings: Any,
) -> Particles:
    """The twisted diffusion sampler: the kernel at the twisted denoiser, systematic resampling
    after every step.

    **Arguments:** as in `fk_steering`, with a reward that has a gradient. Source: Wu et al. (arXiv
    2306.17775).
    """
    published: dict[str, Any] = {
        "proposal": Guided(),
        "resample": resampling.systematic,
        "ess_threshold": 1.0,
    }
    return _weigh(key, model, guide, reward, scale, published, {"num": num, **settings})


def svdd(
    key: Array,
    model: Denoiser,
    reward: Callable,
    *,
    scale: float | Array = 1.0,
    num: int,
    children: int = 20,
    guide: Guide = values_only,
    **settings: Any,
) -> Particles:
    """Soft value-based decoding: in every step each particle proposes `children` states by the base
    kernel and goes on as one of them, chosen in proportion to `exp(scale * r)` at its denoiser. No
    gradient, and no resampling between particles.

    The published method ignores what a choice costs, and its particles (`particles.x` without
    weights) are not the tilt; the `log_weights` returned make them exact. A step costs `children`
    network evaluations a particle.

    **Arguments:** as in `fk_steering`; `children`, published with 20. Source: Li et al. (arXiv
    2408.08252).
    """
    published: dict[str, Any] = {"proposal": Children(children), "ess_threshold": 0.0}
    return _weigh(key, model, guide, reward, scale, published, {"num": num, **settings})


def _weigh(
    key: Array,
    model: Denoiser,
    guide: Guide,
    reward: Callable,
    scale: float | Array,
    published: dict[str, Any],
    settings: dict[str, Any],
) -> Particles:
    """`smc` with the published settings, but for those that a caller gives."""
    if isinstance(guide, Guidance):
        raise TypeError(
            f"guide makes a guidance of (model, reward, scale), got a {type(guide).__name__}: pass "
            "a function such as dps, or call smc with the guidance"
        )
    given = {name: value for name, value in settings.items() if value is not None}
    return smc(key, model, guide(model, reward, scale), **(published | given))
