"""What does an audit report for each method, and is its report right?

On the five mixtures with a quadratic reward and on `double_well` (scale 1, 100 ancestral steps,
4,000 trajectories), the table has the effective share, the Pareto k of the weights' tail, the KL
between trajectories with its standard error, and log Z minus that of the continuous tilt. It
compares them with W2 between the samples of the same diffusion and the exact tilt, over the floor
(2,000 samples; `double_well`, which is even, is folded by the sign of x_1). The KL between
trajectories is an upper bound of the samples' own divergence: it may be large where W2 is small,
but not the reverse.

    python -m benchmarks.weighted.audits [--quick]
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np

import theory
import tiltjax as tj
from benchmarks import common

PROBLEMS = ("gaussian", "quadratic", "noniso", "unequal", "uncentered", "double_well")
SCALE = 1.0


def guidances(problem: tj.problems.Problem, model: tj.Analytic) -> dict[str, tj.guidance.Guidance]:
    reward, draws = problem.reward, tj.Exact(model)
    rows: dict[str, tj.guidance.Guidance] = {
        "plug-in": tj.PlugIn(draws, reward, SCALE),
        "plug-in, k = 8": tj.PlugIn(draws, reward, SCALE, k=8),
        "damped": tj.PlugIn(draws, reward, tj.Damped(SCALE, problem.sigma)),
        "DPS": tj.dps(model, reward, SCALE),
        "Laplace": tj.Laplace(model, reward, SCALE),
        "Conjugate": tj.Conjugate(
            model, reward, SCALE, variance=tj.calibrate(jax.random.key(0), model, budget=2**18)
        ),
    }
    if theory.is_quadratic(reward):
        rows["exact h"] = tj.Doob(model, theory.log_h(problem.prior, reward, SCALE))
    return rows


def audited(name: str, paths: int, num: int) -> dict:
    problem = tj.problems.get(name)
    model = tj.Analytic(problem.prior)
    closed = theory.is_quadratic(problem.reward)
    truth = (theory.tilt if closed else theory.quadrature.tilt)(
        problem.prior, problem.reward, SCALE
    )
    fold = (lambda x: x) if closed else (lambda x: x * jnp.where(x[:, :1] < 0, -1.0, 1.0))
    exact = [fold(truth.sample(jax.random.key(i), num)) for i in range(4)]
    floor = float(np.mean([tj.metrics.wasserstein(exact[0], other) for other in exact[1:]]))
    row: dict = {"floor": floor}
    for method, guidance in guidances(problem, model).items():
        report = tj.audit(jax.random.key(10), model, guidance, num=paths, steps=100)
        over = float(tj.metrics.wasserstein(fold(report.particles.x[:num]), exact[0])) / floor
        off = report.log_norm.value - float(truth.log_norm)
        row[method] = {
            "share": report.ess_fraction,
            "pareto_k": report.pareto_k,
            "path_kl": list(report.path_kl),
            "log_norm_off": [off, report.log_norm.error],
            "over_floor": over,
            "verdict": report.verdict,
        }
        print(
            f"| {name} | {method} | {report.ess_fraction:.3f} | {report.pareto_k:.2f} | "
            f"{report.path_kl} "
            f"| {off:+.2f} | {over:.2f} |",
            flush=True,
        )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one problem, few paths")
    args = parser.parse_args()
    paths, num = (500, 300) if args.quick else (4000, 2000)
    print(
        "| problem | method | effective share | Pareto k | path KL | log Z off | W2 / floor "
        "|\n|---|---|---|---|---|---|---|"
    )
    table = {name: audited(name, paths, num) for name in (PROBLEMS[:1] if args.quick else PROBLEMS)}
    if not args.quick:
        common.write("audits", {"paths": paths, "scale": SCALE, "table": table})


if __name__ == "__main__":
    main()
