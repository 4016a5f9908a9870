r"""The demonstration: `python -m tiltjax` samples one tilt with every method and shows where each
of them lands.

For a problem of `tiltjax.problems` it prints a table, measured beside what `theory` predicts, and
draws one figure. Run times are those of a second call; the first one compiles.
"""

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

import theory
import tiltjax as tj
from tiltjax import _checks, _progress

GROUP = 4  # candidates of a best-of-n


class Method(NamedTuple):
    """A row of the table: how to sample it, and the law that theory predicts for it, if it does."""

    name: str
    run: Callable[[Array], tj.Particles]
    law: tj.GaussianMixture | None = None
    exact: bool = False


class Row(NamedTuple):
    """What was measured of a method."""

    method: Method
    particles: tj.Particles
    reward: tuple[float, float]
    distance: float
    masses: np.ndarray
    first: float
    again: float


def main(arguments: list[str] | None = None) -> int:
    """Run the demonstration; the exit status is 0, or 2 after a sentence about what was wrong."""
    options = _parse(arguments)
    if options.list:
        for name in tj.problems.NAMES:
            print(f"{name:12s} {_describe(name)}")
        return 0
    try:
        _demonstrate(options)
    except (ValueError, TypeError, OSError, FloatingPointError, ImportError) as error:
        print(f"tiltjax: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("tiltjax: interrupted, no figure was written", file=sys.stderr)
        return 130
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tiltjax",
        description="Sample a tilted law with every method, and see how far each lands from it.",
    )
    parser.add_argument(
        "--problem", default="quadratic", help="a named problem (default: quadratic)"
    )
    parser.add_argument("--list", action="store_true", help="list the problems and stop")
    parser.add_argument(
        "--scale", type=float, help="inverse temperature of the tilt (default: the problem's)"
    )
    parser.add_argument("--num", type=int, default=2000, help="samples a method (default: 2000)")
    parser.add_argument(
        "--steps", type=int, default=50, help="Heun steps of the flow (default: 50)"
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    parser.add_argument(
        "--output", default="tilt.png", help="the figure: .png, .pdf or .svg (default: tilt.png)"
    )
    return parser.parse_args(arguments)


def _describe(name: str) -> str:
    return (getattr(tj.problems, name).__doc__ or "").splitlines()[0]


def _demonstrate(options: argparse.Namespace) -> None:
    problem = tj.problems.get(options.problem)
    if options.scale is not None:
        problem = problem._replace(scale=float(tj.scales.Constant(options.scale).final))
    _checks.count(options.steps, "--steps")
    if not 0 <= options.seed < 2**32:
        raise ValueError(f"--seed must lie between 0 and 2^32 - 1, got {options.seed}")
    if options.num < 10:
        raise ValueError(
            f"--num must be at least 10 for the statistics to mean anything, got {options.num}"
        )
    output = tj.plotting.target(options.output)

    truth, weights = _truth(problem)
    keys = jax.random.split(jax.random.key(options.seed), 4)
    exact = truth.sample(keys[0], options.num)
    methods = _methods(problem, options)

    rows, failed = [], []
    stages = 2 * len(methods) + 1
    with _progress.meter("tilting", stages) as meter:
        floor = _floor(truth, keys[1], exact, options.num)
        meter.update(1, "measuring the floor")
        for index, method in enumerate(methods):
            meter.update(2 * index + 1, f"{method.name}: compiling and sampling")
            start = time.perf_counter()
            try:
                jax.block_until_ready(method.run(keys[2]).x)
            except (
                FloatingPointError
            ) as error:  # one method diverging says something about that method alone
                failed.append(f"{method.name:22s} {error}")
                continue
            first = time.perf_counter() - start
            meter.update(2 * index + 2, f"{method.name}: sampling again, measuring")
            start = time.perf_counter()
            particles = jax.block_until_ready(method.run(keys[3]))
            again = time.perf_counter() - start
            rewards = jax.vmap(problem.reward)(particles.x)
            reward = float(jnp.mean(rewards)), float(tj.metrics.standard_error(rewards))
            masses = np.asarray(tj.metrics.mode_weights(particles.x, weights))
            distance = tj.metrics.wasserstein(particles.x, exact)
            rows.append(Row(method, particles, reward, distance, masses, first, again))
        meter.update(stages, "done")

    _print(problem, truth, weights, rows, floor, options, keys[1])
    if failed:
        print("\n" + "\n".join(failed))
    figure = tj.plotting.comparison(
        [tj.plotting.Panel("exact tilt", exact, note=f"W2 floor {floor:.2f}", highlight=True)]
        + [
            tj.plotting.Panel(
                row.method.name,
                row.particles,
                None if row.particles.trace is None else row.particles.trace.trajectory,
                f"W2 {row.distance:.2f}",
                row.method.exact,
            )
            for row in rows
        ],
        log_density=truth.log_prob,
        bounds=np.asarray(problem.bounds),
        suptitle=f"{problem.name}: the tilt at scale {problem.scale:g}, and what each method samples",
    )
    print(f"\nfigure: {tj.plotting.save(figure, output)}")


def _truth(problem: tj.problems.Problem) -> tuple[Any, tj.GaussianMixture]:
    """The exact tilt, and the mixture by whose responsibilities modes are told apart."""
    if theory.is_quadratic(problem.reward):
        truth = theory.tilt(problem.prior, problem.reward, problem.scale)
        return truth, truth.mixture
    return theory.quadrature.tilt(problem.prior, problem.reward, problem.scale), problem.prior


def _methods(problem: tj.problems.Problem, options: argparse.Namespace) -> list[Method]:
    prior, reward, scale = problem.prior, problem.reward, problem.scale
    model = tj.Analytic(prior)
    damping = tj.Damped(scale, problem.sigma)

    def run(
        guidance: tj.guidance.Guidance | None = None, model: tj.Model = model
    ) -> Callable[[Array], tj.Particles]:
        return lambda key: tj.sample(
            key, model, guidance, num=options.num, steps=options.steps, save_trajectory=True
        )

    def best(guidance: tj.guidance.Guidance) -> Callable[[Array], tj.Particles]:
        # GROUP runs of the program that is compiled already, rather than one larger run of a new
        # one.
        one = run(guidance)
        return lambda key: tj.best_of_n(
            _pool([one(k) for k in jax.random.split(key, GROUP)]), reward, GROUP
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
    methods = [
        Method("no guidance", run(), prior),
        Method(
            "exact h", run(tj.Doob(model, theory.log_h(prior, reward, scale))), tilted, exact=True
        ),
        Method("plug-in, k = 1", run(plug_in), law(theory.plug_in_law, scale)),
        Method("plug-in, k = 8", run(tj.PlugIn(glass, reward, scale, k=8))),
        Method(f"best of {GROUP}", best(plug_in)),
        Method("damped, k = 1", run(damped), law(theory.plug_in_law, damping)),
        Method(f"damped best of {GROUP}", best(damped)),
        Method("Laplace", run(tj.Laplace(model, reward, scale)), tilted if one_mode else None),
        Method(
            "DPS",
            run(tj.dps(model, reward, scale)),
            law(theory.plug_in_law, scale) if one_mode else None,
        ),
        Method("FMRG", run(tj.fmrg(model, reward, scale)), law(theory.fmrg_law, scale)),
    ]
    try:
        conjugate = tj.Tilted(model, reward, scale)
    except ValueError:  # not a conjugate reward: no exact tilted model
        return methods
    return [*methods[:2], Method("Tilted", run(model=conjugate), tilted, exact=True), *methods[2:]]


def _pool(runs: list[tj.Particles]) -> tj.Particles:
    """All particles of several runs as one population."""
    parts = lambda run: (run.x, run.log_weights, run.trace.trajectory)
    x, log_weights, path = zip(*map(parts, runs), strict=True)
    pooled = jnp.concatenate(x), jnp.concatenate(log_weights), jnp.concatenate(path, axis=1)
    return eqx.tree_at(parts, runs[0], pooled)


def _floor(truth: Any, key: Array, exact: Array, num: int) -> float:
    others = [truth.sample(other, num) for other in jax.random.split(key, 3)]
    return float(np.mean([tj.metrics.wasserstein(exact, other) for other in others]))


def _print(problem, truth, weights, rows, floor, options, key) -> None:
    tilt_masses = _true_masses(truth, weights)
    print(
        f"{problem.name}: {_describe(problem.name)}\n"
        f"scale {problem.scale:g}, {options.num} samples a method, {options.steps} Heun steps, log "
        f"Z = {float(truth.log_norm):.4f}, "
        f"W2 floor {floor:.3f}, mode masses of the tilt {_masses(tilt_masses)}\n"
    )
    print(
        f"{'':22s}{'mean reward':^27s}{'W2 to the tilt':^18s}{'mode masses':^26s}{'seconds':^16s}"
    )
    header = f"{'method':22s}{'sampled':>17s}{'theory':>10s}{'sampled':>9s}{'theory':>9s}{'sampled':>13s}{'theory':>13s}"
    print(header + f"{'compile':>9s}{'run':>8s}")
    exact = truth.sample(jax.random.fold_in(key, 3), options.num)
    closed = isinstance(truth, theory.Tilt)
    true_reward = (
        theory.expected_reward(truth.mixture, problem.reward)
        if closed
        else truth.expect(problem.reward)
    )
    for row in rows:
        law = row.method.law
        predicted = "-", "-", "-"
        if row.method.exact:
            predicted = f"{true_reward:.3f}", f"{floor:.3f}", _masses(tilt_masses)
        elif law is not None:
            drawn = law.sample(jax.random.fold_in(key, 4), options.num)
            predicted = (
                f"{_mean_reward(law, problem.reward, drawn):.3f}",
                f"{tj.metrics.wasserstein(drawn, exact):.3f}",
                _masses(law.weights),
            )
        reward, error = row.reward
        print(
            f"{row.method.name:22s}{f'{reward:.3f} ± {error:.3f}':>17s}{predicted[0]:>10s}{row.distance:9.3f}{predicted[1]:>9s}"
            f"{_masses(row.masses):>13s}{predicted[2]:>13s}{max(row.first - row.again, 0.0):9.2f}{row.again:8.3f}"
        )
    if len(problem.prior.log_weights) > 1:
        print(
            "\nFor several modes, theory's laws of plug-in, damping and FMRG treat each mode alone "
            "and keep the prior's weights."
        )


def _mean_reward(law: tj.GaussianMixture, reward: tj.rewards.Reward, drawn: Array) -> float:
    if theory.is_quadratic(reward):
        return float(theory.expected_reward(law, reward))
    return float(jnp.mean(jax.vmap(reward)(drawn)))


def _true_masses(truth: Any, weights: tj.GaussianMixture) -> np.ndarray:
    if isinstance(truth, theory.Tilt):
        return np.asarray(truth.mixture.weights)
    return np.asarray(truth.expect(lambda x: jax.nn.softmax(weights.component_log_probs(x))))


def _masses(masses: Any) -> str:
    return "/".join(f"{float(mass):.2f}".removeprefix("0") for mass in masses)


if __name__ == "__main__":
    sys.exit(main())
