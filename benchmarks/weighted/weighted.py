"""Do weighted particles reach the tilt, and is log Z right?

Reported are W2 of 2,000 particles after 200 steps to the exact tilt, over the floor of two exact
sets, the mean over five runs; and log Z minus that of the continuous tilt, after 200 steps and
after 1,000 (two runs). The difference at 1,000 steps is that of the stepped chain, of order one
over the steps. The proposals are the kernel at the tilted denoiser (`Guided`) and the shift by the
score (`Shifted`), with Laplace's twist and with the exact one. `double_well` is even and is folded
by the sign of x_1; the share of the right half is given too. Its reward is convex between the
wells, where Laplace's twist is wrong; a plain, tempered twist works.

For the bump on the line the table has P(X >= 0), with exact and with estimated twists. For the
checkerboard it has the mean reward and the covariance trace, with the drift of `Conjugate` and
without a drift, with the twist `scale * r(D)`, tempered and not, and without a twist. Values are
means and standard errors over runs; z is relative to the truth by quadrature.

    python -m benchmarks.weighted.weighted [--quick]
"""

import argparse
import warnings

import jax
import jax.numpy as jnp
import numpy as np

import theory
import tiltjax as tj
from benchmarks import common

MIXTURES = ("gaussian", "quadratic", "noniso", "unequal", "uncentered")
Settings = dict[str, dict]


def smooth(problem: tj.problems.Problem, model: tj.Model) -> Settings:
    laplace = tj.Laplace(model, problem.reward, problem.scale)
    exact = tj.Doob(model, theory.log_h(problem.prior, problem.reward, problem.scale))
    return {
        "Laplace, Guided": {"guidance": laplace},
        "Laplace, Shifted": {"guidance": laplace, "proposal": tj.weighted.proposals.Shifted()},
        "exact h, Guided": {"guidance": exact},
    }


def wells(problem: tj.problems.Problem, model: tj.Model) -> Settings:
    dps, base = tj.dps(model, problem.reward, problem.scale), tj.weighted.proposals.Base()
    variance = tj.calibrate(jax.random.key(0), model, budget=2**18)
    conjugate = tj.Conjugate(model, problem.reward, problem.scale, variance=variance)
    return {
        "Laplace, Guided": {"guidance": tj.Laplace(model, problem.reward, problem.scale)},
        "r(D), Base": {"guidance": dps, "proposal": base},
        "r(D), Base, tempered": {
            "guidance": dps,
            "proposal": base,
            "tempering": tj.weighted.tempering.Exponential(),
        },
        "Conjugate, no twist": {"guidance": conjugate, "ess_threshold": 0.0},
    }


def average(values: list) -> list[float]:
    """The mean and its standard error."""
    return [float(np.mean(values)), float(np.std(values, ddof=1) / np.sqrt(len(values)))]


def log_norm(particles: tj.Particles) -> float:
    return float(np.asarray(particles.log_norm))


def planar(name: str, num: int, runs: int, long: int) -> dict:
    problem = tj.problems.get(name)
    model = tj.Analytic(problem.prior)
    closed = theory.is_quadratic(problem.reward)
    truth = (theory.tilt if closed else theory.quadrature.tilt)(
        problem.prior, problem.reward, problem.scale
    )
    fold = (lambda x: x) if closed else (lambda x: x * jnp.where(x[:, :1] < 0, -1.0, 1.0))
    exact = [fold(truth.sample(jax.random.key(1000 + i), num)) for i in range(runs + 1)]
    floor = float(np.mean([tj.metrics.wasserstein(exact[i], exact[i + 1]) for i in range(runs)]))
    row: dict = {"floor": floor, "log_norm": float(truth.log_norm)}
    for method, settings in (smooth if closed else wells)(problem, model).items():
        distances, shares, norms, rights = [], [], [], []
        for i in range(runs):
            found = tj.smc(jax.random.key(i), model, num=num, steps=200, **settings)
            points = fold(found.resample(jax.random.key(100 + i), num))
            rights.append(float(found.mean(lambda x: jnp.where(x[0] >= 0, 1.0, 0.0))))
            distances.append(float(tj.metrics.wasserstein(points, exact[i])) / floor)
            shares.append(float(found.ess) / num)
            norms.append(log_norm(found) - float(truth.log_norm))
        finer = [
            tj.smc(jax.random.key(i), model, num=num, steps=long, **settings) for i in range(2)
        ]
        row[method] = {
            "over_floor": average(distances),
            "share": float(np.mean(shares)),
            "log_norm_off": average(norms),
            "log_norm_off_long": average(
                [log_norm(found) - float(truth.log_norm) for found in finer]
            ),
        }
        cell = row[method]
        if not closed:
            cell["right"] = average(rights)
        over = "{:.2f} ± {:.2f}".format(*cell["over_floor"])
        right = "" if closed else "{:.3f} ± {:.3f}".format(*cell["right"])
        off, late = (
            "{:+.3f} ± {:.3f}".format(*cell[key]) for key in ("log_norm_off", "log_norm_off_long")
        )
        print(
            f"| {name} | {floor:.3f} | {method} | {over} | {cell['share']:.2f} | {right} | {off} "
            f"| {late} |",
            flush=True,
        )
    return row


def line(num: int, runs: int) -> dict:
    problem = tj.problems.bump()
    model = tj.Analytic(problem.prior)
    truth = theory.quadrature.tilt(problem.prior, problem.reward, problem.scale)
    right = lambda x: jnp.where(x[0] >= 0, 1.0, 0.0)
    rows: dict = {"exact": float(truth.expect(right))}
    for name, twist in {
        "exact h": tj.Doob(model, theory.log_h(problem.prior, problem.reward, problem.scale)),
        "r(D)": tj.dps(model, problem.reward, problem.scale),
        "16 draws": tj.PlugIn(tj.Exact(model), problem.reward, problem.scale, k=16),
    }.items():
        shares = [
            float(
                tj.smc(
                    jax.random.key(i),
                    model,
                    twist,
                    num=num,
                    steps=200,
                    proposal=tj.weighted.proposals.Base(),
                ).mean(right)
            )
            for i in range(runs)
        ]
        mean, error = average(shares)
        rows[name] = {"right": [mean, error], "z": (mean - rows["exact"]) / error}
        print(f"| {name} | {mean:.4f} ± {error:.4f} | {rows[name]['z']:+.1f} |", flush=True)
    return rows


def tilted_board(reward, scale: float) -> dict[str, float]:
    """The mean reward, covariance trace and log Z, by Gauss-Legendre nodes in each square."""
    nodes, weights = np.polynomial.legendre.leggauss(40)
    axis = (np.arange(-3.0, 3.0)[:, None] + (nodes + 1) / 2).reshape(-1)
    x = np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1)
    filled = np.floor(x + 3).sum(axis=-1) % 2 == 0
    values = np.asarray(jax.vmap(jax.vmap(reward))(jnp.asarray(x)), np.float64)
    mass = (
        np.outer(np.tile(weights / 2, 6), np.tile(weights / 2, 6))
        * filled
        / 18
        * np.exp(scale * values)
    )
    total = mass.sum()
    mean = np.einsum("ij,ijk->k", mass, x) / total
    trace = np.sum(mass * np.sum((x - mean) ** 2, axis=-1)) / total
    return {
        "reward": float(np.sum(mass * values) / total),
        "trace": float(trace),
        "log_norm": float(np.log(total)),
    }


def board(num: int, runs: int) -> dict:
    model, reward, scale = tj.models.Checkerboard(), tj.rewards.Bump([0.5, 0.5], 1.5), 10.0
    twist, gradual = (
        tj.dps(model, reward, scale),
        {"tempering": tj.weighted.tempering.Exponential()},
    )
    drift = tj.Conjugate(
        model,
        reward,
        scale,
        variance=tj.calibrate(jax.random.key(0), model, budget=2**18),
        smoothing=0.0,
    )
    base = {"guidance": twist, "proposal": tj.weighted.proposals.Base()}
    exact = tilted_board(reward, scale)
    rows: dict = {"exact": exact}
    print("| *exact* | " + " | ".join(f"{value:.4f}" for value in exact.values()) + " | | |")
    for name, settings in {
        "r(D), Base": base,
        "r(D), Base, tempered": base | gradual,
        "r(D), Conjugate": {"guidance": drift, "twist": twist},
        "r(D), Conjugate, tempered": {"guidance": drift, "twist": twist} | gradual,
        "Conjugate, no twist": {"guidance": drift, "ess_threshold": 0.0},
    }.items():
        found: dict[str, list[float]] = {
            "reward": [],
            "trace": [],
            "log_norm": [],
            "share": [],
            "families": [],
        }
        for i in range(runs):
            particles = tj.smc(jax.random.key(i), model, num=num, steps=400, **settings)
            mean = particles.mean()
            found["reward"].append(float(particles.mean(reward)))
            found["trace"].append(
                float(particles.mean(lambda x, mean=mean: jnp.sum((x - mean) ** 2)))
            )
            found["log_norm"].append(log_norm(particles))
            found["share"].append(float(particles.ess) / num)
            found["families"].append(float(particles.num_roots))
        row: dict = {key: average(values) for key, values in found.items()}
        row["z"] = {key: (row[key][0] - exact[key]) / row[key][1] for key in exact}
        rows[name] = row
        print(
            f"| {name} | "
            + " | ".join(
                "{:.4f} ± {:.4f}".format(*row[key]) + f" ({row['z'][key]:+.1f})" for key in exact
            )
            + f" | {row['share'][0]:.2f} | {row['families'][0]:.0f} |",
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few particles and steps")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", "the effective sample size")  # it is in the table
    num, runs, long = (300, 2, 200) if args.quick else (2000, 5, 1000)
    print("\n| bump on the line | P(X >= 0) | z |\n|---|---|---|")
    on_line = line(num, 2 * runs)
    print(
        "\n| checkerboard | mean reward | covariance trace | log Z | share | families "
        "|\n|---|---|---|---|---|---|"
    )
    checkerboard = board(num, runs + 1)
    print(
        "\n| problem | floor | weighted | W2 / floor | share | right half | log Z off | 1,000 "
        "steps |\n|---|---|---|---|---|---|---|---|"
    )
    table = {name: planar(name, num, runs, long) for name in (*MIXTURES, "double_well")}
    if not args.quick:
        found = {
            "num": num,
            "runs": runs,
            "planar": table,
            "bump": on_line,
            "checkerboard": checkerboard,
        }
        common.write("weighted", found)


if __name__ == "__main__":
    main()
