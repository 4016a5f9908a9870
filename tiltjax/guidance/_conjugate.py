r"""Variational conjugate tilting: a tilt for *any* reward, without differentiating the network.

A conjugate reward, `scale * r(x) = <a, x> - c |x|^2 / 2`, is tilted exactly by asking the denoiser
at another time and state (`tiltjax.Tilted`). Any other reward is replaced, at each state, by the
conjugate one that matches its *expected* gradient and curvature under a Gaussian `N(z, v I)` that
stands for the tilted posterior of `X_1`:

    c = max(0, -scale E[tr ∇^2 r] / d),      a = scale E[∇r] + c z.

Then `z` is the tilted denoiser of `(a, c)`, one ordinary denoiser call, and `v = v(snr_t + c)` its
mean squared error by coordinate. By Stein's identity
`E[tr ∇^2 r] = E[<eps, ∇r(z + sqrt(v) eps)>] / sqrt(v)`, so a few antithetic draws give both
expectations with one gradient of the reward each, at the data end. The fit is carried from step to
step, so that one iteration a step follows its fixed point; being drawn at random, it has a Monte
Carlo error, which the steps average.

**Anisotropic.** A view of other precisions in other directions is no state of the model, so `c`
stays a number; but which number? The conjugate reward nearest to a quadratic one of curvature `C`,
by mean square under a posterior of covariance `P`, has `c = tr(P C P) / tr(P P)`: the curvature
where the posterior is wide, such as between modes. `P` is the denoiser's response to the natural
parameter, so draws `w = D(eta + eps / sqrt(v)) - D(eta)`, of covariance `P P / v`, give it as
`-scale E<w, ∇r(z + w)> / E|w|^2`, at one more denoiser call each and still without a derivative.

**Stable.** `a` follows `z` and `z` follows `a`; in a direction where the curvature exceeds `c` by
more than `1 / v` this loop would oscillate and grow. The draws and the power method find the
stiffest direction, and the fit moves by the fraction that stops it; in one iteration it moves no
further than two widths of the posterior, where its draws have looked, and widens by no more than
two.

The derivation is this library's own: the conjugate tilt of `tiltjax.models`, with Stein's identity
in place of a reward's form.

What breaks it: rewards with jumps (Stein's identity needs a weak derivative; `StepReward` has none
and is not seen); far modes that the draws do not reach; rewards that turn within the width of a
posterior (`scale sin(3 x)` from a scale of about 10 on); one direction far stiffer than hundreds of
others, which it slows down; rewards that are flat between modes and stiff across (the fit settles
on one mode and then sees only what is across: `tiltjax.gibbs` is exact for quadratic ones).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from tiltjax import _checks, _linalg, _pytree, rewards
from tiltjax.guidance._base import Estimate, Guidance
from tiltjax.mixtures import decomposed
from tiltjax.models import Analytic, Denoiser, Model

_LOST_PRECISION = (
    0.75  # the fraction of its precision that the fitted posterior may lose in one iteration
)
_SNR_RANGE, _LEVELS = (1e-7, 1e7), 48  # of a table of the variance: over the noise's own variance
_WIDTHS = 2.0  # how far its mean may move, in widths


class Variance(eqx.Module):
    """A table of the denoiser's mean squared error a coordinate,
    `v(snr) = E|X_1 - D_t(X_t)|^2 / d`; built by `calibrate`.

    Linear in the logarithms between its entries; NaN outside their range, which a run reports.
    """

    log_snr: Array
    log_variance: Array

    def __call__(self, snr: Array) -> Array:
        return jnp.exp(
            jnp.interp(jnp.log(snr), self.log_snr, self.log_variance, left=jnp.nan, right=jnp.nan)
        )


@eqx.filter_jit
def _variance_of(model: Analytic) -> Variance:
    """The table of a mixture, without a network."""
    model = decomposed(_pytree.cast(model, model.dtype))
    interpolant = model.interpolant
    widest = (
        jnp.asarray(_SNR_RANGE, model.dtype) / interpolant.sigma(jnp.zeros((), model.dtype)) ** 2
    )
    lowest, highest = (end.astype(model.dtype) for end in interpolant.snr_range())
    first, last = jnp.log(jnp.maximum(widest[0], lowest)), jnp.log(jnp.minimum(widest[1], highest))
    log_snr = jnp.linspace(first, last, _LEVELS)
    return Variance(
        log_snr, jnp.log(jax.lax.map(lambda q: model.posterior_variance(jnp.exp(q)), log_snr))
    )


class Probe(eqx.Module):
    """`variance=Probe()`: the tilted posterior's variance at each state by Tweedie's identity,
    `v = tr(∂D/∂eta) / d`, from one Hutchinson probe. No calibration and no average over states, but
    one pullback through the denoiser each iteration.
    """


class Fit(NamedTuple):
    """The conjugate reward that a step starts from: `c = fitted / spread`, `a = slope + c point`.

    - `point`, `slope`: where the reward was expanded, and its expected gradient there.
    - `fitted`, `spread`: running sums of `-<w, gradient>` and of `|w|^2` over the draws, in units
      of the variance.
    - `stiff`: a unit vector that turns toward the reward's most concave direction.
    """

    point: Array
    slope: Array
    fitted: Array
    spread: Array
    stiff: Array

    @property
    def precision(self) -> Array:
        """`c`, not negative: a convex reward is fitted by a linear one."""
        return jnp.where(
            self.spread > 0,
            jnp.maximum(self.fitted / jnp.where(self.spread > 0, self.spread, 1), 0),
            0,
        )

    @property
    def natural(self) -> Array:
        """`a`."""
        return self.slope + self.precision * self.point


class Conjugate(Guidance):
    """Variational conjugate tilting: guidance by the conjugate reward that fits `scale * r` at each
    state.

    The conjugate terms of a sum enter exactly, only the rest is fitted: a conjugate reward is
    tilted exactly.

    | an evaluation costs | denoiser calls | gradients of the reward |
    |---|---|---|
    | isotropic draws | `iterations + 1` | `iterations * (draws + 2)` |
    | `anisotropic=True` | `iterations * (1 + draws / 2) + 1` | `iterations * (draws + 2)` |

    and no derivative of the network. Measured against known tilts
    (`benchmarks/rewards/any_reward.py`, `benchmarks/accuracy/checkerboard.py`): closest of all
    guidances to the tilt on bumps, kinks, plateaus and wells, in 1 to 100 dimensions, mode masses
    off by up to a tenth; on a reward that is flat between modes and stiff across them it is wrong,
    one mode takes nearly all.

    **Arguments:**

    - `model`; `reward`, differentiable almost everywhere and without jumps; `scale >= 0`.
    - `iterations`: refinements of the fit an evaluation, from the previous step's.
    - `draws`: an even number, antithetic pairs.
    - `smoothing`: the weight of the previous curvature in each iteration, in [0, 1). It
      averages the draws' noise over steps: steadier for stiff rewards; for smooth ones 0 has the
      smaller bias (on the checkerboard 1% of the trace instead of 6%).
    - `variance`: `v(snr)`, from `calibrate(key, model)`, or any function, or `Probe()`. An
      `Analytic` model alone needs none: its own is computed here.
    - `anisotropic`: draw along the responses of the denoiser, for rewards and posteriors of
      different widths in different directions.

    The network is called at `snr_t + c`: on a path with a cleanest level (`DiscreteVP`) end the
    grid where that is still inside and jump, `times=[..., 1.0]`. Beyond the table `v` is NaN, which
    a run reports.

    `log_h` is exact for a conjugate reward on an `Analytic` model, and otherwise `None`: to weigh
    particles, use this as a proposal beside another twist.

    **Raises:** `ValueError` for conjugate terms that are convex together, an odd number of draws, a
    `smoothing` outside [0, 1).
    """

    model: Model
    reward: rewards.Reward
    remainder: rewards.Reward | None
    natural: Array
    precision: Array
    scale: Array
    variance: Any
    smoothing: Array
    iterations: int = eqx.field(static=True)
    draws: int = eqx.field(static=True)
    anisotropic: bool = eqx.field(static=True)

    def __init__(
        self,
        model: Model,
        reward: Callable,
        scale: float | Array = 1.0,
        *,
        iterations: int = 1,
        draws: int = 4,
        smoothing: float | Array = 0.3,
        variance: Callable | None = None,
        anisotropic: bool = False,
    ):
        _checks.instance(model, Model, "model", "Conjugate(model, reward, scale)")
        self.model = model
        self.reward = rewards.as_reward(reward)
        self.scale = _checks.nonnegative(scale, "scale")
        self.iterations = _checks.count(iterations, "iterations")
        self.draws = _checks.count(draws, "draws")
        if self.draws % 2:
            raise ValueError(f"draws come in antithetic pairs: draws must be even, got {draws}")
        self.smoothing = _checks.in_range(smoothing, "smoothing", 0, 1, closed="left")
        self.anisotropic = _checks.flag(anisotropic, "anisotropic")
        zero = jnp.zeros((), model.dtype)
        self.natural, self.precision, self.remainder = _split(
            self.reward, (jnp.zeros(model.shape, model.dtype), zero)
        )
        if (
            _checks.concrete((self.precision, self.scale))
            and np.asarray(self.precision) * np.asarray(self.scale) < 0
        ):
            raise ValueError(
                "the conjugate terms of this reward are convex together (c = "
                f"{float(self.precision) * float(self.scale):g} < 0): at the noise "
                "end their tilt does not exist. Tilted can be evaluated where snr_t + c > 0; "
                "PlugIn guides from the start"
            )
        if self.remainder is not None and variance is None:
            if not isinstance(model, Analytic):
                raise ValueError(
                    "Conjugate needs variance=, the denoiser's mean squared error of this network: "
                    "calibrate(key, model) measures it once, Probe() estimates it at each state by "
                    "a derivative, or pass a function of the snr"
                )
            variance = _variance_of(model)
        if variance is not None and not isinstance(variance, eqx.Module):
            variance = _pytree.Function(variance, "variance")
        self.variance = variance

    def init(self, x: Array) -> Fit:
        """No tilt; the stiffest direction is looked for from that of `x`."""
        zero = jnp.zeros((), x.dtype)
        return Fit(
            jnp.zeros_like(x),
            jnp.zeros_like(x),
            zero,
            zero,
            _unit(x, jnp.ones_like(x) / x.size**0.5),
        )

    def __call__(self, key: Array, t: Array, x: Array, state: Fit) -> tuple[Estimate, Fit]:
        interpolant = self.model.interpolant
        snr = interpolant.snr(t) + self.scale * self.precision
        natural = interpolant.alpha(t) / interpolant.sigma(t) ** 2 * x + self.scale * self.natural

        def denoised(a: Array, c: Array) -> Array:
            return self.model.denoise(*interpolant.observe(snr + c, natural + a))

        remainder = self.remainder
        if remainder is None:
            log_h = None
            if isinstance(self.model, Analytic):
                posterior = self.model.posterior(t, x)
                log_h = posterior.log_mean_exp(
                    self.scale * self.natural, self.scale * self.precision
                )
                log_h = log_h + self.log_tilt(jnp.zeros_like(x))  # the reward's constant
            return Estimate(denoised(state.natural, state.precision), log_h=log_h), state
        gradient = jax.grad(lambda x1: self.scale * rewards.value(remainder, x1))

        def refine(fit: Fit, key: Array) -> tuple[Fit, None]:
            a, c = fit.natural, fit.precision
            key, key_probe = jax.random.split(key)
            if isinstance(self.variance, Probe):
                z, variance = _probed(key_probe, lambda a: denoised(a, c), a)
            else:
                z, variance = denoised(a, c), self.variance(snr + c)
            width = jnp.sqrt(variance)
            draws = jax.random.normal(key, (self.draws // 2, *x.shape), x.dtype)
            if self.anisotropic:
                w = jax.vmap(lambda e: denoised(a + e / width, c) - z)(draws)
                spread = jnp.sum(w**2) / (variance * len(w))
            else:
                w, spread = width * draws, jnp.asarray(x.size, x.dtype)
            plus = jax.vmap(lambda w: gradient(z + w))(w)
            minus = jax.vmap(lambda w: gradient(z - w))(w)
            curved = (minus - plus) / 2  # -H w of each draw
            fitted = jnp.sum(w * curved) / (variance * len(w))
            along_stiff = (gradient(z - width * fit.stiff) - gradient(z + width * fit.stiff)) / (
                2 * width
            )

            mix = lambda old, new: self.smoothing * old + (1 - self.smoothing) * new
            new = fit._replace(fitted=mix(fit.fitted, fitted), spread=mix(fit.spread, spread))
            # The fit may sharpen at once, and forgets by and by: draws that have jumped over a kink
            # see none of its curvature.
            least = c - _LOST_PRECISION / variance
            new = new._replace(fitted=jnp.maximum(new.fitted, least * new.spread))
            # z answers to `a` with the gain v, and `a` to z with c - stiffness. Where v (stiffness
            # - c) > 1 that loop oscillates and grows: move by the fraction that would end it in one
            # step if it were linear.
            stiffness = jnp.maximum(
                jnp.sum(fit.stiff * along_stiff), jnp.max(jax.vmap(_steepness)(w, curved))
            )
            gain = (
                variance if isinstance(self.variance, Probe) else self.variance(snr + new.precision)
            )
            excess = gain * (stiffness - new.precision)
            fraction = jnp.where(fit.spread > 0, 1 / (1 + jnp.maximum(excess, 0)), 1)
            slope = jnp.mean(plus + minus, axis=0) / 2
            # One step of the power method; the shift makes the most concave direction the dominant
            # one, not the most convex.
            stiff = _unit(along_stiff + _length(along_stiff) * fit.stiff, fit.stiff)
            # Where the posterior would move to if it were Gaussian: no further than the draws have
            # looked.
            move = (slope - a + c * z) / (1 / variance + new.precision - c)
            fraction = jnp.minimum(
                fraction, _WIDTHS * jnp.sqrt(variance * x.size) / jnp.maximum(_length(move), 1e-30)
            )
            point, slope = (
                fit.point + fraction * (z - fit.point),
                fit.slope + fraction * (slope - fit.slope),
            )
            return new._replace(point=point, slope=slope, stiff=stiff), None

        state, _ = jax.lax.scan(refine, state, jax.random.split(key, self.iterations))
        return Estimate(denoised(state.natural, state.precision)), state

    def log_tilt(self, x1: Array) -> Array:
        return self.scale * rewards.value(self.reward, x1)


def _probed(key: Array, denoised: Callable, natural: Array) -> tuple[Array, Array]:
    """The denoiser and `tr(∂D/∂eta) / d` there; a learned Jacobian may say less than nothing, which
    is taken as rounding's worth.
    """
    z, slope = _linalg.hutchinson(key, denoised, natural)
    return z, jnp.maximum(slope, jnp.finfo(natural.dtype).tiny)


def _steepness(w: Array, curved: Array) -> Array:
    """`|C w| / |w|` for `curved = C w`, at least the curvature along w; 0 along a convex one, which
    needs no restraint.
    """
    along = _length(w)
    return jnp.where(
        _linalg.inner(w, curved) > 0, _length(curved) / jnp.where(along > 0, along, 1), 0
    )


def _length(x: Array) -> Array:
    """`|x|`, with a gradient of zero at zero."""
    square = _linalg.inner(x, x)
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)


def _unit(x: Array, otherwise: Array) -> Array:
    """`x / |x|`, or `otherwise` where x vanishes."""
    length = _length(x)
    return jnp.where(length > 0, x / jnp.where(length > 0, length, 1), otherwise)


def _split(
    reward: rewards.Reward, zero: tuple[Array, Array]
) -> tuple[Array, Array, rewards.Reward | None]:
    """`(a, c)` of the conjugate terms of a reward, and the sum of the others, `None` if there are
    none.
    """
    (natural, precision), rest = zero, None
    for term in _terms(reward):
        try:
            a, c = term.conjugate()
        except ValueError:  # not conjugate
            rest = term if rest is None else rest + term
            continue
        if a.shape != natural.shape:
            raise ValueError(
                f"the reward is one of states of shape {a.shape}, the model's have {natural.shape}"
            )
        natural, precision = (
            natural + a.astype(natural.dtype),
            precision + c.astype(precision.dtype),
        )
    return natural, precision, rest


def _terms(reward: rewards.Reward) -> list[rewards.Reward]:
    """The terms of a sum, also of a multiple of one."""
    if isinstance(reward, rewards.Sum):
        return [part for term in reward.terms for part in _terms(term)]
    if isinstance(reward, rewards.Scaled):
        return [rewards.Scaled(part, reward.factor) for part in _terms(reward.reward)]
    return [reward]


class Toward(Guidance):
    """Guidance by another model that is tilted already; built by `toward`."""

    model: Denoiser
    tilted: Denoiser
    reward: rewards.Reward
    scale: Array

    def __call__(self, key: Array, t: Array, x: Array, state: Any) -> tuple[Estimate, Any]:
        return Estimate(tilted=self.tilted.denoise(t, x), denoised=self.model.denoise(t, x)), state

    def log_tilt(self, x1: Array) -> Array:
        return self.scale * rewards.value(self.reward, x1)


def toward(
    model: Denoiser, tilted: Denoiser, reward: Callable, scale: float | Array = 1.0
) -> Toward:
    """A tilted model (`Tilted`, or a reward-fine-tuned network) as a guidance of the base `model`.

    **Arguments:** `model`; `tilted`, of the same states and interpolant; `reward` and `scale`, what
    it is tilted by.

    **Raises:** `ValueError` for models of other states, or on other paths.
    """
    _checks.instance(model, Denoiser, "model", "toward(model, tilted, reward, scale)")
    _checks.instance(tilted, Denoiser, "tilted", "such as Tilted(model, reward, scale)")
    if model.shape != tilted.shape or not _pytree.same(model.corruption, tilted.corruption):
        raise ValueError(
            "the tilted model must have the states and the interpolant of the base model"
        )
    return Toward(model, tilted, rewards.as_reward(reward), _checks.nonnegative(scale, "scale"))
