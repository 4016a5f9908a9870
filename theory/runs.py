r"""The law of a guided sampler on a mixture after N steps, as points.

`discrete_law` is exact, but needs one Gaussian. The flow of `flow_law` holds on mixtures, but only
in the limit of small steps. This module follows points through the recursion that a sampler takes:
Heun's method from N(0, I) on the same grid, with the same start and the same last jump,

    x_0 = sigma z + alpha M(sigma z),    x' = x + (u - t) (b_t(x) + b_u(x + (u - t) b_t(x))) / 2,

where b is the velocity of a guided denoiser M. Each field below evaluates M at one state, with
fresh random numbers, from the closed posterior of the mixture:

| field | M | sampler |
|---|---|---|
| `Deterministic(denoiser)` | of `theory.push_forward` | `Tilted`, `dps`, `Laplace` |
| `PlugInDraws(k)` | `D + (sigma^2 / alpha) ∇ log mean exp(scale r(X_i))` | `PlugIn(Glass)` |
| `FlowMapEnd()` | `D + (2 sigma^2 / (alpha g^2)) scale ∇ r(X_{t,1})` | `fmrg` |
| `ConjugateFit()` | the mean under the tilt by a fitted conjugate reward | `Conjugate` |

A draw X_i of `Glass` is the end of an inner flow of N(0, I), and differs from an exact draw of
the posterior in its derivative by x: only the mean of the gradient agrees. Between modes the
gradient is zero for most draws and very large for few of them. These rare draws move mass between
modes, by an amount that depends on the number of steps, and no law of small steps contains it.

The starts are eight independent sets of quasi-random points. The spread over the sets, which
includes the draws, is the error.

**Selection.** The best of n independent draws has the weight `(i/M)^n - ((i-1)/M)^n` on the point
of rank i among M points. With Gumbel noise G, softmax-of-n is best-of-n for the noisy reward
`scale r + G` (Gumbel 1954).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from theory.push_forward import (
    GuidedDenoiser,
    PointLaw,
    mixture_points,
    normal_points,
)
from theory.tilts import is_quadratic, quadratic_form
from tiltjax import _checks, _pytree, grids, rewards, scales
from tiltjax.interpolants import Interpolant, or_linear
from tiltjax.mixtures import GaussianMixture, check_mixture

_FLOOR = 1e-3  # of a flow map: the ratio of noise to data, in units of the start, before its jump
_LEVELS, _SNR_RANGE = 48, (1e-7, 1e7)  # of the table of a denoiser's mean squared error
# Of `Conjugate`: its draws, its smoothing, and the limits of one move of its fit.
_DRAWS, _SMOOTHING, _LOST_PRECISION, _WIDTHS = 4, 0.3, 0.75, 2.0
_SORTED = 2**17  # noisy rewards that are sorted for softmax-of-n
POINTS = 256  # in each set


class Problem(NamedTuple):
    """The arguments that all fields share. `form` is the `QuadraticForm` of the reward or `None`,
    `conjugate` the `(a, c)` of its conjugate terms `<a, x> - c |x|^2 / 2`, `remainder` the sum of
    its other terms or `None`, and `log_variance` the logarithm of the mean squared error of the
    denoiser at `_LEVELS` levels.
    """

    prior: GaussianMixture
    reward: rewards.Reward
    interpolant: Interpolant
    form: Any
    conjugate: tuple[Array, Array]
    remainder: rewards.Reward | None
    log_variance: Array

    def denoise(self, t: Array, x: Array) -> Array:
        """`D_t(x)`."""
        return self.prior.denoise(self.interpolant.alpha(t), self.interpolant.sigma(t), x)

    def denoise_natural(self, precision: Array, natural: Array) -> Array:
        """`E[X_1]` given the likelihood `exp(<natural, X_1> - precision |X_1|^2 / 2)`."""
        alpha = jnp.sqrt(precision)
        return self.prior.denoise(alpha, jnp.ones_like(alpha), natural / alpha)

    def natural(self, t: Array, x: Array) -> Array:
        """The natural parameter of the state x."""
        return self.interpolant.alpha(t) / self.interpolant.sigma(t) ** 2 * x

    def variance(self, snr: Array) -> Array:
        """The mean squared error of the denoiser, per coordinate."""
        return jnp.exp(jnp.interp(jnp.log(snr), self._log_levels, self.log_variance))

    @property
    def _log_levels(self) -> Array:
        return jnp.asarray(_log_levels(), self.log_variance.dtype)


class Fit(NamedTuple):
    """The memory of `ConjugateFit`: a point z, the gradient there, running sums whose ratio is the
    curvature c, and a unit vector that tends to the most concave direction. The fitted reward is
    `<gradient + c z, x> - c |x|^2 / 2`.
    """

    point: Array
    slope: Array
    fitted: Array
    spread: Array
    stiff: Array

    @classmethod
    def none(cls, x: Array) -> "Fit":
        zero, nothing = jnp.zeros((), x.dtype), jnp.zeros_like(x)
        return cls(nothing, nothing, zero, zero, _unit(x, jnp.ones_like(x) / len(x) ** 0.5))

    @property
    def precision(self) -> Array:
        return jnp.maximum(self.fitted, 0) / jnp.where(self.spread > 0, self.spread, 1)

    @property
    def natural(self) -> Array:
        return self.slope + self.precision * self.point


class Guided(NamedTuple):
    """What a field returns: the denoiser M, the denoiser from which a run starts, and the memory of
    the field.
    """

    denoised: Array
    start: Array
    memory: Fit


class Field(eqx.Module):
    """A guided denoiser at one state, a function
    `(problem, strength, key, t, x, memory) -> Guided`.
    """

    def __call__(
        self, problem: Problem, strength: Array, key: Array, t: Array, x: Array, memory: Fit
    ) -> Guided:
        raise NotImplementedError


class Unguided(Field):
    """The denoiser of the prior."""

    def __call__(self, problem, strength, key, t, x, memory):
        denoised = problem.denoise(t, x)
        return Guided(denoised, denoised, memory)


class Deterministic(Field):
    """A guided denoiser of `theory.push_forward`, a function of the posterior."""

    denoiser: GuidedDenoiser = eqx.field(static=True)

    def __call__(self, problem, strength, key, t, x, memory):
        interpolant = problem.interpolant
        posterior = problem.prior.condition(interpolant.alpha(t), interpolant.sigma(t), x)
        denoised = self.denoiser(posterior, problem.reward, strength)
        return Guided(denoised, denoised, memory)


class PlugInDraws(Field):
    """Plug-in guidance with k fresh draws of `Glass`, flows of `inner_steps` steps."""

    k: int | Array
    inner_steps: int = eqx.field(static=True, default=20)

    def __call__(self, problem, strength, key, t, x, memory):
        base = problem.denoise(t, x)

        def tilt(x: Array, xi: Array) -> Array:
            return strength * problem.reward(self.draw(problem, xi, t, x))

        # A loop, so that one program serves any k: the largest tilt, and the sums of the weights
        # and of the weighted gradients, both relative to it.
        def add(i: Array, sums: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            most, total, weighted = sums
            xi = jax.random.normal(jax.random.fold_in(key, i), x.shape, x.dtype)
            value, gradient = jax.value_and_grad(tilt)(x, xi)
            new = jnp.maximum(most, value)
            old, weight = jnp.exp(most - new), jnp.exp(value - new)
            return new, old * total + weight, old * weighted + weight * gradient

        none = jnp.full((), -jnp.inf, x.dtype), jnp.zeros((), x.dtype), jnp.zeros_like(x)
        _, total, weighted = jax.lax.fori_loop(0, self.k, add, none)
        denoised = base + problem.interpolant.tweedie(t) * weighted / total
        return Guided(denoised, denoised, memory)

    def draw(self, problem: Problem, xi: Array, t: Array, x: Array) -> Array:
        """The end of the inner flow from the noise xi, along `Z_s = s X_1 + (1 - s) width xi`."""
        precision, natural = problem.interpolant.snr(t), problem.natural(t, x)
        width = 1 / jnp.sqrt(precision + problem.interpolant.data_scale() ** -2)
        s = jnp.arange(self.inner_steps, dtype=x.dtype) / self.inner_steps
        fraction = 1 / (self.inner_steps * (1 - s))  # of the way to the denoiser, in one step

        def step(z: Array, at: tuple[Array, Array]) -> tuple[Array, None]:
            s, fraction = at
            noise = ((1 - s) * width) ** 2
            denoised = problem.denoise_natural(precision + s**2 / noise, natural + s / noise * z)
            return z + fraction * (denoised - z), None

        return jax.lax.scan(step, width * xi, (s, fraction))[0]


class FlowMapEnd(Field):
    """Flow-map reward guidance with an inner flow of `inner_steps` steps of Heun's method."""

    inner_steps: int = eqx.field(static=True, default=20)

    def __call__(self, problem, strength, key, t, x, memory):
        interpolant, base = problem.interpolant, problem.denoise(t, x)
        gradient = jax.grad(lambda x: problem.reward(self.end(problem, t, x)))(x)
        factor = strength * interpolant.tweedie(t) * 2 / interpolant.diffusion(t)
        return Guided(base + factor * gradient, base, memory)

    def end(self, problem: Problem, t: Array, x: Array) -> Array:
        """The end of the unguided flow from x, in `u = x / sigma` and `kappa = alpha / sigma`."""
        interpolant, one = problem.interpolant, jnp.ones_like(t)
        kappa = interpolant.alpha(t) / interpolant.sigma(t)
        last = 1 / (_FLOOR * interpolant.data_scale())
        j = jnp.arange(self.inner_steps + 1, dtype=x.dtype) / self.inner_steps
        kappas = kappa * jnp.maximum(last / kappa, 1) ** j
        denoise = lambda kappa, u: problem.prior.denoise(kappa, one, u)

        def step(carry: tuple[Array, Array], interval: tuple[Array, Array]) -> tuple[tuple, None]:
            (u, base), (kappa, after) = carry, interval
            moved = u + (after - kappa) * base
            ahead = denoise(after, moved)
            moved = moved + (after - kappa) / 2 * (ahead - base)
            return (moved, denoise(after, moved)), None

        start = x / interpolant.sigma(t), problem.denoise(t, x)
        return jax.lax.scan(step, start, (kappas[:-1], kappas[1:]))[0][1]


class ConjugateFit(Field):
    """Variational conjugate tilting with its default settings.

    The fit of the last step is a part of the state, so the law is one of complete runs. In the
    limit of small steps no law of one flow exists: where the fit has several solutions, a run
    follows the solution that its start reached, until the noise of its four draws carries it to
    another. The rate of such changes is per step, not per time.
    """

    def __call__(self, problem, strength, key, t, x, memory):
        a, c = problem.conjugate
        natural = problem.natural(t, x) + strength * a
        snr = problem.interpolant.snr(t) + strength * c
        denoised = lambda fit: problem.denoise_natural(snr + fit.precision, natural + fit.natural)
        fit = memory
        if problem.remainder is not None:
            gradient = jax.grad(lambda x, reward=problem.remainder: strength * reward(x))
            fit = self.refine(problem, gradient, key, snr, denoised(memory), memory)
        moved = denoised(fit)
        return Guided(moved, moved, fit)

    def refine(
        self, problem: Problem, slope_at: Callable, key: Array, snr: Array, z: Array, fit: Fit
    ) -> Fit:
        """The fit after one iteration from the denoiser z of the last fit, for a reward with the
        gradient `slope_at`.
        """
        c, variance = fit.precision, problem.variance(snr + fit.precision)
        bent_along = lambda w: (slope_at(z - w) - slope_at(z + w)) / 2  # curvature times w
        w = jnp.sqrt(variance) * jax.random.normal(key, (_DRAWS // 2, len(z)), z.dtype)
        slope = jnp.mean(jax.vmap(lambda w: slope_at(z + w) + slope_at(z - w))(w), axis=0) / 2
        bent = jax.vmap(bent_along)(w)
        bent_stiff = bent_along(jnp.sqrt(variance) * fit.stiff) / jnp.sqrt(variance)
        mix = lambda old, new: _SMOOTHING * old + (1 - _SMOOTHING) * new
        spread = mix(fit.spread, jnp.asarray(len(z), z.dtype))
        fitted = mix(fit.fitted, jnp.sum(w * bent) / (variance * len(w)))
        fitted = jnp.maximum(fitted, (c - _LOST_PRECISION / variance) * spread)
        new = fit._replace(fitted=fitted, spread=spread)
        # As far as is stable, and as the draws reach.
        stiffness = jnp.maximum(fit.stiff @ bent_stiff, jnp.max(jax.vmap(_steepness)(w, bent)))
        excess = problem.variance(snr + new.precision) * (stiffness - new.precision)
        stable = jnp.where(fit.spread > 0, 1 / (1 + jnp.maximum(excess, 0)), 1)
        shift = (slope - fit.natural + c * z) / (1 / variance + new.precision - c)
        reach = _WIDTHS * jnp.sqrt(variance * len(z)) / jnp.maximum(_length(shift), 1e-30)
        toward = lambda old, ahead: old + jnp.minimum(stable, reach) * (ahead - old)
        return new._replace(
            point=toward(fit.point, z),
            slope=toward(fit.slope, slope),
            stiff=_unit(bent_stiff + _length(bent_stiff) * fit.stiff, fit.stiff),
        )


def _steepness(w: Array, bent: Array) -> Array:
    """The curvature along w at most, `|C w| / |w|` for `bent = C w`; 0 in a convex direction."""
    return jnp.where(w @ bent > 0, _length(bent) / _length(w), 0)


def _length(x: Array) -> Array:
    """`|x|`, with a gradient of zero at zero."""
    square = x @ x
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)


def _unit(x: Array, otherwise: Array) -> Array:
    """`x / |x|`, or `otherwise` where x vanishes."""
    length = _length(x)
    return jnp.where(length > 0, x / jnp.where(length > 0, length, 1), otherwise)


def run_law(
    prior: GaussianMixture,
    reward: Callable,
    scale: float | Array | scales.Scale,
    field: Field,
    *,
    steps: int | None = None,
    times: Array | None = None,
    interpolant: Interpolant | None = None,
    num: int = POINTS,
    seed: int = 0,
) -> PointLaw:
    """The law of the samples of `tiltjax.sample` with Heun's method after N steps, as points.

    **Arguments:** `prior`, covariances may be singular; `reward`, differentiable, and quadratic for
    the denoisers that need it; `scale`, a number or `Damped`; `field`, the
    guidance; `steps` or `times`, as in `tiltjax.sample`; `num`, a power of two, the number of
    points in each of the eight sets; `seed`, of the draws.

    **Raises:** `ValueError` for a scale law that does not depend on time alone.
    """
    check_field(field)
    law = time_law(scale)
    dtype, interpolant = prior.means.dtype, or_linear(interpolant)
    problem = problem_of(prior, reward, interpolant)
    times = run_times(prior, interpolant, steps, times)
    start = jnp.asarray(normal_points(_checks.count(num, "num"), prior.dim), dtype)
    key, law = jax.random.key(seed), _pytree.cast(law, dtype)
    ends = ends_of(problem, (field,), 0, law, times, len(times) - 1, start, key)
    return PointLaw(prior, ends)


def check_field(field: Field) -> None:
    """**Raises:** `TypeError` for anything else."""
    _checks.instance(field, Field, "field", "such as PlugInDraws(k=1)")


def time_law(scale: float | Array | scales.Scale) -> scales.Scale:
    """The scale as a function of time. **Raises:** `ValueError` for one that needs a state."""
    law = scales.as_scale(scale)
    if not isinstance(law, scales.Constant | scales.Damped):
        raise ValueError(f"the scale must be a number or Damped, got {type(law).__name__}")
    return law


def run_times(
    prior: GaussianMixture, interpolant: Interpolant, steps: int | None, times: Array | None
) -> Array:
    """The times of a run, `(steps + 1,)`, as in `tiltjax.sample`."""
    dtype = prior.means.dtype
    if times is None:
        times = grids.of_width(interpolant, prior.width, _checks.count(steps, "steps"), dtype)
    return grids.time_grid(times, None).astype(dtype)


def problem_of(prior: GaussianMixture, reward: Callable, interpolant: Interpolant) -> Problem:
    """The part of a law that does not depend on the field."""
    check_mixture(prior, "prior")
    dtype = prior.means.dtype
    reward = _pytree.cast(rewards.as_reward(reward), dtype)
    form = quadratic_form(reward, prior.dim) if is_quadratic(reward) else None
    nothing = jnp.zeros(prior.dim, dtype), jnp.zeros((), dtype)
    a, c, remainder = rewards.split_conjugate(reward, nothing)
    parts = _pytree.cast((prior, reward, interpolant, form, (a, c), remainder), dtype)
    noise = jnp.asarray(normal_points(32, 2 * prior.dim + 1)[..., prior.dim + 1 :], dtype)
    return Problem(*parts, _log_variance(parts[0], mixture_points(prior, 32), noise))


@eqx.filter_jit
def _log_variance(prior: GaussianMixture, data: Array, noise: Array) -> Array:
    prior = prior.decomposed()
    data, noise = (points.reshape(-1, prior.dim) for points in (data, noise))

    def log_variance(log_snr: Array) -> Array:
        sigma = jnp.exp(-log_snr / 2)
        posterior = lambda x: prior.condition(jnp.ones_like(sigma), sigma, x).cov()
        covs = jax.vmap(posterior)(data + sigma * noise)
        return jnp.log(jnp.mean(jnp.trace(covs, axis1=1, axis2=2)) / prior.dim)

    levels = jnp.asarray(_log_levels(), prior.means.dtype)
    return jax.lax.map(log_variance, levels)


def _log_levels() -> np.ndarray:
    low, high = np.log(_SNR_RANGE)
    return np.linspace(low, high, _LEVELS)


@eqx.filter_jit
def ends_of(
    problem: Problem,
    fields: tuple[Field, ...],
    index: int | Array,
    law: scales.Scale,
    times: Array,
    last: int | Array,
    start: Array,
    key: Array,
) -> Array:
    """The ends `(8, n, d)` of the runs with the field of this index from `start`, `(8, n, d)`, on
    the grid `times` up to its entry `last`.
    """
    problem = problem._replace(prior=problem.prior.decomposed())
    snr = problem.interpolant.snr
    x = problem.interpolant.sigma(times[0]) * start.reshape(-1, start.shape[-1])

    def step(i: Array, state: tuple[Array, Fit]) -> tuple[Array, Fit]:
        interval = jnp.stack([times[jnp.maximum(i - 1, 0)], times[i]])
        # At t = 1 no field is evaluated.
        strengths = jax.vmap(lambda t: law(key, snr(jnp.where(t < 1, t, times[0])), t, t))(interval)
        keys = jax.random.split(jax.random.fold_in(key, i))
        return _step(problem, fields, index, *state, i == 0, keys, interval, strengths)

    ends, _ = jax.lax.fori_loop(0, last + 1, step, (x, jax.vmap(Fit.none)(x)))
    return ends.reshape(start.shape)


def _step(
    problem: Problem,
    fields: tuple[Field, ...],
    index: int | Array,
    x: Array,
    memory: Fit,
    is_start: Array,
    keys: Array,
    times: Array,
    strengths: Array,
) -> tuple[Array, Fit]:
    """All states after one step of Heun's method, the mean of x and of the end of two Euler steps.
    The first step has length zero and makes the first state from noise.
    """
    t, u = times

    def euler(carry: tuple, stage: tuple) -> tuple[tuple, None]:
        key, s, strength = stage

        def move(x: Array, memory: Fit, _: Array) -> tuple[Array, Fit, Array]:
            found = evaluate(problem, fields, index, strength, key, s, x, memory)
            moved = problem.interpolant.advance(s, t, u, x, found.denoised)
            return jnp.where(u < 1, moved, found.denoised), found.memory, found.start

        return jax.lax.cond(s < 1, move, lambda *carry: carry, *carry), None

    (beyond, after, first), _ = jax.lax.scan(euler, (x, memory, x), (keys, times, strengths))
    moved = jnp.where(u < 1, (x + beyond) / 2, beyond)
    started = x + problem.interpolant.alpha(t) * first
    pick = lambda start, step: jnp.where(is_start, start, step)
    return jax.tree.map(pick, (started, memory), (moved, after))


def evaluate(
    problem: Problem,
    fields: tuple[Field, ...],
    index: int | Array,
    strength: Array,
    key: Array,
    t: Array,
    x: Array,
    memory: Fit,
) -> Guided:
    """The field of this index at all states `(n, d)`, each with its own random numbers."""
    keys = jax.random.split(key, len(x))

    def all_states(field: Field) -> Callable:
        one = lambda key, x, memory: field(problem, strength, key, t, x, memory)
        return jax.vmap(one)

    return jax.lax.switch(index, [all_states(field) for field in fields], keys, x, memory)


def selected_law(
    law: PointLaw,
    reward: Callable,
    n: int,
    scale: float | Array | None = None,
    *,
    num: int = POINTS,
    seed: int = 0,
) -> PointLaw:
    """The law of the best of n independent draws of `law`; with `scale`, of one of n draws chosen
    with probability proportional to `exp(scale * r)`.

    The points should be many more than n: with M points, the result is as good as one of
    about `2 M / n` independent draws. `num` is the number of points of the result in each set.
    """
    n, num = _checks.count(n, "n"), _checks.count(num, "num")
    values = np.asarray(_values(rewards.as_reward(reward), law.points), np.float64)
    rng = np.random.default_rng(seed)
    if scale is None:
        weights = _best_of(values.reshape(-1), n)
    else:
        tilts = float(_checks.nonnegative(scale, "scale")) * values
        weights = _softmax_of(tilts.reshape(-1), n, rng)
    return _thinned(law, weights, num, rng)


def weighted_law(
    law: PointLaw, log_weights: np.ndarray, n: int, *, num: int = POINTS, seed: int = 0
) -> PointLaw:
    """The law of one of n independent draws of `law`, chosen with probability proportional to its
    weight; `log_weights` are those of its points, `(8, m)`.
    """
    rng, points = np.random.default_rng(seed), np.asarray(law.points)
    # A run beyond the range of floating-point numbers has no weight.
    finite = np.isfinite(log_weights) & np.all(np.isfinite(points), axis=-1)
    log_weights = np.where(finite, np.asarray(log_weights, np.float64), -np.inf)
    law = PointLaw(law.prior, jnp.asarray(np.where(finite[..., None], points, 0.0)))
    return _thinned(law, _softmax_of(log_weights.reshape(-1), n, rng), num, rng)


def _softmax_of(tilts: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """The probability of each point to be chosen among n draws of the points, in proportion to
    `exp(tilts)`.
    """
    repeats = max(1, _SORTED // len(tilts))
    noise = (rng.gumbel(size=len(tilts)) for _ in range(repeats))
    return np.sum([_best_of(tilts + gumbel, n) for gumbel in noise], axis=0)


def _thinned(law: PointLaw, weights: np.ndarray, num: int, rng: np.random.Generator) -> PointLaw:
    """A law of `num` points in each set for weighted points."""
    points = np.asarray(law.points)
    chosen = [
        x[_systematic(x, w, num, rng.random())]
        for x, w in zip(points, np.reshape(weights, points.shape[:2]), strict=True)
    ]
    return PointLaw(law.prior, jnp.asarray(np.stack(chosen)))


@eqx.filter_jit
def _values(reward: rewards.Reward, points: Array) -> Array:
    reward = _pytree.cast(reward, points.dtype)
    return jax.vmap(jax.vmap(reward))(points)


def _best_of(values: np.ndarray, n: int) -> np.ndarray:
    """The probability of each point to be the best of n draws of the points; equal values share
    theirs.
    """
    order = np.argsort(values)
    ordered, weights = values[order], np.empty(len(values))
    low, high = (np.searchsorted(ordered, ordered, side=side) for side in ("left", "right"))
    weights[order] = ((high / len(values)) ** n - (low / len(values)) ** n) / (high - low)
    return weights


def _systematic(x: np.ndarray, weights: np.ndarray, num: int, offset: float) -> np.ndarray:
    """The indices of `num` points, each as often as its weight says, up to one. The same holds for
    every cell of a tree of the points, so that the masses of modes are right, too.
    """
    from scipy.spatial import KDTree
    from scipy.stats import qmc

    order = KDTree(x).indices
    edges = np.cumsum(weights[order])
    places = (np.arange(num) + offset) / num * edges[-1]
    chosen = order[np.minimum(np.searchsorted(edges, places), len(order) - 1)]
    # In an order in which the first points are a selection, too.
    spread = qmc.Halton(1, scramble=False).random(num)[:, 0]
    return chosen[np.argsort(np.argsort(spread))]
