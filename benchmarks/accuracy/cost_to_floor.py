"""How much computation does each method need to sample the tilt accurately?

Every method runs on the two-mode quadratic mixture (scale 3, 2,000 samples) with increasingly
expensive settings. Reported is the cheapest setting whose W2 to the tilt, averaged over seeds, is
within 1.2 times the floor, in CPU-seconds and in denoiser calls and pullbacks per sample. For a
method that never reaches this bound, the setting with the smallest W2 is listed.

    python -m benchmarks.accuracy.cost_to_floor [--quick]
"""

import argparse
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np

import theory
import tiltjax as tj
from benchmarks import common


class Setting(NamedTuple):
    """One setting of a method. `forward` and `backward` are the denoiser calls and the pullbacks
    through them, per evaluation of the field.
    """

    method: str
    label: str
    model: tj.Model
    guidance: tj.guidance.Guidance | None
    steps: int
    forward: int
    backward: int


def settings(problem: tj.problems.Problem) -> Iterator[Setting]:
    """All settings, by increasing cost within each method."""
    prior, reward, scale = problem.prior, problem.reward, problem.scale
    model = tj.Analytic(prior)
    damping, glass = tj.Damped(scale, problem.sigma), tj.Glass(model, inner_steps=20)
    calls = lambda k: common.plug_in_calls(glass.steps, k)
    exact = tj.Doob(model, theory.log_h(prior, reward, scale))
    for steps in (5, 10, 20, 50):
        yield Setting(
            "Tilted", f"{steps} steps", tj.Tilted(model, reward, scale), None, steps, 1, 0
        )
    for steps in (5, 10, 20, 50):
        yield Setting("exact h", f"{steps} steps", model, exact, steps, 1, 0)
    for steps in (20, 50, 200):
        yield Setting(
            "Laplace",
            f"{steps} steps",
            model,
            tj.Laplace(model, reward, scale),
            steps,
            1,
            prior.dim,
        )
    for steps in (50, 100, 200, 800):
        guidance = tj.PlugIn(glass, reward, damping)
        yield Setting("damped, k = 1", f"{steps} steps", model, guidance, steps, calls(1), calls(1))
    for k in (8, 32):
        guidance = tj.PlugIn(glass, reward, damping, k=k)
        yield Setting(
            "damped, k > 1", f"k = {k}, 50 steps", model, guidance, 50, calls(k), calls(k)
        )
    for k in (1, 8, 32, 128):
        guidance = tj.PlugIn(glass, reward, scale, k=k)
        yield Setting("plug-in", f"k = {k}, 50 steps", model, guidance, 50, calls(k), calls(k))
    yield Setting("DPS", "50 steps", model, tj.dps(model, reward, scale), 50, 1, 1)
    yield Setting(
        "FMRG", "50 steps", model, tj.fmrg(model, reward, scale, inner_steps=20), 50, 42, 41
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="500 samples, two seeds")
    args = parser.parse_args()
    num, seeds = (500, 2) if args.quick else (2000, 5)
    problem = tj.problems.quadratic()
    truth = theory.tilt(problem.prior, problem.reward, problem.scale)
    exact = [truth.sample(jax.random.key(1000 + seed), num) for seed in range(seeds)]
    floor = np.mean(
        [
            tj.metrics.wasserstein(x, truth.sample(jax.random.key(2000 + i), num))
            for i, x in enumerate(exact)
        ]
    )
    print(f"floor {floor:.4f}\n", flush=True)

    best: dict[str, dict] = {}
    for method, setting, model, guidance, steps, forward, backward in settings(problem):
        if best.get(method, {}).get("over_floor", np.inf) <= 1.2:
            continue
        samples = {}

        def run(seed, model=model, guidance=guidance, steps=steps, samples=samples):
            samples[seed] = tj.sample(jax.random.key(seed), model, guidance, num=num, steps=steps).x
            return samples[seed]

        timing = common.timed(run, repeats=seeds - 1)
        over = (
            np.array([tj.metrics.wasserstein(samples[seed], exact[seed]) for seed in range(seeds)])
            / floor
        )
        evaluations = 2 * steps - 1  # Heun has two stages, and its last step one
        calls = {"forward": forward * evaluations, "backward": backward * evaluations}
        row = {
            "setting": setting,
            **calls,
            "over_floor": over.mean(),
            "error": over.std(ddof=1) / seeds**0.5,
        }
        row |= timing._asdict()
        print(
            f"{method:14s} {setting:18s} {row['over_floor']:6.2f} x floor, {timing.run_cpu:.4f} "
            "CPU-s",
            flush=True,
        )
        if row["over_floor"] < best.get(method, {}).get("over_floor", np.inf):
            best[method] = row

    print(
        "\n| method | within 1.2 x floor | setting | W2 / floor | CPU-s | denoiser calls | "
        "pullbacks |\n|---|---|---|---|---|---|---|"
    )
    for method, row in best.items():
        reached = "yes" if row["over_floor"] <= 1.2 else "never"
        print(
            f"| {method} | {reached} | {row['setting']} | {row['over_floor']:.2f} ± "
            f"{row['error']:.2f} | {row['run_cpu']:.4f} "
            f"| {row['forward']:,} | {row['backward']:,} |"
        )
    if not args.quick:
        common.write("cost_to_floor", {"num": num, "seeds": seeds, "floor": floor, "methods": best})


if __name__ == "__main__":
    main()
