r"""Published methods of weighted particles: Feynman-Kac steering, DAS, TDS, SVDD.

| method | proposal | potential, tempering | resampling |
|---|---|---|---|
| `fk_steering` | `Base()` | `Max()` | multinomial, at fractions .2, .4, .6, .8 of the run |
| `das` | `Shifted()` | `Difference()`, `Exponential` | ssp, below half of the sample size |
| `tds` | `Guided()` | `Difference()` | systematic, after every step |
| `svdd` | `Children(m)` | `Difference()` | none: each particle chooses among its m children |

Each method is `smc` with these settings, and accepts the other arguments of `smc`. Deviations of
the published codes from the mathematics are corrected, so the weights stay exact.
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
    """`dps` for a model with real-valued states. **Raises:** `TypeError` for other models."""
    if isinstance(model, Denoiser) and not isinstance(model, Model):
        raise TypeError(
            f"states of {type(model).__name__} have no gradient for a guidance: pass "
            "guide=tiltjax.tokens.Completions"
        )
    return dps(model, reward, scale)  # pyright: ignore[reportArgumentType], checked there


def values_only(model: Denoiser, reward: Callable, scale: float | Array) -> Guidance:
    """`dps` of a reward without a gradient: it gives a twist and no shift."""
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
    """Weighted particles by Feynman-Kac steering: base proposals, `Max` potentials, multinomial
    resampling. It needs no gradient.

    The published method resamples after the steps 20, 40, 60 and 80 of 100, for text to image. A
    run of N steps resamples after the steps nearest to these fractions of the run. Two faults of
    the published code are corrected: the last potential completes the reward, and weights that no
    resampling used remain.

    **Arguments:** `key`, `model`, `num`; `reward`, any function of one sample, and `scale`;
    `guide(model, reward, scale)`, the guidance that gives the twist, by default `dps` without
    gradients (for tokens: `tokens.Completions`); `settings` of `smc`, which may also replace the
    settings of this method.

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
    """Weighted particles by DAS: `Shifted` proposals, exponential tempering, ssp resampling if the
    effective sample size is below half of `num`.

    **Arguments:** as in `fk_steering`, with a differentiable reward; `gamma` of the tempering
    `(1 + gamma)^i - 1`. The default is the published .008 for 100 steps; a run of N steps has the
    same factors at the same fractions of the run. Tokens have no score and raise an error.

    The published code loses twists when it resamples. Here every value follows its ancestor.
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
    """Weighted particles by the twisted diffusion sampler: the kernel at the twisted denoiser,
    systematic resampling after every step.

    **Arguments:** as in `fk_steering`, with a differentiable reward. Source: Wu et al.
    (arXiv 2306.17775).
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
    """Weighted particles by soft value-based decoding. In every step each particle proposes
    `children` states by the base kernel and continues as one of them, chosen with probability
    proportional to `exp(scale * r)` at the child's denoiser. It needs no gradient and does not
    resample between particles.

    The published method ignores the weight of a choice, so its particles (`particles.x` without
    weights) do not follow the tilt. The `log_weights` that are returned make them exact. A step
    costs `children` network evaluations per particle.

    **Arguments:** as in `fk_steering`; `children`, 20 in the publication. Source: Li et al.
    (arXiv 2408.08252).
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
    """`smc` with the published settings, which the settings of the caller replace."""
    if isinstance(guide, Guidance):
        raise TypeError(
            f"guide must be a function (model, reward, scale) -> Guidance, got a "
            f"{type(guide).__name__}: pass a function such as dps, or call smc with the guidance"
        )
    given = {name: value for name, value in settings.items() if value is not None}
    return smc(key, model, guide(model, reward, scale), **(published | given))
