"""Does a general sequential Monte Carlo sampler, which uses the density, reach the tilt sooner than
tiltjax, which uses the denoiser?

The general sampler is the adaptive tempered SMC of BlackJAX, with prior `rho` and log-likelihood
`scale * r`, on the six mixtures and on the bump on the line. It gets the density of `rho` and exact
samples of `rho` as a start. A flow or diffusion model has neither, and tiltjax only uses its
denoiser. Both have 2,000 particles. BlackJAX runs HMC moves (step .2, 10 leapfrogs, 10 moves per
temperature, effective share of one half, systematic resampling) as one compiled program. tiltjax
runs unweighted, by `Tilted` if the reward is conjugate and by `Conjugate` otherwise; and weighted,
by `smc` (200 steps; Laplace's twist for quadratic rewards, otherwise `r(D)`, tempered).

Reported are W2 to exact samples of the tilt, over the floor between two exact sets (`double_well`
folded at its symmetry); the error of log Z; and CPU seconds of a run without compilation, next to
those of the first call. Without BlackJAX the program prints a message and ends.

    pip install blackjax
    python -m benchmarks.speed.vs_peers [--quick]
"""

import argparse
import importlib.metadata
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import theory
import tiltjax as tj
from benchmarks import common

PROBLEMS = ("gaussian", "quadratic", "noniso", "unequal", "uncentered", "double_well", "bump")
# From a seed to (unweighted samples, log Z or None).
Run = Callable[[int], tuple[Any, Any]]


def blackjax_run(problem: tj.problems.Problem, num: int) -> Run:
    import blackjax  # pyright: ignore[reportMissingImports]

    settings = {
        "step_size": 0.2,
        "inverse_mass_matrix": jnp.ones(problem.prior.dim),
        "num_integration_steps": 10,
    }
    moves = blackjax.hmc.build_kernel()
    sampler = blackjax.adaptive_tempered_smc(
        problem.prior.log_prob,
        lambda x: problem.scale * problem.reward(x),
        moves,
        blackjax.hmc.init,
        blackjax.smc.extend_params(settings),
        blackjax.smc.resampling.systematic,
        target_ess=0.5,
        num_mcmc_steps=10,
    )

    @jax.jit
    def run(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        key_start, key = jax.random.split(key)

        def step(carry: tuple) -> tuple:
            key, state, log_norm = carry
            key, key_step = jax.random.split(key)
            state, info = sampler.step(key_step, state)
            return key, state, log_norm + info.log_likelihood_increment

        start = (key, sampler.init(problem.prior.sample(key_start, num)), jnp.zeros(()))
        _, state, log_norm = jax.lax.while_loop(
            lambda carry: carry[1].tempering_param < 1, step, start
        )
        return state.particles, log_norm

    return lambda seed: run(jax.random.key(seed))


def tiltjax_runs(problem: tj.problems.Problem, num: int) -> dict[str, Run]:
    model, reward, scale = tj.Analytic(problem.prior), problem.reward, problem.scale
    closed = theory.is_quadratic(reward)
    if closed:
        chosen, guidance, name = tj.Tilted(model, reward, scale), None, "Tilted"
        weighted: dict[str, Any] = {"guidance": tj.Laplace(model, reward, scale)}
    else:
        variance = tj.calibrate(jax.random.key(0), model, budget=2**18)
        chosen, guidance, name = (
            model,
            tj.Conjugate(model, reward, scale, variance=variance),
            "Conjugate",
        )
        weighted = {
            "guidance": tj.dps(model, reward, scale),
            "proposal": tj.weighted.proposals.Base(),
        }
        weighted["tempering"] = tj.weighted.tempering.Exponential()

    def unweighted(seed: int) -> tuple[Any, Any]:
        return tj.sample(jax.random.key(seed), chosen, guidance, num=num).x, None

    def by_weights(seed: int) -> tuple[Any, Any]:
        key, key_draw = jax.random.split(jax.random.key(seed))
        found = tj.smc(key, model, num=num, steps=200, **weighted)
        return found.resample(key_draw, num), found.log_norm

    return {name: unweighted, "smc": by_weights}


def average(values: list[float]) -> tuple[float, float]:
    """The mean and its standard error."""
    return float(np.mean(values)), float(np.std(values, ddof=1) / np.sqrt(len(values)))


def measure(run: Run, exact: list, floor: float, log_norm: float, fold: Callable) -> dict[str, Any]:
    found: dict[int, tuple[Any, Any]] = {}

    def keep(seed: int) -> tuple[Any, Any]:
        found[seed] = jax.block_until_ready(run(seed))
        return found[seed]

    timing = common.timed(keep, repeats=len(exact) - 1)
    w2 = [
        tj.metrics.wasserstein(fold(np.asarray(found[seed][0])), y) / floor
        for seed, y in enumerate(exact)
    ]
    norms = [float(value) - log_norm for _, value in found.values() if value is not None]
    return {
        "over_floor": average(w2),
        "log_norm_off": average(norms) if norms else None,
        **timing._asdict(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="two problems, 500 particles, two seeds; nothing is written",
    )
    args = parser.parse_args()
    if importlib.util.find_spec("blackjax") is None:
        print("BlackJAX is not installed, nothing to compare with: pip install blackjax")
        return
    version = importlib.metadata.version("blackjax")
    print(f"BlackJAX {version}")
    num, seeds = (500, 2) if args.quick else (2000, 5)
    rows = []
    print(
        "\n| problem | method | W2 / floor | log Z off | CPU-seconds | wall | first call "
        "|\n|---|---|---|---|---|---|---|"
    )
    for name in ("quadratic", "bump") if args.quick else PROBLEMS:
        problem = tj.problems.get(name)
        law = theory.tilt if theory.is_quadratic(problem.reward) else theory.quadrature.tilt
        truth = law(problem.prior, problem.reward, problem.scale)
        # The law of double_well is symmetric under x to -x: fold the left half to the right.
        fold = lambda x, name=name: (
            x * np.where(x[:, :1] < 0, -1, 1) if name == "double_well" else x
        )
        exact = [
            fold(np.asarray(truth.sample(jax.random.key(1000 + i), num))) for i in range(seeds + 1)
        ]
        floor = float(
            np.mean([tj.metrics.wasserstein(exact[i], exact[i + 1]) for i in range(seeds)])
        )
        runs = tiltjax_runs(problem, num)
        runs["BlackJAX"] = blackjax_run(problem, num)
        row: dict[str, Any] = {
            "problem": name,
            "floor": floor,
            "log_norm": float(truth.log_norm),
            "methods": {},
        }
        for method, run in runs.items():
            cell = measure(run, exact[:-1], floor, float(truth.log_norm), fold)
            row["methods"][method] = cell
            off = (
                ""
                if cell["log_norm_off"] is None
                else "{:+.3f} ± {:.3f}".format(*cell["log_norm_off"])
            )
            print(
                f"| {name} | {method} | {'{:.2f} ± {:.2f}'.format(*cell['over_floor'])} | {off} | "
                f"{cell['run_cpu']:.3f} | "
                f"{cell['run_wall']:.3f} | {cell['first_wall']:.1f} |",
                flush=True,
            )
        rows.append(row)
    if not args.quick:
        results = {"num": num, "seeds": seeds, "blackjax": version, "rows": rows}
        common.write("vs_peers", results)


if __name__ == "__main__":
    main()
