r"""Predict which method has the smallest distance to the tilt within a number of denoiser calls.

**Cost.** A sample with n steps of Heun's method evaluates its field `2 n - 1` times. One evaluation
costs the following calls of the denoiser and pullbacks through it (each pullback costs `pullback`
calls):

| method | calls | pullbacks | |
|---|---|---|---|
| `Tilted` | 1 | | rewards whose tilt is conjugate |
| `Conjugate` | 2 | | any reward |
| `PlugIn(Glass(model, g), k)`, damped or not | `1 + k (g - 1)` | as many | any reward |
| `dps` | 1 | 1 | any reward |
| `fmrg`, g inner steps | `2 g + 2` | `2 g + 1` | any reward |
| `Laplace` | 1 | d | smooth rewards |
| `best_of_n`, `softmax_of_n` | n samples | | any reward |
| n weighted trajectories of 25 steps | `25 n` evaluations | as many | any reward |

The last row is for the damped diffusion with one draw, and on mixtures also for the diffusions of
`dps`, `Laplace` and `Conjugate`. `Conjugate` then takes one call more, for the weight.

**Error.** The error is W2 between the tilt and the law that is predicted for a method *at this
number of steps*.

*One Gaussian.* With one draw the predicted law is `discrete_law`. For k > 1 draws it is the law of
small steps, corrected by the step error of one draw. For selection it is `Selected.mixture` of
unguided samples at this number of steps. For n weighted trajectories of effective fraction e, one
of which is drawn, `KL <= log(1 + (1/e - 1)/n)`. Hence, for a Gaussian tilt of largest variance v
and to leading order, `W2 <= sqrt(2 v KL)` (Talagrand). Laws that are not Gaussian enter by mean and
covariance.

*A mixture.* The steps of the method move points (`theory.runs`), with the method's own draws,
inside of modes and between them. W2 is exact transport between these points and points of the tilt.
It is a measurement of the law at these steps, not a law: `spread` is its error. The order of two
methods whose W2 differ by less than this is not known. The 2,048 points do not contain what is
rarer, such as a particle in ten thousand that long steps carry far away. Only plug-in with 1, 2 and
8 draws are among the options. One of n weighted trajectories is chosen among points with the
weights of their trajectories (`theory.run_weights`), for up to 64 trajectories.

The column `basis` says which of these a number is.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from theory import finite_steps, flow_laws, path_weights, run_weights, runs, selection, tilts
from theory.distances import bures, w2_bounds
from theory.finite_steps import AffineField
from theory.many_draws import draws_moments
from theory.push_forward import (
    PointLaw,
    doob_denoiser,
    dps_denoiser,
    laplace_denoiser,
    mixture_points,
    normal_points,
)
from theory.runs import (
    ConjugateFit,
    Deterministic,
    Field,
    FlowMapEnd,
    PlugInDraws,
    Problem,
    Unguided,
)
from theory.tilts import QuadraticForm
from tiltjax import _checks, _pytree, _repr, grids, rewards, scales
from tiltjax.interpolants import Linear
from tiltjax.mixtures import GaussianMixture, check_mixture

_EXACT, _POINTS, _LIMIT = "law at these steps", "points at these steps", "law of small steps"
_FIXED, _BOUND = "fixed point at these steps", "bound, to leading order"
_MAX_STEPS = 200
_SHIFTS = (
    finite_steps.shift_at_mean,
    finite_steps.shift_at_draw,
    finite_steps.exact_shift,
)
_PATH_STEPS = 25  # of a weighted trajectory
_MAX_PATHS = 64  # weighted trajectories on a mixture
_MAX_STRENGTH = 1e4  # largest `scale h s^2` for which the law of many draws is computed
_HEAD = ("method", "steps", "calls", "W2", "basis")  # of the table of a plan
_COUNTS = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_DRAWS = (1, 2, 8)  # of plug-in on a mixture
_DENOISERS = (doob_denoiser, dps_denoiser, laplace_denoiser)
_FEW = 64  # points in each set that choose the number of candidates
# Points in each set from which n candidates are selected, over n: to choose n, and to measure W2.
_POOLS = 64, 256
_SETS = 8  # of points


class Option(NamedTuple):
    """One method at the number of steps that the budget allows.

    - `method`: how to call it.
    - `steps`: of Heun's method (of `Ancestral` for weighted trajectories).
    - `cost`: of one sample, in denoiser calls.
    - `error`: the predicted W2 to the tilt.
    - `basis`: the basis of the prediction.
    - `law`: the predicted law. For one Gaussian, it is a Gaussian with the right moments. For a
      mixture, it is a set of points. It is `None` for weighted trajectories.
    - `spread`: the standard error of `error`. It is 0 unless `error` is measured on points.
    """

    method: str
    steps: int
    cost: float
    error: float
    basis: str
    law: GaussianMixture | PointLaw | None = None
    spread: float = 0.0


class Plan(NamedTuple):
    """All options within a budget, by increasing error; `str(plan)` is a table."""

    options: tuple[Option, ...]
    tilt: GaussianMixture
    budget: float

    @property
    def best(self) -> Option:
        """The option with the smallest predicted error."""
        return self.options[0]

    def _rows(self) -> list[tuple[str, ...]]:
        return [
            (
                option.method,
                f"{option.steps}",
                f"{option.cost:.0f}",
                f"{option.error:.4f}" + (f" ± {option.spread:.4f}" if option.spread else ""),
                option.basis,
            )
            for option in self.options
        ]

    def __repr__(self) -> str:
        rows = [_HEAD, *self._rows()]
        width = max(len(method) for method, *_ in rows)
        column = max(9, *(len(error) for _, _, _, error, _ in rows))
        return "\n".join(
            f"{method:{width}s} {steps:>6s} {calls:>8s} {error:>{column}s}   {basis}"
            for method, steps, calls, error, basis in rows
        )

    def _repr_html_(self) -> str:
        title = f"Predicted distance from the tilt, within {self.budget:g} denoiser calls a sample"
        return _repr.table(title, self._rows(), _HEAD)


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
    """The methods of tiltjax, sorted by predicted distance to the tilt, within `budget` denoiser
    calls per sample.

    Each method takes as many steps as the budget allows, up to 200, with the best number of draws
    or candidates. A method that cannot afford one step is left out. The function cannot be traced.
    It takes about 20 CPU-seconds for compilation the first time, and 2 from then on for states of
    the same size. For mixtures with as many components in the plane, the later calls take 3
    CPU-seconds at 100 denoiser calls, and 7 at 1,000, and a quarter more for weighted trajectories.

    **Arguments:**

    - `prior`, `reward`: one Gaussian or a mixture, and a reward that is quadratic or linear. They
      may approximate a learned model and another reward.
    - `budget`: denoiser calls per sample, at least 1.
    - `conjugate`: whether `Tilted` may be chosen. Use `False` if the quadratic approximates a
      reward that is not quadratic.
    - `inner_steps`: denoiser calls of one posterior draw (`Glass`), steps of an inner flow
      (`fmrg`).
    - `pullback`: the cost of one pullback through the denoiser, in calls.

    **Raises:** `ValueError` for a budget below one call, a reward without a closed form, and a tilt
    without finite mass.
    """
    check_mixture(prior, "prior")
    conjugate = _checks.flag(conjugate, "conjugate")
    budget = _checks.number(budget, "budget", 1, np.inf, closed="left")
    pullback = _checks.number(pullback, "pullback", 0, np.inf, closed="left")
    inner_steps = _checks.count(inner_steps, "inner_steps")
    reward = _pytree.cast(rewards.as_reward(reward), prior.means.dtype)
    strength = _checks.nonnegative(scale, "scale").astype(prior.means.dtype)
    form = _pytree.cast(tilts.quadratic_form(reward, prior.dim), prior.means.dtype)
    if not _checks.concrete((prior, form, strength)):
        raise ValueError(
            "recommend compares numbers of steps and draws: call it outside of jit, vmap and grad"
        )
    tilt = tilts.tilt(prior, reward, strength).mixture
    task = _Task(prior, reward, form, strength, tilt, budget, inner_steps, pullback)
    options = _options if task.one_mode else _options_of_points
    return Plan(tuple(sorted(options(task, conjugate), key=lambda o: o.error)), tilt, budget)


class _Task(NamedTuple):
    """The data that all options share: the arguments of `recommend`, the reward's form, and the
    tilt. Each method yields an option, or nothing if it cannot afford a step.
    """

    prior: GaussianMixture
    reward: rewards.Reward
    form: QuadraticForm
    scale: Array
    tilt: GaussianMixture
    budget: float
    inner_steps: int
    pullback: float

    @property
    def one_mode(self) -> bool:
        return len(self.prior.log_weights) == 1

    @property
    def isotropic(self) -> bool:
        """Whether H is a multiple of the identity."""
        matrix = np.asarray(self.form.matrix)
        eye = np.eye(self.prior.dim)
        return bool(np.allclose(matrix, matrix[0, 0] * eye, rtol=1e-6, atol=0))

    @property
    def concave(self) -> bool:
        return bool(np.all(np.linalg.eigvalsh(np.asarray(self.form.matrix, np.float64)) >= 0))

    @property
    def curvature(self) -> float:
        """The mean eigenvalue of H."""
        return float(jnp.trace(self.form.matrix)) / self.prior.dim

    def call(self, method: str, settings: str = "") -> str:
        return f"{method}reward, {float(self.scale):g}{settings})"

    def plug_in(self, rest: str) -> str:
        return f"PlugIn(Glass(model, {self.inner_steps}), {rest})"

    def draws_cost(self, k: int) -> float:
        """The cost of one evaluation with k draws, which share their first call with the field."""
        return (1 + k * (self.inner_steps - 1)) * (1 + self.pullback)

    @property
    def laplace_cost(self) -> float:
        return 1 + self.prior.dim * self.pullback

    @property
    def fmrg_call(self) -> str:
        return self.call("fmrg(model, ", f", inner_steps={self.inner_steps}")

    @property
    def fmrg_cost(self) -> float:
        return 2 * self.inner_steps + 2 + (2 * self.inner_steps + 1) * self.pullback

    def damping(self) -> tuple[QuadraticForm, scales.Damped, str]:
        """The reward and the scale of one damped draw, and how to write them. `Damped` is right for
        the reward `-|x - y|^2`, so the reward's weight moves into the scale.
        """
        prior, form, curvature = self.prior, self.form, self.curvature
        mean_square = prior.weights @ jnp.einsum("kij,ji->k", prior.covs, form.matrix)
        width = float(jnp.sqrt(mean_square / (prior.dim * curvature)))
        law = scales.Damped(self.scale * curvature, width)
        unit = "reward" if np.isclose(curvature, 1) else f"reward * {1 / curvature:.3g}"
        label = f"{unit}, Damped({float(law.final):g}, {width:.3g})"
        return _divided(form, curvature), law, label

    def guided(self, shift: Callable) -> AffineField:
        law = scales.Constant(self.scale)
        field = AffineField(self.prior, self.form, law, Linear(), shift)
        return _pytree.cast(field, self.prior.means.dtype)

    def unguided(self) -> AffineField:
        silent = jnp.zeros_like(self.scale)
        field = self.guided(finite_steps.shift_at_mean)
        return eqx.tree_at(lambda field: field.law.final, field, silent)

    def flow(
        self, method: str, cost: float, field: AffineField, basis: str = _EXACT
    ) -> Iterator[Option]:
        """The option of a guided flow."""
        if (steps := _affordable(self.budget, cost)) >= 1:
            law = _run(field, steps)
            error, calls = _distance(law, self.tilt), (2 * steps - 1) * cost
            yield Option(method, steps, calls, error, basis, law)


def _options(task: _Task, conjugate: bool) -> Iterator[Option]:
    """All methods that the reward admits, for one Gaussian."""
    yield from task.flow("no guidance", 1, task.unguided())
    if conjugate and task.isotropic and task.curvature >= 0:
        exact = task.guided(finite_steps.exact_shift)
        yield from task.flow(task.call("Tilted(model, "), 1, exact)
    if task.concave:
        yield from _conjugate(task)
        yield from _laplace(task)
    yield from _one_draw(task)
    yield from _dps(task)
    yield from _fmrg(task)
    yield from _selected(task)
    if task.concave and task.curvature > 0:
        yield from _damped(task)
        yield from _many_draws(task)


def _conjugate(task: _Task) -> Iterator[Option]:
    exact = task.guided(finite_steps.exact_shift)  # its fixed point is the tilt
    return task.flow(task.call("Conjugate(model, "), 2, exact, _FIXED)


def _laplace(task: _Task) -> Iterator[Option]:
    exact = task.guided(finite_steps.exact_shift)
    return task.flow(task.call("Laplace(model, "), task.laplace_cost, exact)


def _one_draw(task: _Task) -> Iterator[Option]:
    name = task.plug_in(f"reward, {float(task.scale):g}")
    return task.flow(name, task.draws_cost(1), task.guided(finite_steps.shift_at_draw))


def _dps(task: _Task) -> Iterator[Option]:
    field = task.guided(finite_steps.shift_at_mean)
    return task.flow(task.call("dps(model, "), 1 + task.pullback, field)


def _fmrg(task: _Task) -> Iterator[Option]:
    field = finite_steps.fmrg_field(
        task.prior, task.reward, task.scale, inner_steps=task.inner_steps
    )
    return task.flow(task.fmrg_call, task.fmrg_cost, field)


def _damped(task: _Task) -> Iterator[Option]:
    """One damped draw, and weighted trajectories of it."""
    form, law, label = task.damping()
    field = AffineField(task.prior, form, law, Linear(), finite_steps.shift_at_draw)
    yield from task.flow(task.plug_in(label), task.draws_cost(1), field)
    yield from _weighted(task, field, label)


def _affordable(budget: float, cost: float) -> int:
    """The largest number of Heun steps, `2 n - 1` evaluations, within the budget."""
    return min(_MAX_STEPS, int((budget / cost + 1) // 2))


def _divided(form: QuadraticForm, factor: float) -> QuadraticForm:
    return QuadraticForm(
        form.matrix / factor, form.center, form.gradient / factor, form.value / factor
    )


def _is_isotropic(prior: GaussianMixture) -> bool:
    covs = np.asarray(prior.covs, np.float64)
    return bool(np.allclose(covs, covs[:, :1, :1] * np.eye(prior.dim), rtol=1e-6, atol=0))


def _grid(field: AffineField, steps: int) -> Array:
    """The default times of a run."""
    dtype = field.prior.means.dtype
    return grids.of_width(field.interpolant, field.prior.width, steps, dtype).astype(dtype)


def _run(field: AffineField, steps: int) -> GaussianMixture:
    """The law after `steps` steps of Heun's method."""
    # Steps of zero length come first, so that one program serves any number of steps and, at a
    # constant scale, most guidances.
    grid = np.asarray(_grid(field, steps))
    times = jnp.asarray(np.concatenate([np.full(_MAX_STEPS - steps, grid[0]), grid]))
    shared = field.shift in _SHIFTS and isinstance(field.law, scales.Constant)
    shifts = _SHIFTS if shared else (field.shift,)
    index = np.asarray(shifts.index(field.shift), np.int32)
    parts = field.prior, field.form, field.law, field.interpolant
    return _run_shift(shifts, index, parts, field.guides_start, times)


@eqx.filter_jit
def _run_shift(
    shifts: tuple[Callable, ...], index: np.ndarray, parts: tuple, guides_start: bool, times: Array
) -> GaussianMixture:
    def shift(interpolant: Any, *arguments: Any) -> tuple[Array, Array, Array]:
        branches = [functools.partial(branch, interpolant) for branch in shifts]
        return jax.lax.switch(index, branches, *arguments)

    prior, form, law, interpolant = parts
    field = AffineField(prior, form, law, interpolant, shift, guides_start)
    return finite_steps.discrete_law(field, times=times)


def _distance(law: GaussianMixture, tilt: GaussianMixture) -> float:
    # An explicit flow with too long steps overflows.
    finite = np.all(np.isfinite(law.means)) and np.all(np.isfinite(law.covs))
    return float(w2_bounds(law, tilt).upper) if finite else math.inf


def _many_draws(task: _Task) -> Iterator[Option]:
    """Plug-in with k > 1 draws, for one isotropic Gaussian: the law of small steps, corrected by
    the step error of one draw.
    """
    prior, scale = task.prior, task.scale
    if not (task.isotropic and _is_isotropic(prior) and float(scale) > 0):
        return
    if float(scale) * task.curvature * float(prior.covs[0, 0, 0]) > _MAX_STRENGTH:
        return
    one_law = flow_laws.plug_in_law(prior, task.reward, scale)
    parameters = _draws_parameters(prior, task.reward, scale)
    for k in (2, 8, 32):
        cost = task.draws_cost(k)
        steps = _affordable(task.budget, cost)
        if steps < 4:  # the law of small steps is wrong for so few steps
            return
        coarse = _run(task.guided(finite_steps.shift_at_draw), steps)
        mean, cov = draws_moments(*parameters, jnp.asarray(k, prior.means.dtype))
        # k fresh draws have 1/k of the variance of one draw.
        mean = mean + coarse.means[0] - one_law.means[0]
        cov = cov + (coarse.covs[0] - one_law.covs[0]) / k
        moments = prior.replace(prior.log_weights, mean[None], cov[None])
        method = task.plug_in(f"reward, {float(scale):g}, k={k}")
        error, calls = _distance(moments, task.tilt), (2 * steps - 1) * cost
        yield Option(method, steps, calls, error, _LIMIT, moments)


def _selected(task: _Task) -> Iterator[Option]:
    """The best number of candidates, for best-of-n and for softmax-of-n."""
    reward, scale, unguided = task.reward, task.scale, task.unguided()
    cells = {1: 10_000, 2: 300}.get(task.prior.dim)
    best = lambda base, n: selection.best_of_n(base, reward, n, cells=cells)
    softmax = lambda base, n: selection.softmax_of_n(base, reward, n, scale)
    for name, rule in zip(_selection_names(scale), (best, softmax), strict=True):
        options = []
        for n in _COUNTS:
            steps = _affordable(task.budget / n, 1)
            if steps < 1:
                break
            try:
                law = rule(_run(unguided, steps), n).mixture()
            except ValueError:  # without a closed form or quadrature there is no prediction
                break
            error, calls = _distance(law, task.tilt), n * (2 * steps - 1)
            options.append(Option(name.format(n), steps, calls, error, _EXACT, law))
        if options:
            yield min(options, key=lambda option: option.error)


def _selection_names(scale: Array) -> tuple[str, str]:
    softmax = f"softmax_of_n(key, particles, reward, {{}}, {float(scale):g})"
    return "best_of_n(particles, reward, {})", softmax


def _weighted(task: _Task, damped: AffineField, label: str) -> Iterator[Option]:
    """One of as many weighted trajectories of the damped diffusion as the budget allows."""
    cost = _PATH_STEPS * task.draws_cost(1)
    n = int(task.budget / cost)
    if n < 1:
        return
    ess = float(path_weights.path_law(damped, times=_grid(damped, _PATH_STEPS)).ess)
    if ess > 0:
        widest = float(np.linalg.eigvalsh(np.asarray(task.tilt.covs[0], np.float64))[-1])
        error = float(np.sqrt(2 * widest * np.log1p((1 / ess - 1) / n)))
        name = f"one of {n} weighted paths, {label}"
        yield Option(name, _PATH_STEPS, n * cost, error, _BOUND)


class _Points(NamedTuple):
    """The laws of a task on a mixture, as points. All fields are branches of one program, whose
    arguments are the scale, the reward, and the numbers of steps and draws.
    """

    task: _Task
    target: Array
    problem: Problem

    @classmethod
    def of(cls, task: _Task) -> "_Points":
        target = mixture_points(task.tilt, runs.POINTS)
        return cls(task, target, _problem(task.prior, task.form))

    def law(
        self, field: Field, steps: int, num: int = runs.POINTS, *, damped: bool = False
    ) -> PointLaw:
        """The law of a method after `steps` steps, with `num` points in each set."""
        task, dtype = self.task, self.task.prior.means.dtype
        problem, scale = self.damping() if damped else (self.problem, _undamped(task.scale))
        fields, index = _branches(field, task.inner_steps)
        times = np.ones(_MAX_STEPS + 1)
        times[: steps + 1] = grids.of_width(Linear(), task.prior.width, steps, dtype)
        arguments = (
            problem,
            fields,
            jnp.asarray(index, jnp.int32),
            _pytree.cast(scale, dtype),
            jnp.asarray(times, dtype),
            jnp.asarray(steps, jnp.int32),
        )
        # In parts, so that one program serves any number of points.
        parts = np.split(normal_points(num, task.prior.dim), num // runs.POINTS, 1)
        ends = [
            np.asarray(runs.ends_of(*arguments, jnp.asarray(part, dtype), jax.random.key(i)))
            for i, part in enumerate(parts)
        ]
        return PointLaw(task.prior, jnp.asarray(np.concatenate(ends, axis=1)))

    def damping(self) -> tuple[Problem, scales.Scale]:
        """The problem and the scale of one damped draw."""
        form, scale, _ = self.task.damping()
        return _problem(self.task.prior, form), scale

    def weighted(self, field: Field, n: int, *, damped: bool = False) -> PointLaw:
        """The law of one of n weighted trajectories."""
        prior, dtype = self.task.prior, self.task.prior.means.dtype
        problem, scale = self.damping() if damped else (self.problem, _undamped(self.task.scale))
        times = jnp.asarray(grids.of_width(Linear(), prior.width, _PATH_STEPS, dtype), dtype)
        # Draws, whose program is large, have one of their own, which only a large budget needs.
        others = ConjugateFit(), *(Deterministic(denoiser) for denoiser in _DENOISERS)
        fields = (field,) if isinstance(field, PlugInDraws) else others
        index = fields.index(field)
        chain, eta = jnp.asarray(run_weights.GUIDED), jnp.ones((), dtype)
        arguments = problem, fields, jnp.asarray(index, jnp.int32), _pytree.cast(scale, dtype)
        points, log_weights = [], []
        for i in range(n):  # in parts, so that one program serves any n
            keys, sets = jax.random.split(jax.random.key(i)), (_SETS, _POOLS[1])
            start = jax.random.normal(keys[0], (sets[0] * sets[1], prior.dim), dtype)
            found = run_weights.trajectories(*arguments, times, eta, chain, start, keys[1])
            points.append(np.asarray(found.ends).reshape(*sets, prior.dim))
            log_weights.append(np.asarray(found.log_weights).reshape(sets))
        law = PointLaw(prior, jnp.asarray(np.concatenate(points, axis=1)))
        return runs.weighted_law(law, np.concatenate(log_weights, axis=1), n)

    def option(
        self, method: str, cost: float, field: Field, *, damped: bool = False
    ) -> Iterator[Option]:
        """The option of a guided flow."""
        if (steps := _affordable(self.task.budget, cost)) >= 1:
            law = self.law(field, steps, damped=damped)
            yield self.measured(method, steps, (2 * steps - 1) * cost, law)

    def distance(self, law: PointLaw, num: int = runs.POINTS) -> tuple[float, float]:
        """W2 to the tilt, on the first `num` points of each set, and its error."""
        ours, theirs = (points[:, :num] for points in (law.points, self.target))
        # An explicit flow with too long steps overflows.
        if not np.all(np.isfinite(ours)):
            return math.inf, 0.0
        found = PointLaw(law.prior, ours).wasserstein(PointLaw(self.task.tilt, theirs))
        return float(found.value), float(found.error)

    def measured(self, method: str, steps: int, calls: float, law: PointLaw) -> Option:
        error, spread = self.distance(law)
        return Option(method, steps, calls, error, _POINTS, law, spread)


def _branches(field: Field, inner_steps: int) -> tuple[tuple[Field, ...], int]:
    """The branches of the program, and which of them is this field."""
    draws = PlugInDraws(jnp.asarray(getattr(field, "k", 1), jnp.int32), inner_steps)
    exact = [Deterministic(denoiser) for denoiser in _DENOISERS]
    fields = (Unguided(), ConjugateFit(), FlowMapEnd(inner_steps), *exact, draws)
    same = lambda branch: branch == field or isinstance(branch, PlugInDraws)
    return fields, next(index for index, branch in enumerate(fields) if same(branch))


def _undamped(scale: Array) -> scales.Damped:
    # Of width zero, so that one program serves damped and other draws.
    return scales.Damped(scale, jnp.zeros_like(scale))


def _problem(prior: GaussianMixture, form: QuadraticForm) -> Problem:
    # One structure for all rewards of one program; their constants do not matter.
    reward = rewards.Quadratic(form.center, form.matrix) + rewards.LinearReward(form.gradient)
    return runs.problem_of(prior, reward, Linear())  # a matrix is not conjugate, even if isotropic


def _options_of_points(task: _Task, conjugate: bool) -> Iterator[Option]:
    """All methods that the reward admits, for a mixture."""
    points, exact = _Points.of(task), Deterministic(doob_denoiser)
    yield from points.option("no guidance", 1, Unguided())
    if task.isotropic and task.curvature >= 0:
        if conjugate:
            yield from points.option(task.call("Tilted(model, "), 1, exact)
        yield from points.option(task.call("Conjugate(model, "), 2, exact)
    elif task.concave:
        yield from points.option(task.call("Conjugate(model, "), 2, ConjugateFit())
    if task.concave:
        laplace = Deterministic(laplace_denoiser)
        yield from points.option(task.call("Laplace(model, "), task.laplace_cost, laplace)
    dps = Deterministic(dps_denoiser)
    yield from points.option(task.call("dps(model, "), 1 + task.pullback, dps)
    yield from points.option(task.fmrg_call, task.fmrg_cost, FlowMapEnd(task.inner_steps))
    for k in _DRAWS:
        label = f"reward, {float(task.scale):g}" + (f", k={k}" if k > 1 else "")
        draws = PlugInDraws(k, task.inner_steps)
        yield from points.option(task.plug_in(label), task.draws_cost(k), draws)
    if task.concave and task.curvature > 0:
        label, draw = task.damping()[2], PlugInDraws(1, task.inner_steps)
        yield from points.option(task.plug_in(label), task.draws_cost(1), draw, damped=True)
    yield from _weighted_points(points)
    yield from _selected_points(points)


def _weighted_points(points: _Points) -> Iterator[Option]:
    """One of as many weighted trajectories as the budget allows."""
    task, methods = points.task, []
    if task.concave:
        fit = Deterministic(doob_denoiser) if task.isotropic else ConjugateFit()
        laplace = Deterministic(laplace_denoiser)
        # The weight needs the denoiser without a tilt, too.
        methods.append((task.call("Conjugate(model, "), 3, fit, False))
        methods.append((task.call("Laplace(model, "), task.laplace_cost, laplace, False))
    dps = Deterministic(dps_denoiser)
    methods.append((task.call("dps(model, "), 1 + task.pullback, dps, False))
    if task.concave and task.curvature > 0:
        label, draw = task.plug_in(task.damping()[2]), PlugInDraws(1, task.inner_steps)
        methods.append((label, task.draws_cost(1), draw, True))
    for label, cost, field, damped in methods:
        n = min(int(task.budget / (_PATH_STEPS * cost)), _MAX_PATHS)
        if n > 1:
            law, calls = points.weighted(field, n, damped=damped), n * _PATH_STEPS * cost
            yield points.measured(f"one of {n} weighted paths, {label}", _PATH_STEPS, calls, law)


def _selected_points(points: _Points) -> Iterator[Option]:
    """The best number of candidates, for best-of-n and for softmax-of-n."""
    task = points.task
    steps = {n: _affordable(task.budget / n, 1) for n in _COUNTS if task.budget >= n}

    def base(n: int, pool: int) -> PointLaw:
        return points.law(Unguided(), steps[n], max(pool * n, runs.POINTS))

    few, many = _POOLS
    bases = {n: base(n, few) for n in steps}
    for name, scale in zip(_selection_names(task.scale), (None, task.scale), strict=True):
        if steps:
            select = functools.partial(runs.selected_law, reward=task.reward, scale=scale)
            w2 = {n: points.distance(select(bases[n], n=n), _FEW)[0] for n in steps}
            n = min(w2, key=w2.__getitem__)
            law, calls = select(base(n, many), n=n), n * (2 * steps[n] - 1)
            yield points.measured(name.format(n), steps[n], calls, law)


def _draws_parameters(
    prior: GaussianMixture, reward: rewards.Reward, scale: Array
) -> tuple[Array, Array, Array, Array]:
    law = _pytree.cast(scales.as_scale(scale), prior.means.dtype)
    return flow_laws.draws_parameters(prior, reward, law, 2)


def matching_k(
    prior: GaussianMixture, reward: rewards.Reward, law: scales.Damped, *, maximum: int = 10_000
) -> int | None:
    """The smallest k for which undamped plug-in is closer to the tilt than one draw damped by
    `law`, or `None` if no k up to `maximum` is.

    The distance is W2 of means and covariances, for one isotropic Gaussian. One damped draw of the
    right width samples the tilt exactly, so no k is closer; for a wrong width, k measures the value
    of the damping. The function cannot be traced.

    **Raises:** `TypeError` for a `law` that is not `Damped`; `ValueError` as `plug_in_law` with k >
    1.
    """
    if not isinstance(law, scales.Damped):
        raise TypeError(f"law must be a Damped scale, got {type(law).__name__}")
    check_mixture(prior, "prior")
    maximum = _checks.count(maximum, "maximum")
    tilt = tilts.tilt(prior, reward, law.final).mixture
    mean, cov = tilt.means[0], tilt.covs[0]
    parameters = _draws_parameters(prior, reward, law.final)  # raises where no law is known

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
    while high - low > 1:  # the distance decreases in k
        middle = max(low + 1, int(np.sqrt(low * high)))
        low, high = (low, middle) if distance(middle) < damped_distance else (middle, high)
    return high
