"""Which distance to the tilt does the theory predict for each method, without a run?

The tables show the predicted W2 to the tilt on the problem `gaussian` (scale 3), one Gaussian, so
that the laws are exact. They cover plug-in by its number of draws; one damped draw by the error of
its width, with the smallest k at which undamped plug-in is closer (`theory.matching_k`); and
`theory.recommend` at several budgets of denoiser calls. Published: one damped particle matches
eight to sixteen undamped ones.

    python -m benchmarks.accuracy.predictions [--quick]
"""

import argparse
import time

import jax
import jax.numpy as jnp

import theory
import tiltjax as tj
from benchmarks import common

DRAWS = (1, 2, 4, 8, 16, 64, 256, 1024, 4096)
WIDTHS = (0.5, 0.7, 0.8, 0.9, 1.0, 1.1, 1.4, 2.0)
BUDGETS = (10, 100, 1000, 10_000)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few rows")
    args = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    problem = tj.problems.get("gaussian")
    prior, reward, scale = problem.prior, problem.reward, float(problem.scale)
    tilt = theory.tilt(prior, reward, scale).mixture
    std = float(jnp.sqrt(prior.covs[0, 0, 0]))
    far = lambda mean, cov: float(jnp.sqrt(theory.bures(mean, cov, tilt.means[0], tilt.covs[0])))

    plain = {}
    for k in DRAWS[:2] if args.quick else DRAWS:
        law = theory.plug_in_law(prior, reward, scale, k=k)
        plain[k] = far(law.mean(), law.cov())
    fmrg = theory.fmrg_law(prior, reward, scale)
    others = {
        "no guidance": far(prior.means[0], prior.covs[0]),
        "FMRG": far(fmrg.means[0], fmrg.covs[0]),
    }
    print("| k | W2 of plug-in |\n|---|---|")
    for k, distance in plain.items():
        print(f"| {k:,} | {distance:.4f} |")
    for name, distance in others.items():
        print(f"{name}: {distance:.4f}")

    print("\n| sigma / s | W2, damped, k = 1 | plug-in needs k = |\n|---|---|---|")
    damped = {}
    for ratio in (0.5,) if args.quick else WIDTHS:
        scale_law = tj.Damped(scale, ratio * std)
        law = theory.plug_in_law(prior, reward, scale_law)
        k = theory.matching_k(prior, reward, scale_law)
        damped[ratio] = {"w2": far(law.means[0], law.covs[0]), "k": k}
        print(
            f"| {ratio:g} | {damped[ratio]['w2']:.4f} "
            f"| {'none up to 10,000' if k is None else f'{k:,}'} |",
            flush=True,
        )

    plans = {}
    for budget in BUDGETS[1:2] if args.quick else BUDGETS:
        start = time.perf_counter()
        plan = theory.recommend(prior, reward, scale, budget)
        seconds = time.perf_counter() - start
        print(f"\n{budget:,} calls a sample ({seconds:.1f} s):\n{plan}", flush=True)
        plans[budget] = [
            {"method": o.method, "steps": o.steps, "cost": o.cost, "w2": o.error, "basis": o.basis}
            for o in plan.options
        ]
    if not args.quick:
        found = {"plain": plain, "others": others, "damped": damped, "plans": plans}
        common.write("predictions", found)


if __name__ == "__main__":
    main()
