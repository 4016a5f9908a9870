"""How far from the tilt of a Gaussian mixture are the samples of each method, and what do they
cost?

Five mixtures have the reward -|x - (0, 2.5)|^2 at scale 3, in the published setting: 2,000 samples,
49 Heun steps on [.001, .999], 20 GLASS steps, scores clipped at length 100. W2 is the exact
2-Wasserstein distance to 2,000 exact samples, the mean over seeds with its standard error. The
floor is the distance between two exact sets. Published numbers: the code of Dandapanthula and Boffi
(arXiv 2606.02884), one run each.

    python -m benchmarks.accuracy.gaussian_tilt [--quick]
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np

import theory
import tiltjax as tj
from benchmarks import common

PROBLEMS = ("gaussian", "quadratic", "noniso", "unequal", "uncentered")
PUBLISHED = {
    "floor": (0.053, 0.072, 0.064, 0.065, 0.053),
    "exact h": (0.053, 0.067, 0.061, 0.067, 0.053),
    "plug-in k=1": (1.216, 1.260, 1.607, 1.266, 1.369),
    "plug-in k=2": (1.038, 1.140, 1.502, 1.172, 1.367),
    "plug-in k=4": (0.844, 1.026, 1.379, 1.115, 1.294),
    "plug-in k=8": (0.678, 0.966, 1.298, 1.099, 1.149),
    "plug-in k=16": (0.545, 0.961, 1.221, 1.114, 0.981),
    "damped k=1": (0.052, 0.256, 0.282, 0.295, 0.958),
    "FMRG": (0.796, 1.009, None, None, None),
}


def methods(
    problem: tj.problems.Problem,
) -> dict[str, tuple[tj.Model, tj.guidance.Guidance | None]]:
    """The table's rows as (model, guidance)."""
    model = tj.Analytic(problem.prior)
    glass, reward, scale = tj.Glass(model, inner_steps=20), problem.reward, problem.scale

    def plug_in(scale, k=1):
        return model, tj.guidance.wrappers.Clipped(tj.PlugIn(glass, reward, scale, k=k), 100.0)

    rows = {"exact h": (model, tj.Doob(model, theory.log_h(problem.prior, reward, scale)))}
    rows |= {f"plug-in k={k}": plug_in(scale, k) for k in (1, 2, 4, 8, 16)}
    rows["damped k=1"] = plug_in(tj.Damped(scale, problem.sigma))
    rows["FMRG"] = (model, tj.guidance.wrappers.Clipped(tj.fmrg(model, reward, scale), 100.0))
    rows["Laplace"] = (model, tj.Laplace(model, reward, scale))
    rows["Tilted"] = (tj.Tilted(model, reward, scale), None)
    return rows


def mean_and_error(values) -> tuple[float, float]:
    return float(np.mean(values)), float(np.std(values, ddof=1) / np.sqrt(len(values)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="500 samples, two seeds")
    args = parser.parse_args()
    num, seeds = (500, 2) if args.quick else (2000, 8)
    times = jnp.linspace(0.001, 0.999, 50)
    table: dict[str, dict[str, dict]] = {}

    for column, name in enumerate(PROBLEMS):
        problem = tj.problems.get(name)
        truth = theory.tilt(problem.prior, problem.reward, problem.scale)
        exact = [truth.sample(jax.random.key(1000 + seed), num) for seed in range(seeds)]
        again = [truth.sample(jax.random.key(2000 + seed), num) for seed in range(seeds)]
        floor = mean_and_error(
            [tj.metrics.wasserstein(x, y) for x, y in zip(exact, again, strict=True)]
        )
        table.setdefault("floor", {})[name] = {"w2": floor, "published": PUBLISHED["floor"][column]}
        for method, (model, guidance) in methods(problem).items():
            samples = {}

            def run(seed, model=model, guidance=guidance, samples=samples):
                samples[seed] = tj.sample(
                    jax.random.key(seed), model, guidance, num=num, times=times
                ).x
                return samples[seed]

            timing = common.timed(run, repeats=seeds - 1)
            w2 = mean_and_error(
                [tj.metrics.wasserstein(samples[seed], exact[seed]) for seed in range(seeds)]
            )
            cell = {"w2": w2, "over_floor": w2[0] / floor[0], **timing._asdict()}
            cell["published"] = PUBLISHED.get(method, (None,) * 5)[column]
            if cell["published"]:
                # The published value is one run, whose standard error is the spread between runs.
                cell["sigmas"] = (w2[0] - cell["published"]) / (w2[1] * (1 + seeds) ** 0.5)
            table.setdefault(method, {})[name] = cell
            print(
                f"{name:11s} {method:13s} W2 {w2[0]:.3f} ± {w2[1]:.3f} (published "
                f"{cell['published'] or '-'}, {cell.get('sigmas', 0):+.1f} "
                f"standard errors), "
                f"{cell['over_floor']:5.2f} x floor; run {timing.run_wall:.3f} s, "
                f"{timing.run_cpu:.3f} CPU-s; "
                f"first call {timing.first_wall:.1f} s",
                flush=True,
            )

    print(f"\nW2 to the tilt, {num} samples, {seeds} seeds (published in brackets)\n")
    print("| method | " + " | ".join(PROBLEMS) + " | CPU-s (quadratic) |")
    print("|---|" + "---|" * (len(PROBLEMS) + 1))
    for method, row in table.items():
        cells = []
        for name in PROBLEMS:
            (mean, error), published = row[name]["w2"], row[name]["published"]
            cells.append(f"{mean:.3f} ± {error:.3f}" + (f" ({published:.3f})" if published else ""))
        cpu = row["quadratic"].get("run_cpu")
        print(f"| {method} | " + " | ".join(cells) + f" | {'' if cpu is None else f'{cpu:.3f}'} |")
    if not args.quick:
        common.write("gaussian_tilt", {"num": num, "seeds": seeds, "table": table})


if __name__ == "__main__":
    main()
