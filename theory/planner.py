r"""Which method is predicted to land closest to the tilt within a number of denoiser calls.

**Cost.** A sample that takes n steps of Heun's method evaluates its field `2 n - 1` times. One
evaluation takes, in calls of the denoiser and in pullbacks through it (`pullback` calls each):

| method | calls | pullbacks | |
|---|---|---|---|
| `Tilted` | 1 | | rewards whose tilt is conjugate |
| `Conjugate` | 2 | | any reward |
| `PlugIn(Glass(model, g), k)`, damped or not | `1 + k (g - 1)` | as many | any reward |
| `dps` | 1 | 1 | any reward |
| `fmrg`, g inner steps | `2 g + 2` | `2 g + 1` | any reward |
| `Laplace` | 1 | d | smooth rewards |
| `best_of_n`, `softmax_of_n` | n samples | | any reward |
| weighted paths of the damped diffusion | n paths of 25 steps, g each | as many | any reward |

**Error.** W2 to the tilt, of the law that a method is predicted to have *at this number of steps*:
`discrete_law` for one Gaussian and one draw; the law of small steps plus that of one draw's step
error for k > 1; `Selected.mixture` of what unguided sampling gives in these steps for selection;
and for n weighted paths of effective fraction e, of which one is drawn,
`KL <= log(1 + (1/e - 1)/n)` and so, for a Gaussian tilt of largest variance v and to leading order,
`W2 <= sqrt(2 v KL)` (Talagrand). Laws that are not Gaussian count by mean and covariance.

For a mixture every mode is treated alone, guided flows keep the prior's weights (see
`plug_in_law`), and W2 is its upper bound by mixtures of couplings (`w2_bounds`); `Laplace` and,
beyond conjugate rewards, `Conjugate` have no law there, and stand with what was measured on
mixtures in the plane, in units of the tilt's standard deviation: an order of magnitude.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from theory import finite_steps, flow_laws, path_weights, selection, tilts
from theory.distances import bures, w2_bounds
from theory.finite_steps import AffineField
from theory.many_draws import draws_moments
from theory.tilts import QuadraticForm
from tiltjax import _checks, _pytree, rewards, scales
from tiltjax.interpolants import Linear
from tiltjax.mixtures import GaussianMixture, check_mixture

# W2 beyond the floor over the tilt's standard deviation, root mean square over four mixtures
# (benchmarks/accuracy/gaussian_tilt.py: quadratic, noniso, unequal, uncentered) and, for
# anisotropic rewards, over two (benchmarks/rewards/any_reward.py: stiff between and across modes).
MEASURED = {"Laplace": 0.21, "Conjugate": 0.72}
_EXACT, _ALONE, _LIMIT = (
    "law at these steps",
    "each mode alone at these steps",
    "law of small steps",
)
_FIXED, _BOUND, _MEASURED = "fixed point at these steps", "leading order", "measured elsewhere"
_MAX_STEPS = 200
_SHIFTS = (
    finite_steps.shift_at_mean,
    finite_steps.shift_at_draw,
    finite_steps.exact_shift,
    finite_steps.shift_at_end,
)
_PATH_STEPS = 25  # of a weighted path
_COUNTS = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class Option(NamedTuple):
    """One way to spend the budget.

    - `method`: how to call it.
    - `steps`: of Heun's method (of `Ancestral` for weighted paths).
    - `cost`: of one sample, in denoiser calls.
    - `error`: the predicted W2 to the tilt.
    - `basis`: what the prediction rests on.
    - `law`: the predicted law to second moments in each mode, or `None`.
    """

    method: str
    steps: int
    cost: float
    error: float
    basis: str
    law: GaussianMixture | None = None


class Plan(NamedTuple):
    """All options within a budget, the best first; `str(plan)` is a table."""

    options: tuple[Option, ...]
    tilt: GaussianMixture
    budget: float

    @property
    def best(self) -> Option:
        """The option of least predicted error."""
        return self.options[0]

    def __str__(self) -> str:
        width = max(len(option.method) for option in self.options)
        lines = [f"{'method':{width}s} {'steps':>6s} {'calls':>8s} {'W2':>9s}   basis"]
        for option in self.options:
            lines.append(
                f"{option.method:{width}s} {option.steps:6d} {option.cost:8.0f} "
                f"{option.error:9.4f}   {option.basis}"
            )
        return "\n".join(lines)


def recommend(
    prior: GaussianMixture,
    reward: rewards.Reward,
    scale: float,
    budget: float,
    *,
    conjugate: bool = True,
    inner_steps: int = 20,
    pullback: float = 2.0,
) -> Plan:
    """The methods of tiltjax by predicted distance from the tilt, within `budget` denoiser calls a
    sample.

    Each takes as many steps, up to 200, as it can afford (and as many draws or candidates as pay
    best); what cannot afford one is left out. Not to be traced: some 20 CPU-seconds
    the first time, for compiling, and 2 from then on for states of the same size.

    **Arguments:**

    - `prior`, `reward`: one Gaussian or a mixture, and a reward that is quadratic or linear; they
      may stand for a model and a reward that resemble them.
    - `budget`: denoiser calls a sample, at least 1.
    - `conjugate`: whether `Tilted` may be chosen. `False` if the quadratic stands for a reward that
      is not.
    - `inner_steps`: denoiser calls of one posterior draw (`Glass`), steps of an inner flow
      (`fmrg`).
    - `pullback`: what going backwards through a call costs, in calls.

    **Raises:** `ValueError` for a budget below one call, a reward without closed form (naming it),
    an infinite tilt.
    """
    check_mixture(prior, "prior")
    conjugate = _checks.flag(conjugate, "conjugate")
    budget = _checks.number(budget, "budget", 1, np.inf, closed="left")
    pullback = _checks.number(pullback, "pullback", 0, np.inf, closed="left")
    inner_steps = _checks.count(inner_steps, "inner_steps")
    reward = rewards.as_reward(reward)
    strength = _checks.nonnegative(scale, "scale").astype(prior.means.dtype)
    form = _pytree.cast(tilts.quadratic_form(reward, prior.dim), prior.means.dtype)
    if not _checks.concrete((prior, form, strength)):
        raise ValueError(
            "recommend compares numbers of steps and draws: call it outside of jit, vmap and grad"
        )
    tilt = tilts.tilt(prior, reward, strength).mixture
    options = _options(
        prior, reward, form, strength, tilt, budget, conjugate, inner_steps, pullback
    )
    return Plan(tuple(sorted(options, key=lambda option: option.error)), tilt, budget)


def _options(
    prior, reward, form, scale, tilt, budget, conjugate, inner_steps, pullback
) -> Iterator[Option]:
    d, one_mode = prior.dim, len(prior.log_weights) == 1
    scale_text = f"{float(scale):g}"
    spread = float(_spread(tilt))
    isotropic = bool(np.allclose(form.matrix, form.matrix[0, 0] * np.eye(d), rtol=1e-6, atol=0))
    concave = bool(np.all(np.linalg.eigvalsh(np.asarray(form.matrix, np.float64)) >= 0))
    curvature = float(jnp.trace(form.matrix)) / d
    exact = AffineField(prior, form, scales.Constant(scale), Linear(), finite_steps.exact_shift)

    def guided_by(shift: Callable) -> AffineField:
        return AffineField(prior, form, exact.law, exact.interpolant, shift)

    basis_of_laws = _EXACT if one_mode else _ALONE

    def flow(
        method: str, cost: float, field: AffineField, weights: Array, basis: str = basis_of_laws
    ) -> Iterator[Option]:
        steps = _affordable(budget, cost)
        if steps >= 1:
            law = _run(field, weights, steps)
            yield Option(method, steps, (2 * steps - 1) * cost, _distance(law, tilt), basis, law)

    prior_weights, one_draw = prior.log_weights, inner_steps * (1 + pullback)
    unguided = eqx.tree_at(
        lambda f: f.law.final, guided_by(finite_steps.shift_at_mean), jnp.zeros_like(scale)
    )
    yield from flow("no guidance", 1, unguided, prior_weights)
    if conjugate and isotropic and curvature >= 0:
        yield from flow(f"Tilted(model, reward, {scale_text})", 1, exact, tilt.log_weights)
    if concave:
        name = f"Conjugate(model, reward, {scale_text})"
        if one_mode or isotropic:  # its fixed point is the tilt
            yield from flow(name, 2, exact, tilt.log_weights, _FIXED)
        elif (steps := _affordable(budget, 2)) >= 1:
            yield Option(
                name, steps, 2 * (2 * steps - 1), MEASURED["Conjugate"] * spread, _MEASURED
            )
        name, cost = f"Laplace(model, reward, {scale_text})", 1 + d * pullback
        if one_mode:
            yield from flow(name, cost, exact, prior_weights)
        elif (steps := _affordable(budget, cost)) >= 1:
            yield Option(
                name, steps, cost * (2 * steps - 1), MEASURED["Laplace"] * spread, _MEASURED
            )
    glass = f"PlugIn(Glass(model, {inner_steps}), "
    yield from flow(
        f"{glass}reward, {scale_text})",
        one_draw,
        guided_by(finite_steps.shift_at_draw),
        prior_weights,
    )
    name = f"dps(model, reward, {scale_text})"
    yield from flow(name, 1 + pullback, guided_by(finite_steps.shift_at_mean), prior_weights)
    cost = 2 * inner_steps + 2 + (2 * inner_steps + 1) * pullback
    yield from flow(
        f"fmrg(model, reward, {scale_text}, inner_steps={inner_steps})",
        cost,
        guided_by(finite_steps.shift_at_end),
        prior_weights,
    )
    yield from _selected(prior, reward, scale, tilt, unguided, budget, basis_of_laws)
    if concave and curvature > 0:
        # Damping belongs to the reward -|x - y|^2: its weight goes into the scale.
        width = float(
            jnp.sqrt(
                prior.weights @ jnp.einsum("kij,ji->k", prior.covs, form.matrix) / (d * curvature)
            )
        )
        damped = scales.Damped(scale * curvature, width)
        label = (
            f"reward{'' if np.isclose(curvature, 1) else f' * {1 / curvature:.3g}'}, "
            f"Damped({float(damped.final):g}, {width:.3g})"
        )
        field = AffineField(
            prior, _divided(form, curvature), damped, exact.interpolant, finite_steps.shift_at_draw
        )
        yield from flow(f"{glass}{label})", one_draw, field, prior_weights)
        if one_mode:
            yield from _weighted(prior, field, tilt, budget, one_draw, label)
        if one_mode and isotropic and _is_isotropic(prior) and float(scale) > 0:
            strength = float(scale) * curvature * float(prior.covs[0, 0, 0])
            if strength <= 1e4:
                yield from _many_draws(
                    prior,
                    reward,
                    scale,
                    tilt,
                    guided_by(finite_steps.shift_at_draw),
                    budget,
                    inner_steps,
                    pullback,
                )


@eqx.filter_jit
def _spread(law: GaussianMixture) -> Array:
    return jnp.sqrt(jnp.trace(law.cov()))


def _affordable(budget: float, cost: float) -> int:
    """The most steps of Heun's method, `2 n - 1` evaluations, within the budget."""
    return min(_MAX_STEPS, int((budget / cost + 1) // 2))


def _divided(form: QuadraticForm, factor: float) -> QuadraticForm:
    return QuadraticForm(
        form.matrix / factor, form.center, form.gradient / factor, form.value / factor
    )


def _is_isotropic(prior: GaussianMixture) -> bool:
    covs = np.asarray(prior.covs, np.float64)
    return bool(np.allclose(covs, covs[:, :1, :1] * np.eye(prior.dim), rtol=1e-6, atol=0))


def _run(field: AffineField, log_weights: Array, steps: int) -> GaussianMixture:
    """What `steps` steps of Heun's method make of each component alone."""
    # Preceded by steps of no length: one program for any number of them, and, at a constant scale,
    # for any guidance.
    fraction = np.maximum(np.arange(_MAX_STEPS + 1) - (_MAX_STEPS - steps), 0) / steps
    times = jnp.asarray(1e-3 + (1 - 1e-3) * fraction, field.prior.means.dtype)
    shifts = _SHIFTS if isinstance(field.law, scales.Constant) else (field.shift,)
    index = np.asarray(shifts.index(field.shift), np.int32)
    return _run_components(
        shifts,
        index,
        (field.prior, field.form, field.law, field.interpolant),
        log_weights,
        times,
    )


@eqx.filter_jit
def _run_components(
    shifts: tuple[Callable, ...], index: np.ndarray, parts: tuple, log_weights: Array, times: Array
) -> GaussianMixture:
    prior, form, law, interpolant = parts

    def shift(interpolant: Any, *arguments: Any) -> tuple[Array, Array, Array]:
        branches = [functools.partial(branch, interpolant) for branch in shifts]
        return jax.lax.switch(index, branches, *arguments)

    def component(mean: Array, cov: Array) -> tuple[Array, Array]:
        one = prior.replace(jnp.zeros(1, mean.dtype), mean[None], cov[None])
        field = AffineField(one, form, law, interpolant, shift)
        end = finite_steps.discrete_law(field, times=times)
        return end.means[0], end.covs[0]

    means, covs = jax.vmap(component)(prior.means, prior.covs)
    return prior.replace(log_weights, means, covs)


def _distance(law: GaussianMixture, tilt: GaussianMixture) -> float:
    return float(w2_bounds(law, tilt).upper)


def _many_draws(
    prior, reward, scale, tilt, one_draw, budget, inner_steps, pullback
) -> Iterator[Option]:
    """Plug-in of k > 1 draws: the law of small steps, moved by what steps do to one draw's law."""
    one_law = flow_laws.plug_in_law(prior, reward, scale)
    parameters = _draws_parameters(prior, reward, scale)
    for k in (2, 8, 32):
        # The first call of all draws is that of the field itself.
        cost = (1 + k * (inner_steps - 1)) * (1 + pullback)
        steps = _affordable(budget, cost)
        if steps < 4:  # that law is far from any at so few steps
            return
        coarse = _run(one_draw, prior.log_weights, steps)
        mean, cov = draws_moments(*parameters, jnp.asarray(k, prior.means.dtype))
        # Fresh draws leave 1/k of one draw's variance.
        mean = mean + coarse.means[0] - one_law.means[0]
        cov = cov + (coarse.covs[0] - one_law.covs[0]) / k
        moments = prior.replace(prior.log_weights, mean[None], cov[None])
        method = f"PlugIn(Glass(model, {inner_steps}), reward, {float(scale):g}, k={k})"
        yield Option(
            method, steps, (2 * steps - 1) * cost, _distance(moments, tilt), _LIMIT, moments
        )


def _selected(prior, reward, scale, tilt, unguided, budget, basis) -> Iterator[Option]:
    """The best number of candidates, for best-of-n and for softmax-of-n."""
    scale_text = f"{float(scale):g}"
    cells = {1: 10_000, 2: 300}.get(prior.dim)
    rules = {
        "best_of_n(particles, reward, {})": lambda base, n: selection.best_of_n(
            base, reward, n, cells=cells
        ),
        f"softmax_of_n(key, particles, reward, {{}}, {scale_text})": lambda base, n: (
            selection.softmax_of_n(base, reward, n, scale)
        ),
    }
    for name, rule in rules.items():
        options = []
        for n in _COUNTS:
            steps = _affordable(budget / n, 1)
            if steps < 1:
                break
            try:
                law = rule(_run(unguided, prior.log_weights, steps), n).mixture()
            except ValueError:  # beyond closed forms and quadrature there is no prediction
                break
            options.append(
                Option(name.format(n), steps, n * (2 * steps - 1), _distance(law, tilt), basis, law)
            )
        if options:
            yield min(options, key=lambda option: option.error)


def _weighted(prior, damped, tilt, budget, cost, label) -> Iterator[Option]:
    """One of as many weighted paths of the damped diffusion as there can be."""
    n = int(budget / (_PATH_STEPS * cost))
    if n < 1:
        return
    ess = float(
        path_weights.path_law(
            damped, times=jnp.linspace(1e-3, 1, _PATH_STEPS + 1, dtype=prior.means.dtype)
        ).ess
    )
    if ess > 0:
        widest = float(np.linalg.eigvalsh(np.asarray(tilt.covs[0], np.float64))[-1])
        error = float(np.sqrt(2 * widest * np.log1p((1 / ess - 1) / n)))
        yield Option(
            f"one of {n} weighted paths, {label}",
            _PATH_STEPS,
            n * _PATH_STEPS * cost,
            error,
            _BOUND,
        )


def _draws_parameters(
    prior: GaussianMixture, reward: rewards.Reward, scale: Array
) -> tuple[Array, Array, Array, Array]:
    law = _pytree.cast(scales.as_scale(scale), prior.means.dtype)
    return flow_laws.draws_parameters(prior, reward, law, 2)


def matching_k(
    prior: GaussianMixture, reward: rewards.Reward, law: scales.Damped, *, maximum: int = 10_000
) -> int | None:
    """The least k for which undamped plug-in lands closer to the tilt than one draw damped by
    `law`, or `None` up to `maximum`.

    By W2 of means and covariances, for one isotropic Gaussian: of the right width one damped draw
    samples the tilt, and no k beats it; of a wrong one this says what it is worth. Not to be
    traced.

    **Raises:** as `plug_in_law` with k > 1.
    """
    if not isinstance(law, scales.Damped):
        raise TypeError(f"law must be a Damped scale, got {type(law).__name__}")
    check_mixture(prior, "prior")
    maximum = _checks.count(maximum, "maximum")
    tilt = tilts.tilt(prior, reward, law.final).mixture
    mean, cov = tilt.means[0], tilt.covs[0]
    parameters = _draws_parameters(prior, reward, law.final)  # refuses what has no law

    def distance(k: int) -> float:
        if k > 1:
            draws_mean, draws_cov = draws_moments(*parameters, jnp.asarray(k, mean.dtype))
            return float(bures(draws_mean, draws_cov, mean, cov))
        undamped = flow_laws.plug_in_law(prior, reward, law.final)
        return float(bures(undamped.means[0], undamped.covs[0], mean, cov))

    damped = flow_laws.plug_in_law(prior, reward, law)
    damped_distance = float(bures(damped.means[0], damped.covs[0], mean, cov))
    if distance(1) < damped_distance:
        return 1
    if distance(maximum) >= damped_distance:
        return None
    low, high = 1, maximum
    while high - low > 1:  # the distance falls in k
        middle = max(low + 1, int(np.sqrt(low * high)))
        low, high = (low, middle) if distance(middle) < damped_distance else (middle, high)
    return high
