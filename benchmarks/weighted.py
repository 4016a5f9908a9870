"""Do weighted particles reach the tilt, and is log Z right?

W2 of 2,000 particles after 200 steps to the exact tilt, over the floor of two exact sets, mean over five runs; log Z with 1,000 steps. Proposals by the
kernel at the tilted denoiser (`Guided`) and by the score (`Shifted`), with Laplace's twist, and with the exact one; `double_well` folded by the
sign of x_1. The bump on the line: P(X >= 0), which is .98472. The checkerboard: mean reward and covariance trace, which are .9139 and .4607, by the
drift of `Conjugate` with the twist `scale * r(D)`.

    python benchmarks/weighted.py [--quick]
"""

import argparse
import warnings

import common
import jax
import jax.numpy as jnp
import numpy as np

import theory
import tiltjax as tj

MIXTURES = ("gaussian", "quadratic", "noniso", "unequal", "uncentered")


def twists(problem: tj.problems.Problem, model: tj.Model) -> dict[str, tj.Guidance]:
    return {
        "Laplace": tj.Laplace(model, problem.reward, problem.scale),
        "exact": tj.Doob(model, theory.log_h(problem.prior, problem.reward, problem.scale)),
    }


def planar(name: str, num: int, runs: int, long: int) -> dict:
    problem = tj.problems.get(name)
    model = tj.Analytic(problem.prior)
    closed = theory.is_quadratic(problem.reward)
    truth = (theory.tilt if closed else theory.quadrature.tilt)(problem.prior, problem.reward, problem.scale)
    fold = (lambda x: x) if closed else (lambda x: x.at[:, 0].set(jnp.abs(x[:, 0])))
    exact = [fold(truth.sample(jax.random.key(1000 + i), num)) for i in range(runs + 1)]
    floor = np.mean([tj.metrics.wasserstein(exact[i], exact[i + 1]) for i in range(runs)])
    row: dict = {"floor": float(floor), "log_norm": float(truth.log_norm)}
    for twist, guidance in twists(problem, model).items():
        if twist == "exact" and not closed:
            continue
        for proposal in (tj.proposals.Guided(), tj.proposals.Shifted()):
            distances, shares = [], []
            for i in range(runs):
                found = tj.smc(jax.random.key(i), model, guidance, num=num, steps=200, proposal=proposal)
                points = fold(found.resample(jax.random.key(100 + i), num))
                distances.append(tj.metrics.wasserstein(points, exact[i]))
                shares.append(float(found.ess) / num)
            finer = tj.smc(jax.random.key(0), model, guidance, num=num, steps=long, proposal=proposal)
            row[f"{twist}, {type(proposal).__name__}"] = {
                "over_floor": float(np.mean(distances) / floor),
                "error": float(np.std(distances) / np.sqrt(runs) / floor),
                "share": float(np.mean(shares)),
                "log_norm_off": float(finer.log_norm - truth.log_norm),
            }
    return row


def line(num: int, runs: int) -> dict:
    problem = tj.problems.bump()
    model = tj.Analytic(problem.prior)
    truth = theory.quadrature.tilt(problem.prior, problem.reward, problem.scale)
    right = lambda x: jnp.where(x[0] >= 0, 1.0, 0.0)
    guidance = tj.Doob(model, theory.log_h(problem.prior, problem.reward, problem.scale))
    # Twists that do not know the answer: the reward at the denoiser, and an average of draws.
    rows: dict = {"exact": float(truth.expect(right))}
    for name, twist in {
        "exact h": guidance,
        "dps": tj.dps(model, problem.reward, problem.scale),
        "16 draws": tj.PlugIn(tj.Exact(model), problem.reward, problem.scale, k=16),
    }.items():
        shares = [
            float(tj.smc(jax.random.key(i), model, twist, num=num, steps=200, proposal=tj.proposals.Base()).mean(right))
            for i in range(runs)
        ]
        rows[name] = {"share": float(np.mean(shares)), "error": float(np.std(shares, ddof=1) / np.sqrt(runs))}
    return rows


def board(num: int, runs: int) -> dict:
    model, reward, scale = tj.Checkerboard(), tj.rewards.Bump([0.5, 0.5], 1.5), 10.0
    twist = tj.dps(model, reward, scale)
    variance = tj.calibrate(model, jax.random.key(0))
    rows: dict = {"exact": [0.9139, 0.4607]}
    for name, settings in {
        "Conjugate, twist r(D)": {
            "guidance": tj.Conjugate(model, reward, scale, variance=variance, keep=0.0),
            "twist": twist,
        },
        "base, twist r(D)": {"guidance": twist, "proposal": tj.proposals.Base()},
    }.items():
        found = []
        for i in range(runs):
            particles = tj.smc(jax.random.key(i), model, num=num, steps=400, **settings)
            mean = particles.mean()
            trace = particles.mean(lambda x, mean=mean: jnp.sum((x - mean) ** 2))
            found.append(
                (float(particles.mean(reward)), float(trace), float(particles.log_norm), float(particles.ess) / num)
            )
        average, error = np.mean(found, axis=0), np.std(found, axis=0, ddof=1) / np.sqrt(runs)
        rows[name] = {
            key: [float(average[i]), float(error[i])] for i, key in enumerate(("reward", "trace", "log_norm", "share"))
        }
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few particles and steps")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", "the effective share")  # it is in the table
    num, runs, long = (300, 2, 200) if args.quick else (2000, 5, 1000)
    table = {name: planar(name, num, runs, long) for name in (*MIXTURES, "double_well")}
    print(
        "| problem | floor | weighted | W2 / floor | effective share | log Z off, 1,000 steps |\n|---|---|---|---|---|---|"
    )
    for name, row in table.items():
        for method, cell in row.items():
            if isinstance(cell, dict):
                print(
                    f"| {name} | {row['floor']:.3f} | {method} | {cell['over_floor']:.2f} ± {cell['error']:.2f} | {cell['share']:.2f} | "
                    f"{cell['log_norm_off']:+.3f} |"
                )
    on_line, checkerboard = line(num, 2 * runs), board(num, runs)
    print(f"\nbump: {on_line}\n\ncheckerboard: {checkerboard}")
    if not args.quick:
        found = {"num": num, "runs": runs, "planar": table, "bump": on_line, "checkerboard": checkerboard}
        print(f"\nwritten: {common.write('weighted', found)}")


if __name__ == "__main__":
    main()
