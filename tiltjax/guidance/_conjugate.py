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
stiffest direction, and the fit moves by the fraction that stops the loop (`damping_fraction`). In
one iteration it moves no further than two widths of the posterior, as far as its draws reach
(`trust_fraction`), and widens by a factor of no more than two (`keep_precision`).

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

from tiltjax import _checks, _linalg, _pytree, _repr, rewards, scales
from tiltjax.guidance._base import Estimate, Guidance
from tiltjax.mixtures import decomposed
from tiltjax.models import Analytic, Denoiser, Model

_SNR_RANGE, _LEVELS = (1e-7, 1e7), 48  # of a table of the variance: over the noise's own variance
# The safeguards of one iteration of the fit; `keep_precision` and `trust_fraction` derive them.
_WIDENING = 2.0  # how much wider the fitted posterior may become
_LOST_PRECISION = 1 - _WIDENING**-2  # the fraction of its precision that this costs
_WIDTHS = 2.0  # how many of its widths its mean may move


class Variance(_repr.Printable):
    """A table of the denoiser's mean squared error a coordinate,
    `v(snr) = E|X_1 - D_t(X_t)|^2 / d`; built by `calibrate`.

    Linear in the logarithms between its entries; NaN outside their range, which a run reports.
    """

    log_snr: Array
    log_variance: Array

    def _call(self, **given: Any) -> str:
        return f"Variance of {self.log_snr.shape[-1]} levels"

    def __call__(self, snr: Array) -> Array:
        return jnp.exp(
            jnp.interp(jnp.log(snr), self.log_snr, self.log_variance, left=jnp.nan, right=jnp.nan)
        )


def log_snr_levels(model: Model, levels: int) -> Array:
    """The entries of a table: evenly spaced, as far as the model's network was trained."""
    base = model.interpolant.sigma(jnp.zeros((), model.dtype))
    widest = jnp.asarray(_SNR_RANGE, model.dtype) / base**2
    # A network that is evaluated `ahead` of the model's snr reaches the ends of its range early.
    network, ahead = model.network_query()
    lowest, highest = (end.astype(model.dtype) - ahead for end in network.snr_range())
    first, last = jnp.log(jnp.maximum(widest[0], lowest)), jnp.log(jnp.minimum(widest[1], highest))
    return jnp.linspace(first, last, levels)


@eqx.filter_jit
def _variance_of(model: Analytic) -> Variance:
    """The table of a mixture, without a network."""
    model = decomposed(_pytree.cast(model, model.dtype))
    log_snr = log_snr_levels(model, _LEVELS)
    return Variance(
        log_snr, jnp.log(jax.lax.map(lambda q: model.posterior_variance(jnp.exp(q)), log_snr))
    )


class GaussianVariance(_repr.Printable):
    """`v(snr) = s^2 / (1 + s^2 snr)`: that of data `N(mu, s^2 I)`, for `variance=s^2`."""

    data_variance: Array

    def _call(self, **given: Any) -> str:
        return _repr.form(self.data_variance)

    def __call__(self, snr: Array) -> Array:
        return scales.gaussian_variance(jnp.sqrt(self.data_variance), snr)


class Gaussian(NamedTuple):
    """`N(mean, variance I)`, which stands for the tilted posterior of `X_1`."""

    mean: Array
    variance: Array

    @property
    def width(self) -> Array:
        return jnp.sqrt(self.variance)


class Probe(_repr.Printable):
    """`variance=Probe()`: the tilted posterior's variance at each state by Tweedie's identity,
    `v = tr(∂D/∂eta) / d`, from one Hutchinson probe. No calibration and no average over states, but
    one pullback through the denoiser each iteration.
    """

    def posterior(self, key: Array, denoised: Callable, natural: Array) -> Gaussian:
        """`N(z, v I)` of a denoiser as a function of the natural parameter."""
        z, slope = _linalg.hutchinson(key, denoised, natural)
        # The floor: the Jacobian of a learned denoiser may have a negative trace, but a variance
        # is positive. The least positive number keeps `1 / v` finite.
        return Gaussian(z, jnp.maximum(slope, jnp.finfo(natural.dtype).tiny))


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
        """`c`: 0 before the first draws, and for a convex reward, fitted by a linear one."""
        ratio = self.fitted / jnp.where(self.spread > 0, self.spread, 1)
        return jnp.where(self.spread > 0, jnp.maximum(ratio, 0), 0)

    @property
    def natural(self) -> Array:
        """`a`."""
        return self.slope + self.precision * self.point


class View(NamedTuple):
    """What a state says of `X_1`: the model's posterior given `X_t = x`, tilted by the conjugate
    terms of the reward, as a view of precision `snr` and natural parameter `natural`.
    """

    model: Model
    snr: Array
    natural: Array

    def denoised(self, a: Array, c: Array) -> Array:
        """The posterior mean under one more tilt, by `<a, x> - c |x|^2 / 2`."""
        return self.model.denoise(*self.model.interpolant.observe(self.snr + c, self.natural + a))


class Draws(NamedTuple):
    """Displacements `w` `(n, *shape)` from the posterior's mean, each of them taken both ways; and
    `spread`, the mean of `|w|^2` in units of the variance.
    """

    w: Array
    spread: Array


class Expansion(NamedTuple):
    """The scaled reward about a posterior, from its gradients g at the draws; -C is its Hessian.

    - `slope`: `E[g]`.
    - `bent`: `C w` of each draw.
    - `bent_stiff`: `C u` of the unit vector u that `Fit.stiff` is.
    """

    slope: Array
    bent: Array
    bent_stiff: Array


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
    - `variance`: `v(snr)`, the denoiser's mean squared error a coordinate. One of: any function of
      the snr; a number, the variance `s^2` of the data, for `v(snr) = s^2 / (1 + s^2 snr)`, exact
      for one isotropic Gaussian; `calibrate(key, model)`, measured; `Probe()`, estimated at each
      state by a derivative. An `Analytic` model alone needs none: its own is computed here.
    - `anisotropic`: draw along the responses of the denoiser, for rewards and posteriors of
      different widths in different directions.

    The network is called at `snr_t + c`: on a path with a cleanest level (`DiscreteVP`) end the
    grid where that is still inside and jump, `times=[..., 1.0]`. Beyond the table `v` is NaN, which
    a run reports.

    `log_h` is exact for a conjugate reward on an `Analytic` model, and otherwise `None`: to weigh
    particles, use this as a proposal beside another twist.

    **Raises:** `ValueError` for conjugate terms that are convex together, an odd number of draws, a
    `smoothing` outside [0, 1), a network without `variance`, a number that is not positive.
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
        _check_concave(self.precision, self.scale)
        needed = self.remainder is not None
        self.variance = _variance(variance, model) if needed or variance is not None else None

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
        """One iteration: draw from the posterior of the fit, expand the reward there, and move
        toward the conjugate reward of that expansion, as far as is stable and was seen.
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
        """`N(z, v I)` for the posterior that the fit tilts."""
        denoised = lambda a: view.denoised(a, fit.precision)
        if isinstance(self.variance, Probe):
            return self.variance.posterior(key, denoised, fit.natural)
        return Gaussian(denoised(fit.natural), self.variance(view.snr + fit.precision))

    def _gain(self, view: View, fit: Fit, posterior: Gaussian) -> Array:
        """`dz / da`, the variance at the precision of the fit; a probe's is that of the posterior
        before.
        """
        if isinstance(self.variance, Probe):
            return posterior.variance
        return self.variance(view.snr + fit.precision)

    def _draws(self, view: View, fit: Fit, posterior: Gaussian, key: Array) -> Draws:
        """Half the draws, `sqrt(v) eps`, or the responses of the denoiser to `eps / sqrt(v)`."""
        x = posterior.mean
        normal = jax.random.normal(key, (self.draws // 2, *x.shape), x.dtype)
        if not self.anisotropic:
            return Draws(posterior.width * normal, jnp.asarray(x.size, x.dtype))
        shifted = lambda e: view.denoised(fit.natural + e / posterior.width, fit.precision)
        w = jax.vmap(lambda e: shifted(e) - x)(normal)
        return Draws(w, jnp.sum(w**2) / (posterior.variance * len(w)))

    def _gradient(self, x1: Array) -> Array:
        """That of the terms that are fitted."""
        remainder: Any = self.remainder
        return jax.grad(lambda x1: self.scale * rewards.value(remainder, x1))(x1)

    def _log_h(self, t: Array, x: Array) -> Array | None:
        """`log h` of a conjugate reward, where it has a closed form."""
        if not isinstance(self.model, Analytic):
            return None
        log_h = self.model.posterior(t, x).log_mean_exp(
            self.scale * self.natural, self.scale * self.precision
        )
        return log_h + self.log_tilt(jnp.zeros_like(x))  # the reward's constant

    def log_tilt(self, x1: Array) -> Array:
        return self.scale * rewards.value(self.reward, x1)


def expand(gradient: Callable, posterior: Gaussian, draws: Draws, stiff: Array) -> Expansion:
    """The expansion of a reward by two gradients a draw, and two along `stiff`."""
    z, along = posterior.mean, posterior.width * stiff
    ahead = jax.vmap(lambda w: gradient(z + w))(draws.w)
    behind = jax.vmap(lambda w: gradient(z - w))(draws.w)
    bent_stiff = (gradient(z - along) - gradient(z + along)) / (2 * posterior.width)
    return Expansion(jnp.mean(ahead + behind, axis=0) / 2, (behind - ahead) / 2, bent_stiff)


def curvature(posterior: Gaussian, draws: Draws, expansion: Expansion) -> Array:
    """`E<w, C w> / v`: `c` of the fit is this over the spread."""
    return jnp.sum(draws.w * expansion.bent) / (posterior.variance * len(draws.w))


def stiffness(fit: Fit, draws: Draws, expansion: Expansion) -> Array:
    """The largest curvature that was seen: along `fit.stiff`, or in the direction of a draw."""
    along_stiff = jnp.sum(fit.stiff * expansion.bent_stiff)
    return jnp.maximum(along_stiff, jnp.max(jax.vmap(_steepness)(draws.w, expansion.bent)))


def average(fit: Fit, fitted: Array, spread: Array, smoothing: Array) -> Fit:
    """The fit with new sums, of weight `1 - smoothing`."""
    mix = lambda old, new: smoothing * old + (1 - smoothing) * new
    return fit._replace(fitted=mix(fit.fitted, fitted), spread=mix(fit.spread, spread))


def keep_precision(new: Fit, fit: Fit, posterior: Gaussian) -> Fit:
    """Lost precision: `c` may rise at once, and falls by at most `(1 - 1 / widening^2) / v`.

    A Gaussian of precision `1 / v` that loses this much has `1 / (widening^2 v)` left: its width
    grows by the factor `widening`. Draws that have jumped over a kink see none of its curvature,
    and without this bound the fit would forget the kink in one iteration.
    """
    least = fit.precision - _LOST_PRECISION / posterior.variance
    return new._replace(fitted=jnp.maximum(new.fitted, least * new.spread))


def damping_fraction(fit: Fit, excess: Array) -> Array:
    """Fraction: how far to move where the curvature exceeds `c` by `excess / v`.

    There z answers to `a` with the gain v, and `a` to z with `-excess / v`, so that a move by the
    fraction f multiplies the error by `1 - f (1 + excess)`. The whole move diverges from an excess
    of 1 on, and `f = 1 / (1 + excess)` ends the error in one iteration. The first fit is taken
    whole, as there is none before it to move from.
    """
    return jnp.where(fit.spread > 0, 1 / (1 + jnp.maximum(excess, 0)), 1)


def trust_fraction(fit: Fit, new: Fit, posterior: Gaussian, expansion: Expansion) -> Array:
    """Widths: the fraction of a move that takes the posterior's mean `widths * sqrt(v d)` far.

    A Gaussian of precision `1 / v` and natural parameter `z / v` has the mean
    `(z / v + E[g] + c' z - a) / (1 / v + c' - c)` once the new conjugate reward
    `(E[g] + c' z, c')` replaces `(a, c)`. The draws have seen the reward about `sqrt(v d)` from z,
    and further away their expansion means nothing.
    """
    z, variance, c = posterior.mean, posterior.variance, fit.precision
    shift = (expansion.slope - fit.natural + c * z) / (1 / variance + new.precision - c)
    return _WIDTHS * jnp.sqrt(variance * z.size) / jnp.maximum(_length(shift), 1e-30)


def move(fit: Fit, fraction: Array, posterior: Gaussian, expansion: Expansion) -> Fit:
    """The fit expanded a fraction of the way from its point to the posterior's mean, and its
    stiffest direction turned by one step of the power method.
    """
    toward = lambda old, new: old + fraction * (new - old)
    # The shift of the power method makes the most concave direction the dominant one, not the most
    # convex.
    bent = expansion.bent_stiff
    return fit._replace(
        point=toward(fit.point, posterior.mean),
        slope=toward(fit.slope, expansion.slope),
        stiff=_unit(bent + _length(bent) * fit.stiff, fit.stiff),
    )


def _steepness(w: Array, bent: Array) -> Array:
    """`|C w| / |w|` for `bent = C w`, at least the curvature along w; 0 along a convex direction,
    which needs no restraint.
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
        return _variance_of(model)
    choices = (
        "a function of the snr, or the data's variance as a number; calibrate(key, model), which "
        "measures it once; or Probe(), which estimates it at each state by a derivative"
    )
    if value is None:
        raise ValueError(
            "Conjugate needs variance=, the mean squared error of this network's denoiser: "
            f"{choices}"
        )
    known = isinstance(value, Probe) or callable(value)
    if isinstance(value, bool | type) or (isinstance(value, eqx.Module) and not known):
        got = value.__name__ if isinstance(value, type) else type(value).__name__
        raise TypeError(f"variance must be one of these: {choices}; got {got}")
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
            f"the conjugate terms of this reward are convex together (c = {c:g} < 0): at the noise "
            "end their tilt does not exist. Tilted can be evaluated where snr_t + c > 0; PlugIn "
            "guides from the start"
        )


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

    def _call(self, **given: Any) -> str:
        return _repr.call(self, toward, **given)

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
