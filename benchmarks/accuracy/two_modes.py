"""Does selection correct the mode weights of guided samples on the line, and where does it
overshoot?

Reported is P(X >= 0) after best-of-n of plug-in guided samples (k = 1, 50 GLASS steps, 2,000
groups, scale 5). The first reward is a step, for which theory gives 1 - 2^-n. The second is a
bounded bump on the right mode, for which the tilt has .98472. Published: the code of Dandapanthula
and Boffi (arXiv 2606.02884).

    python -m benchmarks.accuracy.two_modes [--quick]
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np

import theory
import tiltjax as tj
from benchmarks import common

SIZES = (1, 2, 4, 8, 16)
PUBLISHED = {"step": (0.502, 0.750, 0.940, 0.996, 1.0), "bump": (0.930, 0.996, 1.0, 1.0, 1.0)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="200 groups")
    args = parser.parse_args()
    groups = 200 if args.quick else 2000
    rows = {}
    for name in ("step", "bump"):
        problem = tj.problems.get(name)
        model = tj.Analytic(problem.prior)
        guidance = tj.PlugIn(tj.Glass(model, inner_steps=50), problem.reward, problem.scale)
        truth = float(
            theory.quadrature.tilt(problem.prior, problem.reward, problem.scale).expect(
                lambda x: jnp.where(x[0] >= 0, 1.0, 0.0)
            )
        )

        def run(seed, model=model, guidance=guidance):
            return tj.sample(
                jax.random.key(seed), model, guidance, num=max(SIZES) * groups, steps=100
            )

        timing = common.timed(run, repeats=3)
        particles = run(0)
        print(
            f"\n{name}: the tilt has P(X >= 0) = {truth:.5f}; {timing.run_cpu:.2f} CPU-s for "
            f"{len(particles)} samples"
        )
        print("| n | P(X >= 0) | standard error | 1 - 2^-n | published |\n|---|---|---|---|---|")
        rows[name] = {"tilt": truth, **timing._asdict(), "best_of_n": {}}
        for n, published in zip(SIZES, PUBLISHED[name], strict=True):
            right = np.asarray(tj.best_of_n(particles, problem.reward, n).x[:groups, 0] >= 0)
            share, error = (
                right.mean(),
                np.sqrt(max(right.mean() * (1 - right.mean()), 1 / groups) / groups),
            )
            expected = 1 - 0.5**n if name == "step" else None
            rows[name]["best_of_n"][n] = {
                "share": float(share),
                "error": float(error),
                "published": published,
            }
            print(
                f"| {n} | {share:.4f} | {error:.4f} "
                f"| {'' if expected is None else f'{expected:.4f}'} | {published:.3f} |"
            )
    if not args.quick:
        common.write("two_modes", {"groups": groups, "problems": rows})


if __name__ == "__main__":
    main()
