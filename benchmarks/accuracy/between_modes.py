"""Does the law of a guided flow predict samples between modes, in more than one dimension?

The first table has the predicted W2 to the tilt on four named problems, for plug-in guidance with
one draw, plain and damped, in the limit of small steps. The second table compares the predicted
mean, covariance and masses of modes with runs of `sample` on five other mixtures: three to five
rotated, unequal modes, near and far targets, one component without variance in one direction.
Deviations are in units of the sum of the standard errors of both; `mass` is the largest
difference of the masses of modes.

    python -m benchmarks.accuracy.between_modes [--quick]
"""

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import theory
import tiltjax as tj
from benchmarks import common

NAMED = ("quadratic", "noniso", "unequal", "uncentered")


class Case(NamedTuple):
    """A prior, a reward, a scale, and the width of the damping."""

    prior: tj.GaussianMixture
    reward: tj.rewards.Quadratic
    scale: float
    sigma: float


def rotated(angle: float, long: float, short: float) -> np.ndarray:
    """A covariance in the plane by its standard deviations along axes turned by an angle."""
    axes = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return axes @ np.diag([long**2, short**2]) @ axes.T


def cases() -> dict[str, Case]:
    """The five mixtures."""
    planes = {
        "three": (
            [0.5, 0.3, 0.2],
            [[-2.0, 0.0], [2.0, 1.0], [0.5, -2.5]],
            [rotated(0.4, 0.9, 0.4), rotated(-0.8, 0.7, 0.3), rotated(1.3, 0.8, 0.5)],
            tj.rewards.Quadratic([0.5, 1.5]),
            0.5,
        ),
        "four, far target": (
            [0.4, 0.1, 0.2, 0.3],
            [[-3.0, 1.0], [3.0, 2.0], [2.0, -2.0], [-1.0, -3.0]],
            [
                rotated(1.0, 0.8, 0.4),
                rotated(0.2, 0.6, 0.5),
                rotated(-0.5, 1.0, 0.3),
                rotated(2.0, 0.7, 0.6),
            ],
            tj.rewards.Quadratic([5.0, 4.0]),
            0.15,
        ),
        "five": (
            [0.3, 0.1, 0.25, 0.15, 0.2],
            [[-4.0, 0.0], [-1.0, 3.0], [1.5, -2.5], [3.5, 2.0], [0.0, 0.0]],
            [
                rotated(0.7, 0.8, 0.3),
                rotated(-0.3, 0.6, 0.4),
                rotated(1.5, 0.9, 0.5),
                rotated(0.1, 0.7, 0.3),
                rotated(-1.0, 0.5, 0.4),
            ],
            tj.rewards.Quadratic([1.0, 1.0], [[1.0, 0.3], [0.3, 0.5]]),
            0.4,
        ),
        "flat": (
            [0.35, 0.4, 0.25],
            [[-2.0, -1.0], [1.5, 2.0], [2.5, -1.5]],
            [rotated(0.6, 0.9, 0.0), rotated(-0.4, 0.8, 0.4), rotated(1.1, 0.6, 0.5)],
            tj.rewards.Quadratic([0.0, 0.5]),
            0.4,
        ),
    }
    found = {name: Case(tj.GaussianMixture(*p[:3]), *p[3:], 0.6) for name, p in planes.items()}
    root = np.array([[0.7, 0.2, 0.0], [-0.2, 0.5, 0.3], [0.1, -0.3, 0.6]])
    space = tj.GaussianMixture(
        [0.5, 0.2, 0.3],
        [[-2.0, 0.0, 1.0], [2.0, 1.5, 0.0], [0.5, -2.0, -1.5]],
        np.stack([root @ root.T, root.T @ root, np.diag([0.3, 0.8, 0.5])]),
    )
    reward = tj.rewards.Quadratic([0.5, 0.5, 0.0], [1.0, 0.6, 0.8])
    return found | {"space": Case(space, reward, 0.4, 0.6)}


class Method(NamedTuple):
    """A denoiser with its reward and scale, and the guidance whose law it should give."""

    denoiser: Callable
    reward: tj.rewards.Reward
    scale: Any
    guidance: tj.guidance.Guidance


def methods(case: Case) -> dict[str, Method]:
    """The methods without draws. The guidance of the mean of damped plug-in is the gradient of
    `E[r | x]`. `Conjugate` has no draws for the same reward with the weight 1.
    """
    model, damped = tj.Analytic(case.prior), tj.Damped(case.scale, case.sigma)
    reward, scale = case.reward, case.scale

    def mean_reward(t: jax.Array, x: jax.Array) -> jax.Array:
        strength = damped(jax.random.key(0), model.interpolant.snr(t), t, x)
        return strength * theory.expected_reward(model.posterior(t, x), reward)

    plain = tj.rewards.Quadratic(reward.target)
    laplace, conjugate = tj.Laplace(model, reward, scale), tj.Conjugate(model, plain, scale)
    return {
        "damped, mean": Method(
            theory.plug_in_denoiser, reward, damped, tj.Doob(model, mean_reward)
        ),
        "DPS": Method(theory.dps_denoiser, reward, scale, tj.dps(model, reward, scale)),
        "Laplace": Method(theory.laplace_denoiser, reward, scale, laplace),
        "Conjugate": Method(theory.doob_denoiser, plain, scale, conjugate),
    }


def deviations(law: theory.FlowLaw, x: jax.Array) -> dict[str, float]:
    """The largest deviation of the mean, the covariance and the masses of samples from a law."""
    n = len(x)
    modes = jax.vmap(law.modes)(x)
    center = x - law.mean()[None]
    outer = jnp.einsum("ni,nj->nij", center, center)
    (mean_error, cov_error), masses = law.error(), law.masses()
    rows = {
        "mean": (x, law.mean(), mean_error),
        "cov": (outer, law.cov(), cov_error),
        "masses": (modes, masses.value, masses.error),
    }
    found = {}
    for name, (values, value, error) in rows.items():
        gap = jnp.abs(jnp.mean(values, axis=0) - value)
        noise = jnp.std(values, axis=0) / n**0.5
        found[name] = float(jnp.max(gap / (noise + error)))
        found[f"{name} gap"] = float(jnp.max(gap))
    return found


def named(num: int) -> dict[str, dict[str, dict[str, float]]]:
    """The predicted W2 of plug-in guidance to the tilt, plain and damped, and its error."""
    found = {}
    for name in NAMED:
        p = tj.problems.get(name)
        tilt = theory.tilt(p.prior, p.reward, p.scale)
        found[name] = {}
        for label, scale in {"plain": p.scale, "damped": tj.Damped(p.scale, 0.7)}.items():
            far = theory.flow_law(p.prior, p.reward, scale, num=num).wasserstein(tilt)
            found[name][label] = {"w2": float(far.value), "error": float(far.error)}
    return found


def compared(case: Case, method: str, num: int, steps: tuple[int, ...]) -> dict[str, Any]:
    """The law of a method on a mixture against its samples after some numbers of steps."""
    denoiser, reward, scale, guidance = methods(case)[method]
    law = theory.flow_law(case.prior, reward, scale, denoiser=denoiser)
    far = law.wasserstein(theory.tilt(case.prior, reward, case.scale))
    found: dict[str, Any] = {"w2": float(far.value), "w2 error": float(far.error)}
    for n in steps:
        particles = tj.sample(
            jax.random.key(1),
            guidance.model,
            guidance,
            num=num,
            steps=n,
            chunk_size=min(num, 20_000),
        )
        found[str(n)] = deviations(law, particles.x)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few samples, one mixture")
    args = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    num, steps = (2000, (20,)) if args.quick else (100_000, (32, 64))

    table = named(64 if args.quick else 512)
    print("| problem | plain | damped |\n|---|---|---|")
    for name, row in table.items():
        cells = (f"{cell['w2']:.3f} ± {cell['error']:.3f}" for cell in row.values())
        print(f"| {name} | {' | '.join(cells)} |", flush=True)

    print("\n| mixture | method | steps | W2 | mean | cov | masses | mass |\n" + "|---" * 8 + "|")
    runs: dict[str, dict[str, Any]] = {}
    for name, case in list(cases().items())[: 1 if args.quick else None]:
        for method in methods(case):
            found = compared(case, method, num, steps)
            runs.setdefault(name, {})[method] = found
            for n in map(str, steps):
                gaps = " | ".join(f"{found[n][part]:.1f}" for part in ("mean", "cov", "masses"))
                print(
                    f"| {name} | {method} | {n} | {found['w2']:.3f} ± {found['w2 error']:.3f} | "
                    f"{gaps} | {found[n]['masses gap']:.4f} |",
                    flush=True,
                )
    if not args.quick:
        common.write("between_modes", {"named": table, "num": num, "steps": steps, "runs": runs})


if __name__ == "__main__":
    main()
