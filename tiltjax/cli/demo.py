r"""`tiltjax demo` samples one tilt with every method and shows where each method lands.

For a problem of `tiltjax.problems` the command prints a table and draws one figure. The table shows
measured values beside those that `theory` predicts. Run times are those of a second call, because
the first call compiles.
"""

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

import theory
import tiltjax as tj
from tiltjax import _progress

CANDIDATES = 4  # of best-of-n


class Method(NamedTuple):
    """A method of the table: its name, how to run it, and the law that theory predicts, or `None`.
    `exact` methods sample the tilt. A method that `follows` runs the compiled programs of another.
    """

    name: str
    run: Callable[[Array], tj.Particles]
    law: tj.GaussianMixture | None = None
    exact: bool = False
    follows: bool = False


class Row(NamedTuple):
    """The measurements of one method: mean reward with its standard error, distance to the tilt,
    masses of the modes, seconds of compilation and of a run.
    """

    method: Method
    particles: tj.Particles
    reward: tuple[float, float]
    distance: float
    masses: np.ndarray
    compilation: float
    duration: float


class Truth(NamedTuple):
    """The exact tilt: its law, the mixture whose components are the modes, the masses of the modes,
    and the mean reward.
    """

    law: Any
    modes: tj.GaussianMixture
    masses: np.ndarray
    reward: float


def print_problems() -> None:
    """Print the names and descriptions of the problems, one on each line."""
    for name in tj.problems.NAMES:
        print(f"{name:12s} {_describe(name)}")


def _describe(name: str) -> str:
    return (getattr(tj.problems, name).__doc__ or "").splitlines()[0]


def run(name: str, *, scale: float | None, num: int, steps: int, seed: int, output: str) -> None:
    """Sample the problem `name` with every method, print the table, write the figure."""
    problem = tj.problems.get(name)
    if scale is not None:
        problem = problem._replace(scale=float(tj.scales.Constant(scale).final))
    file = tj.plotting.target(output)

    truth = _truth(problem)
    key_exact, key_theory, key_first, key_second = jax.random.split(jax.random.key(seed), 4)
    exact = truth.law.sample(key_exact, num)
    methods = _methods(problem, num, steps)

    rows, failed = [], []
    stages = 2 * len(methods) + 1
    with _progress.meter("tilting", stages) as meter:
        firsts = _first_runs(methods, key_first, meter)
        for index, method in enumerate(methods):
            first = firsts[method.name]
            if isinstance(first, FloatingPointError):  # the other methods may converge
                failed.append(f"{method.name}: {first}")
                continue
            meter.update(len(methods) + index, f"{method.name}: sampling again")
            start = time.perf_counter()
            particles = jax.block_until_ready(method.run(key_second))
            duration = time.perf_counter() - start
            rewards = jax.vmap(problem.reward)(particles.x)
            reward = float(jnp.mean(rewards)), float(tj.metrics.standard_error(rewards))
            masses = np.asarray(tj.metrics.mode_weights(particles.x, truth.modes))
            compilation = max(first - duration, 0.0)
            rows.append(Row(method, particles, reward, np.nan, masses, compilation, duration))
        meter.update(stages - 1, "distances to exact samples")
        others = [truth.law.sample(other, num) for other in jax.random.split(key_theory, 3)]
        sets = [row.particles.x for row in rows] + others
        distances = _side_by_side(lambda x: tj.metrics.wasserstein(x, exact), sets)
        rows = [row._replace(distance=w2) for row, w2 in zip(rows, distances, strict=False)]
        floor = float(np.mean(distances[len(rows) :]))
        meter.update(stages, "done")

    print(
        f"{problem.name}: {_describe(problem.name)}\n"
        f"scale {problem.scale:g}, {num} samples of each method, {steps} Heun steps, "
        f"log Z = {float(truth.law.log_norm):.4f}\n"
        f"mode masses of the tilt: {_masses(truth.masses)}\n"
        f"W2 is the distance to exact samples; other exact samples are {floor:.3f} away\n"
        "seconds: compilation, several side by side, and a run after it\n"
    )
    _print_table(problem, truth, rows, floor, key_theory, num)
    if len(problem.prior.log_weights) > 1:
        print(
            "\nFor several modes, theory's laws of plug-in, damping and FMRG treat each mode\n"
            "alone and keep the weights of the prior."
        )
    print(*failed, sep="\n", end="\n" if failed else "")
    figure = _figure(problem, truth, exact, rows, floor)
    print(f"figure: {tj.plotting.save(figure, file)}")


def _first_runs(
    methods: Sequence[Method], key: Array, meter: Any
) -> dict[str, float | FloatingPointError]:
    """The seconds that the first run of each method takes, or its error, by the method's name.
    Nearly all of this time is compilation.
    """

    def first(method: Method) -> float | FloatingPointError:
        start = time.perf_counter()
        try:
            jax.block_until_ready(method.run(key).x)
        except FloatingPointError as error:
            return error
        finally:
            done.append(method.name)
            meter.update(len(done), f"compiling and sampling: {method.name}")
        return time.perf_counter() - start

    done: list[str] = []
    followers = [method for method in methods if method.follows]
    leaders = [method for method in methods if not method.follows]
    seconds = [*_side_by_side(first, leaders), *map(first, followers)]
    return dict(zip([method.name for method in leaders + followers], seconds, strict=True))


def _truth(problem: tj.problems.Problem) -> Truth:
    prior, reward, scale = problem.prior, problem.reward, problem.scale
    if theory.is_quadratic(reward):
        law = theory.tilt(prior, reward, scale)
        mean = theory.expected_reward(law.mixture, reward)
        return Truth(law, law.mixture, np.asarray(law.mixture.weights), float(mean))
    law = theory.quadrature.tilt(prior, reward, scale)
    masses = law.expect(lambda x: jax.nn.softmax(prior.component_log_probs(x)))
    return Truth(law, prior, np.asarray(masses), float(law.expect(reward)))


def _methods(problem: tj.problems.Problem, num: int, steps: int) -> list[Method]:
    prior, reward, scale = problem.prior, problem.reward, problem.scale
    model = tj.Analytic(prior)
    damping = tj.Damped(scale, problem.sigma)

    def run(
        guidance: tj.guidance.Guidance | None = None, model: tj.Model = model
    ) -> Callable[[Array], tj.Particles]:
        return lambda key: tj.sample(
            key, model, guidance, num=num, steps=steps, save_trajectory=True
        )

    def best(guidance: tj.guidance.Guidance) -> Callable[[Array], tj.Particles]:
        # Several runs of the program that is compiled already, not a larger run of a new one.
        one = run(guidance)
        return lambda key: tj.best_of_n(
            _pool([one(k) for k in jax.random.split(key, CANDIDATES)]), reward, CANDIDATES
        )

    def law(
        predict: Callable[..., tj.GaussianMixture], *arguments: Any
    ) -> tj.GaussianMixture | None:
        # Without a closed form the table shows a dash.
        return predict(prior, reward, *arguments) if theory.is_quadratic(reward) else None

    glass = tj.Glass(model)
    tilted = law(lambda *arguments: theory.tilt(*arguments).mixture, scale)
    plug_in, damped = tj.PlugIn(glass, reward, scale), tj.PlugIn(glass, reward, damping)
    one_mode = len(prior.weights) == 1
    exact_h = run(tj.Doob(model, theory.log_h(prior, reward, scale)))
    dps_law = law(theory.plug_in_law, scale) if one_mode else None
    methods = [
        Method("no guidance", run(), prior),
        Method("exact h", exact_h, tilted, exact=True),
        Method("plug-in, k = 1", run(plug_in), law(theory.plug_in_law, scale)),
        Method("plug-in, k = 8", run(tj.PlugIn(glass, reward, scale, k=8))),
        Method(f"best of {CANDIDATES}", best(plug_in), follows=True),
        Method("damped, k = 1", run(damped), law(theory.plug_in_law, damping)),
        Method(f"damped best of {CANDIDATES}", best(damped), follows=True),
        Method("Laplace", run(tj.Laplace(model, reward, scale)), tilted if one_mode else None),
        Method("DPS", run(tj.dps(model, reward, scale)), dps_law),
        Method("FMRG", run(tj.fmrg(model, reward, scale)), law(theory.fmrg_law, scale)),
    ]
    try:
        conjugate = tj.Tilted(model, reward, scale)
    except ValueError:  # not a conjugate reward: no exact tilted model
        return methods
    return [*methods[:2], Method("Tilted", run(model=conjugate), tilted, exact=True), *methods[2:]]


def _pool(runs: Sequence[tj.Particles]) -> tj.Particles:
    """All particles of several runs as one population."""
    parts = lambda run: (run.x, run.log_weights, run.trace.trajectory)
    x, log_weights, trajectory = zip(*map(parts, runs), strict=True)
    pooled = jnp.concatenate(x), jnp.concatenate(log_weights), jnp.concatenate(trajectory, axis=1)
    return eqx.tree_at(parts, runs[0], pooled)


def _side_by_side(fn: Callable, items: Sequence[Any]) -> list:
    """`fn` of all items, as many at once as there are cores: compilation and exact transport use
    one core each.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(fn, items))


def _print_table(
    problem: tj.problems.Problem,
    truth: Truth,
    rows: Sequence[Row],
    floor: float,
    key: Array,
    num: int,
) -> None:
    from rich import box, console, table

    view = table.Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=0)
    view.add_column("method")
    for title in ("mean reward", "W2", "modes"):
        view.add_column(title, justify="right")
        view.add_column("theory", justify="right", style="cyan")
    view.add_column("compile", justify="right")
    view.add_column("run", justify="right")
    exact = truth.law.sample(jax.random.fold_in(key, 3), num)
    predict = lambda row: _predicted(row.method, problem, truth, floor, exact, key)
    for row, predicted in zip(rows, _side_by_side(predict, rows), strict=True):
        reward, error = row.reward
        view.add_row(
            row.method.name,
            f"{reward:.3f}±{f'{error:.3f}'.removeprefix('0')}",
            predicted[0],
            f"{row.distance:.3f}",
            predicted[1],
            _masses(row.masses),
            predicted[2],
            f"{row.compilation:.2f}",
            f"{row.duration:.3f}",
            style="bold" if row.method.exact else None,
        )
    screen = console.Console(highlight=False)
    if not screen.is_terminal:
        screen.width = max(screen.width, 120)  # files have no edge
    screen.print(view)


def _predicted(
    method: Method,
    problem: tj.problems.Problem,
    truth: Truth,
    floor: float,
    exact: Array,
    key: Array,
) -> tuple[str, str, str]:
    """Theory's mean reward, distance and masses."""
    if method.exact:
        return f"{truth.reward:.3f}", f"{floor:.3f}", _masses(truth.masses)
    if method.law is None:
        return "-", "-", "-"
    drawn = method.law.sample(jax.random.fold_in(key, 4), len(exact))
    reward = (
        theory.expected_reward(method.law, problem.reward)
        if theory.is_quadratic(problem.reward)
        else jnp.mean(jax.vmap(problem.reward)(drawn))
    )
    distance = tj.metrics.wasserstein(drawn, exact)
    return f"{float(reward):.3f}", f"{distance:.3f}", _masses(method.law.weights)


def _masses(masses: Any) -> str:
    return "/".join(f"{float(mass):.2f}".removeprefix("0") for mass in masses)


def _figure(
    problem: tj.problems.Problem, truth: Truth, exact: Array, rows: Sequence[Row], floor: float
) -> Any:
    panels = [tj.plotting.Panel("exact tilt", exact, note=f"W2 floor {floor:.2f}", highlight=True)]
    for row in rows:
        trace = row.particles.trace
        trajectory = None if trace is None else trace.trajectory
        note = f"W2 {row.distance:.2f}"
        panels.append(
            tj.plotting.Panel(row.method.name, row.particles, trajectory, note, row.method.exact)
        )
    return tj.plotting.comparison(
        panels,
        log_density=truth.law.log_prob,
        bounds=np.asarray(problem.bounds),
        suptitle=f"{problem.name}: the tilt at scale {problem.scale:g}, and samples of each method",
    )
