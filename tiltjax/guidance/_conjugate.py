r"""Variational conjugate tilting: a tilt by *any* reward, without differentiating the network.

A conjugate reward, `scale * r(x) = <a, x> - c |x|^2 / 2`, is tilted exactly by one call of the
denoiser at another time and state (`tiltjax.Tilted`). At each state, any other reward is replaced
by a conjugate reward. That reward has the same *expected* gradient and curvature under a Gaussian
`N(z, v I)`, which approximates the tilted posterior of `X_1`:

    c = max(0, -scale E[tr ∇^2 r] / d),      a = scale E[∇r] + c z.

Here `z` is the tilted denoiser of `(a, c)`, one ordinary denoiser call, and `v = v(snr_t + c)` is
its mean squared error per coordinate. By Stein's identity,
`E[tr ∇^2 r] = E[<eps, ∇r(z + sqrt(v) eps)>] / sqrt(v)`, so a few antithetic draws give both
expectations with one gradient of the reward per draw, at t = 1. The fit is carried from step to
step, so one iteration per step is enough to follow the fixed point. The draws are random, so the
fit has a Monte Carlo error, which averages out over the steps.

**Anisotropic.** A Gaussian likelihood with different precisions in different directions is not a
noisy state of the model, so `c` remains a number. Among all conjugate rewards, the nearest to a
quadratic reward of curvature `C`, in mean square under a posterior of covariance `P`, has
`c = tr(P C P) / tr(P P)`. This is the curvature in the directions in which the posterior is wide,
such as between modes. `P` is the derivative of the denoiser with respect to the natural parameter.
The draws `w = D(eta + eps / sqrt(v)) - D(eta)` have covariance `P P / v`, so they give this `c` as
`-scale E<w, ∇r(z + w)> / E|w|^2`. Each draw costs one more denoiser call, still without a
derivative.

**Stable.** `a` depends on `z` and `z` depends on `a`. In a direction in which the curvature exceeds
`c` by more than `1 / v`, this iteration would oscillate and diverge. The draws and the power method
find the stiffest direction, and the fit moves by the fraction that stops the oscillation
(`damping_fraction`). In one iteration, the fitted mean moves by at most two widths of the
posterior, which is as far as its draws reach (`trust_fraction`). The fitted width grows by a factor
of at most two (`keep_precision`).

This library derives the method itself: it is the conjugate tilt of `tiltjax.models` with
expectations by Stein's identity in place of the closed form of a reward.

A fit at one state does not weigh modes against each other. For the classifier
`log_sigmoid(4 (x + y - 1))` at scale 2 on four rotated modes, the masses of the two modes that
count are .71 and .29 where .60 and .40 are right (W2 .79; .21 between two sets of the truth). As
the proposal of `smc` with weights at the end alone (`ess_threshold=0`) it gives .604 and .396, with
an effective sample size of 65%.

The method fails for: rewards with jumps (Stein's identity needs a weak derivative, and `StepReward`
has none); far modes that the draws do not reach; rewards that oscillate within the width of a
posterior (`scale sin(3 x)` from a scale of about 10); one direction far stiffer than hundreds of
other directions, in which the fit becomes slow; rewards that are flat between modes and stiff
across them (the fit settles on one mode, and its draws then cover only the stiff directions;
`tiltjax.gibbs` is exact for quadratic rewards of this kind).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from tiltjax import _checks, _linalg, _pytree, _repr, rewards, scales
from tiltjax.guidance._base import Estimate, Guidance
from tiltjax.mixtures import decomposed
from tiltjax.models import Analytic, Denoiser, Model, check_mean

_SNR_RANGE, _LEVELS = (1e-7, 1e7), 48  # of a variance table; for a data_scale of 1
# The safeguards of one iteration of the fit; `keep_precision` and `trust_fraction` derive them.
_WIDENING = 2.0  # the largest factor by which the fitted posterior may widen
_LOST_PRECISION = 1 - _WIDENING**-2  # the fraction of the precision that this widening costs
_WIDTHS = 2.0  # the largest move of the fitted mean, in widths of the posterior


class Variance(_repr.Printable):
    """A table of the denoiser's mean squared error per coordinate,
    `v(snr) = E|X_1 - D_t(X_t)|^2 / d`; built by `calibrate`.

    Between entries, `log v` is linear in `log snr`. Outside the table, `v` is NaN, which a run
    reports.
    """

    log_snr: Array
    log_variance: Array

    def _call(self, **given: Any) -> str:
        return f"Variance of {self.log_snr.shape[-1]} levels"

    def __call__(self, snr: Array) -> Array:
        return jnp.exp(
            jnp.interp(jnp.log(snr), self.log_snr, self.log_variance, left=jnp.nan, right=jnp.nan)
        )


def log_snr_levels(model: Model, levels: int, stretch: float | Array = 1.0) -> Array:
    """The `log snr` of the entries of a table, `(levels,)`: evenly spaced, on the range on which
    the model's network can be called. `stretch` is that of the model.
    """
    base = model.interpolant.data_scale()
    # The grid of narrow data ends later than usual, but starts as usual.
    ends = jnp.stack([jnp.maximum(stretch, 1), jnp.minimum(stretch, 1)]).astype(model.dtype)
    widest = jnp.asarray(_SNR_RANGE, model.dtype) / (base * ends) ** 2
    # The network is called at the model's snr plus `ahead`, so its range is shifted by `ahead`.
    network, ahead = model.network_query()
    lowest, highest = (end.astype(model.dtype) - ahead for end in network.call_range())
    first = jnp.log(jnp.maximum(widest[0], lowest))
    last = jnp.log(jnp.where(jnp.isinf(highest), widest[1], highest))
    return jnp.linspace(first, last, levels)


@eqx.filter_jit
def _variance_of(model: Analytic, stretch: Array) -> Variance:
    """The table of a mixture, in closed form."""
    model, stretch = decomposed(_pytree.cast((model, stretch), model.dtype))
    log_snr = log_snr_levels(model, _LEVELS, stretch)
    return Variance(
        log_snr, jnp.log(jax.lax.map(lambda q: model.posterior_variance(jnp.exp(q)), log_snr))
    )


class GaussianVariance(_repr.Printable):
    """`v(snr) = s^2 / (1 + s^2 snr)`, the variance function of data `N(mu, s^2 I)`, for
    `variance=s^2`.
    """

    data_variance: Array

    def _call(self, **given: Any) -> str:
        return _repr.form(self.data_variance)

    def __call__(self, snr: Array) -> Array:
        return scales.gaussian_variance(jnp.sqrt(self.data_variance), snr)


class Gaussian(NamedTuple):
    """`N(mean, variance I)`, the approximation of the tilted posterior of `X_1`."""

    mean: Array
    variance: Array

    @property
    def width(self) -> Array:
        return jnp.sqrt(self.variance)


class Probe(_repr.Printable):
    """`variance=Probe()`: the variance of the tilted posterior at each state by Tweedie's identity,
    `v = tr(∂D/∂eta) / d`, estimated with one Hutchinson probe. It needs no calibration and does not
    average over states, but costs one pullback through the denoiser per iteration.
    """

    def posterior(self, key: Array, denoised: Callable, natural: Array) -> Gaussian:
        """`N(z, v I)` of a denoiser as a function of the natural parameter."""
        z, slope = _linalg.hutchinson(key, denoised, natural)
        # The Jacobian of a learned denoiser may have a negative trace, but a variance is positive.
        # The smallest positive number keeps `1 / v` finite.
        return Gaussian(z, jnp.maximum(slope, jnp.finfo(natural.dtype).tiny))


class Fit(NamedTuple):
    """The conjugate reward at the start of a step: `c = fitted / spread`, `a = slope + c point`.

    - `point`, `slope`: the point at which the reward was expanded, and the expected gradient there.
    - `fitted`, `spread`: running sums of `-<w, gradient>` and of `|w|^2` over the draws, in units
      of the variance.
    - `stiff`: a unit vector that converges to the reward's most concave direction.
    """

    point: Array
    slope: Array
    fitted: Array
    spread: Array
    stiff: Array

    @property
    def precision(self) -> Array:
        """`c`. It is 0 before the first draws and for a convex reward, whose fit is linear."""
        ratio = self.fitted / jnp.where(self.spread > 0, self.spread, 1)
        return jnp.where(self.spread > 0, jnp.maximum(ratio, 0), 0)

    @property
    def natural(self) -> Array:
        """`a`."""
        return self.slope + self.precision * self.point


class View(NamedTuple):
    """The likelihood of `X_1` at a state, `exp(<natural, X_1> - snr |X_1|^2 / 2)`: the likelihood
    of `X_t = x`, times the conjugate terms of the reward.
    """

    model: Model
    snr: Array
    natural: Array

    def denoised(self, a: Array, c: Array) -> Array:
        """The posterior mean after one more tilt, by `<a, x> - c |x|^2 / 2`."""
        return self.model.denoise(*self.model.interpolant.observe(self.snr + c, self.natural + a))


class Draws(NamedTuple):
    """Displacements `w` `(n, *shape)` from the posterior mean, each used with both signs, and
    `spread`, the mean of `|w|^2` in units of the variance.
    """

    w: Array
    spread: Array


class Expansion(NamedTuple):
    """The expansion of the scaled reward at a posterior, from gradients g at the draws; -C is its
    Hessian.

    - `slope`: `E[g]`.
    - `bent`: `C w` for each draw.
    - `bent_stiff`: `C u` for the unit vector u = `Fit.stiff`.
    """

    slope: Array
    bent: Array
    bent_stiff: Array


class Conjugate(Guidance):
    """Variational conjugate tilting: guidance by a conjugate reward that is fitted to `scale * r`
    at each state.

    The conjugate terms of a sum enter exactly, and only the other terms are fitted. A conjugate
    reward is therefore tilted exactly.

    | an evaluation costs | denoiser calls | gradients of the reward |
    |---|---|---|
    | isotropic draws | `iterations + 1` | `iterations * (draws + 2)` |
    | `anisotropic=True` | `iterations * (1 + draws / 2) + 1` | `iterations * (draws + 2)` |

    No derivative of the network is needed. In measurements against known tilts
    (`benchmarks/rewards/any_reward.py`, `benchmarks/accuracy/checkerboard.py`), it is the closest
    of all guidances to the tilt on bumps, kinks, plateaus and wells in 1 to 100 dimensions, with
    errors of the mode masses of up to 0.1. On a reward that is flat between modes and stiff across
    them it is wrong: one mode gets nearly all the mass.

    **Arguments:**

    - `model`; `reward`, differentiable almost everywhere and without jumps; `scale >= 0`.
    - `iterations`: refinements of the fit per evaluation, starting from the fit of the previous
      step.
    - `draws`: an even number, because the draws are antithetic pairs.
    - `smoothing`: the weight of the previous curvature in each iteration, in [0, 1). Smoothing
      averages the noise of the draws over steps, which stabilizes stiff rewards. For smooth
      rewards, 0 has the smaller bias (on the checkerboard 1% of the trace instead of 6%).
    - `variance`: `v(snr)`, the denoiser's mean squared error per coordinate. Use a function of the
      snr; a number, the variance `s^2` of the data, for `v(snr) = s^2 / (1 + s^2 snr)`, exact for
      one isotropic Gaussian; `calibrate(key, model)`, a measurement; or `Probe()`, an estimate at
      each state from a derivative. An `Analytic` model needs no `variance`: the default is a table
      of its mixture.
    - `anisotropic`: draw along the derivative of the denoiser, for rewards and posteriors whose
      widths differ between directions.

    The network is called at `snr_t + c`. If the interpolant has a cleanest level (`DiscreteVP`),
    end the grid at a time at which `snr_t + c` is still below that level, and then jump:
    `times=[..., 1.0]`. Beyond its table `v` is NaN, which a run reports.

    `log_h` is exact for a conjugate reward on an `Analytic` model, and `None` otherwise. To weigh
    particles, use this guidance as a proposal and pass another guidance as `twist`.

    **Raises:** `ValueError` for conjugate terms with a convex sum, an odd number of draws, a
    `smoothing` outside [0, 1), a network without `variance`, or a `variance` that is not positive;
    `TypeError` for a `variance` of another type.
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
        variance: float | Array | Callable | Probe | None = None,
        anisotropic: bool = False,
    ):
        check_mean(model, "Conjugate(model, reward, scale)")
        self.model = model
        self.reward = rewards.as_reward(reward)
        self.scale = _checks.nonnegative(scale, "scale")
        self.iterations = _checks.count(iterations, "iterations")
        self.draws = _checks.count(draws, "draws")
        if self.draws % 2:
            raise ValueError(f"draws must be even, got {draws}: the draws are antithetic pairs")
        self.smoothing = _checks.in_range(smoothing, "smoothing", 0, 1, closed="left")
        self.anisotropic = _checks.flag(anisotropic, "anisotropic")
        zero = jnp.zeros((), model.dtype)
        self.natural, self.precision, self.remainder = rewards.split_conjugate(
            self.reward, (jnp.zeros(model.shape, model.dtype), zero)
        )
        _check_concave(self.precision, self.scale)
        needed = self.remainder is not None
        self.variance = _variance(variance, model) if needed or variance is not None else None

    def init(self, x: Array) -> Fit:
        """The fit without a tilt. The search for the stiffest direction starts at the direction of
        `x`.
        """
        zero = jnp.zeros((), x.dtype)
        return Fit(
            jnp.zeros_like(x),
            jnp.zeros_like(x),
            zero,
            zero,
            _unit(x, jnp.ones_like(x) / x.size**0.5),
        )

    def __call__(self, key: Array, t: Array, x: Array, state: Fit) -> tuple[Estimate, Fit]:
        view = self._view(t, x)
        if self.remainder is None:
            return Estimate(
                view.denoised(state.natural, state.precision), log_h=self._log_h(t, x)
            ), state
        refine = lambda fit, key: (self._refine(view, fit, key), None)
        state, _ = jax.lax.scan(refine, state, jax.random.split(key, self.iterations))
        return Estimate(view.denoised(state.natural, state.precision)), state

    def _view(self, t: Array, x: Array) -> View:
        interpolant = self.model.interpolant
        snr = interpolant.snr(t) + self.scale * self.precision
        natural = interpolant.alpha(t) / interpolant.sigma(t) ** 2 * x + self.scale * self.natural
        return View(self.model, snr, natural)

    def _refine(self, view: View, fit: Fit, key: Array) -> Fit:
        """The fit after one iteration: draw from the posterior of the fit, expand the reward there,
        and move toward the conjugate reward of that expansion, as far as is stable and within reach
        of the draws.
        """
        key_draws, key_probe = jax.random.split(key)
        posterior = self._posterior(view, fit, key_probe)
        draws = self._draws(view, fit, posterior, key_draws)
        expansion = expand(self._gradient, posterior, draws, fit.stiff)
        new = average(fit, curvature(posterior, draws, expansion), draws.spread, self.smoothing)
        new = keep_precision(new, fit, posterior)
        gain = self._gain(view, new, posterior)
        fraction = damping_fraction(fit, gain * (stiffness(fit, draws, expansion) - new.precision))
        fraction = jnp.minimum(fraction, trust_fraction(fit, new, posterior, expansion))
        return move(new, fraction, posterior, expansion)

    def _posterior(self, view: View, fit: Fit, key: Array) -> Gaussian:
        """`N(z, v I)`, the approximation of the posterior under the tilt of the fit."""
        denoised = lambda a: view.denoised(a, fit.precision)
        if isinstance(self.variance, Probe):
            return self.variance.posterior(key, denoised, fit.natural)
        return Gaussian(denoised(fit.natural), self.variance(view.snr + fit.precision))

    def _gain(self, view: View, fit: Fit, posterior: Gaussian) -> Array:
        """`dz / da`: the variance at the precision of the fit. With `Probe` it is the variance of
        the posterior before this iteration.
        """
        if isinstance(self.variance, Probe):
            return posterior.variance
        return self.variance(view.snr + fit.precision)

    def _draws(self, view: View, fit: Fit, posterior: Gaussian, key: Array) -> Draws:
        """Half the draws: `sqrt(v) eps`, or the changes of the denoiser for a change
        `eps / sqrt(v)` of the natural parameter.
        """
        x = posterior.mean
        normal = jax.random.normal(key, (self.draws // 2, *x.shape), x.dtype)
        if not self.anisotropic:
            return Draws(posterior.width * normal, jnp.asarray(x.size, x.dtype))
        shifted = lambda e: view.denoised(fit.natural + e / posterior.width, fit.precision)
        w = jax.vmap(lambda e: shifted(e) - x)(normal)
        return Draws(w, jnp.sum(w**2) / (posterior.variance * len(w)))

    def _gradient(self, x1: Array) -> Array:
        """The gradient of the terms that are fitted."""
        remainder: Any = self.remainder
        return jax.grad(lambda x1: self.scale * rewards.value(remainder, x1))(x1)

    def _log_h(self, t: Array, x: Array) -> Array | None:
        """`log h` of a conjugate reward if it has a closed form, else `None`."""
        if not isinstance(self.model, Analytic):
            return None
        log_h = self.model.posterior(t, x).log_mean_exp(
            self.scale * self.natural, self.scale * self.precision
        )
        return log_h + self.log_tilt(jnp.zeros_like(x))  # the reward's constant

    def log_tilt(self, x1: Array) -> Array:
        return self.scale * rewards.value(self.reward, x1)


def expand(gradient: Callable, posterior: Gaussian, draws: Draws, stiff: Array) -> Expansion:
    """The expansion of a reward from two gradients per draw and two gradients along `stiff`."""
    z, along = posterior.mean, posterior.width * stiff
    ahead = jax.vmap(lambda w: gradient(z + w))(draws.w)
    behind = jax.vmap(lambda w: gradient(z - w))(draws.w)
    bent_stiff = (gradient(z - along) - gradient(z + along)) / (2 * posterior.width)
    return Expansion(jnp.mean(ahead + behind, axis=0) / 2, (behind - ahead) / 2, bent_stiff)


def curvature(posterior: Gaussian, draws: Draws, expansion: Expansion) -> Array:
    """`E<w, C w> / v`. The `c` of the fit is this value divided by the spread."""
    return jnp.sum(draws.w * expansion.bent) / (posterior.variance * len(draws.w))


def stiffness(fit: Fit, draws: Draws, expansion: Expansion) -> Array:
    """The largest curvature found: along `fit.stiff`, or in the direction of a draw."""
    along_stiff = jnp.sum(fit.stiff * expansion.bent_stiff)
    return jnp.maximum(along_stiff, jnp.max(jax.vmap(_steepness)(draws.w, expansion.bent)))


def average(fit: Fit, fitted: Array, spread: Array, smoothing: Array) -> Fit:
    """The fit with new sums, which have weight `1 - smoothing`."""
    mix = lambda old, new: smoothing * old + (1 - smoothing) * new
    return fit._replace(fitted=mix(fit.fitted, fitted), spread=mix(fit.spread, spread))


def keep_precision(new: Fit, fit: Fit, posterior: Gaussian) -> Fit:
    """The new fit with a lower bound on `c`: `c` may rise at once, but falls by at most
    `(1 - 1 / widening^2) / v`.

    A Gaussian of precision `1 / v` that loses this much precision has `1 / (widening^2 v)` left, so
    its width grows by the factor `widening`. Draws beyond a kink contain no information about its
    curvature. Without this bound, the fit would lose the kink in one iteration.
    """
    least = fit.precision - _LOST_PRECISION / posterior.variance
    return new._replace(fitted=jnp.maximum(new.fitted, least * new.spread))


def damping_fraction(fit: Fit, excess: Array) -> Array:
    """The fraction of a full move that is stable if the curvature exceeds `c` by `excess / v`.

    Then z responds to `a` with the gain v, and `a` to z with `-excess / v`, so a move by the
    fraction f multiplies the error by `1 - f (1 + excess)`. The full move diverges for an excess
    above 1, and `f = 1 / (1 + excess)` removes the error in one iteration. The first fit is taken
    in full, because there is no earlier fit.
    """
    return jnp.where(fit.spread > 0, 1 / (1 + jnp.maximum(excess, 0)), 1)


def trust_fraction(fit: Fit, new: Fit, posterior: Gaussian, expansion: Expansion) -> Array:
    """The fraction of a move that shifts the posterior mean by `widths * sqrt(v d)`.

    A Gaussian of precision `1 / v` and natural parameter `z / v` has the mean
    `(z / v + E[g] + c' z - a) / (1 / v + c' - c)` after the new conjugate reward
    `(E[g] + c' z, c')` replaces `(a, c)`. The draws evaluate the reward at distances of about
    `sqrt(v d)` from z, and their expansion is meaningless farther away.
    """
    z, variance, c = posterior.mean, posterior.variance, fit.precision
    shift = (expansion.slope - fit.natural + c * z) / (1 / variance + new.precision - c)
    return _WIDTHS * jnp.sqrt(variance * z.size) / jnp.maximum(_length(shift), 1e-30)


def move(fit: Fit, fraction: Array, posterior: Gaussian, expansion: Expansion) -> Fit:
    """The fit with its point moved by a fraction of the way to the posterior mean, and with its
    stiffest direction after one step of the power method.
    """
    toward = lambda old, new: old + fraction * (new - old)
    # With this shift, the power method converges to the most concave direction, not to the most
    # convex direction.
    bent = expansion.bent_stiff
    return fit._replace(
        point=toward(fit.point, posterior.mean),
        slope=toward(fit.slope, expansion.slope),
        stiff=_unit(bent + _length(bent) * fit.stiff, fit.stiff),
    )


def _steepness(w: Array, bent: Array) -> Array:
    """`|C w| / |w|` for `bent = C w`, an upper bound on the curvature along w; 0 along a convex
    direction, in which the fit needs no damping.
    """
    along = _length(w)
    ratio = _length(bent) / jnp.where(along > 0, along, 1)
    return jnp.where(_linalg.inner(w, bent) > 0, ratio, 0)


def _length(x: Array) -> Array:
    """`|x|`, with a gradient of zero at zero."""
    square = _linalg.inner(x, x)
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)


def _unit(x: Array, otherwise: Array) -> Array:
    """`x / |x|`, or `otherwise` where x vanishes."""
    length = _length(x)
    return jnp.where(length > 0, x / jnp.where(length > 0, length, 1), otherwise)


def _variance(value: Any, model: Model) -> Any:
    """`v(snr)` of `variance=`, as a module."""
    if value is None and isinstance(model, Analytic):
        return _variance_of(model, _checks.floating(model.stretch, "stretch"))
    choices = (
        "a function of the snr; a number, the variance of the data; calibrate(key, model), which "
        "measures it once; or Probe(), which estimates it at each state from a derivative"
    )
    if value is None:
        raise ValueError(
            "Conjugate needs variance=, the mean squared error of the denoiser of this network: "
            f"pass {choices}"
        )
    known = isinstance(value, Probe) or callable(value)
    if isinstance(value, bool | type) or (isinstance(value, eqx.Module) and not known):
        got = value.__name__ if isinstance(value, type) else type(value).__name__
        raise TypeError(f"variance must be {choices}; got {got}")
    if isinstance(value, eqx.Module):
        return value
    if callable(value):
        return _pytree.Function(value, "variance")
    return GaussianVariance(_checks.positive(value, "variance"))


def _check_concave(precision: Array, scale: Array) -> None:
    if not _checks.concrete((precision, scale)):
        return
    if (c := float(np.asarray(precision) * np.asarray(scale))) < 0:
        raise ValueError(
            f"the sum of the conjugate terms of this reward is convex (c = {c:g} < 0), and its "
            "tilt does not exist near t = 0: use PlugIn, or evaluate Tilted at times with "
            "snr_t + c > 0"
        )


class Toward(Guidance):
    """Guidance by a model that is already tilted; built by `toward`."""

    model: Denoiser
    tilted: Denoiser
    reward: rewards.Reward
    scale: Array

    def _call(self, **given: Any) -> str:
        return _repr.call(self, toward, **given)

    def __call__(self, key: Array, t: Array, x: Array, state: Any) -> tuple[Estimate, Any]:
        return Estimate(tilted=self.tilted.denoise(t, x), denoised=self.model.denoise(t, x)), state

    def log_tilt(self, x1: Array) -> Array:
        return self.scale * rewards.value(self.reward, x1)


def toward(
    model: Denoiser, tilted: Denoiser, reward: Callable, scale: float | Array = 1.0
) -> Toward:
    """The guidance of the base `model` by a tilted model (`Tilted`, or a reward-fine-tuned
    network).

    **Arguments:** `model`; `tilted`, with the same states and interpolant; `reward` and `scale`,
    which define the tilt.

    **Raises:** `ValueError` for models with different states or interpolants.
    """
    _checks.instance(model, Denoiser, "model", "toward(model, tilted, reward, scale)")
    _checks.instance(tilted, Denoiser, "tilted", "such as Tilted(model, reward, scale)")
    if model.shape != tilted.shape or not _pytree.same(model.corruption, tilted.corruption):
        raise ValueError(
            "the tilted model must have the states and the interpolant of the base model"
        )
    return Toward(model, tilted, rewards.as_reward(reward), _checks.nonnegative(scale, "scale"))
