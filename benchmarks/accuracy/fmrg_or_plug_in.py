"""Which is closer to the tilt, FMRG or plug-in guidance with one draw?

For one Gaussian `N(0, s^2 I)` in the plane, the reward `-|x - (0, 2.5)|^2` and the limit of small
steps, theory has the laws of both in closed form, so nothing is sampled. The table shows their W2
to the tilt by width s and scale, and the scale from which FMRG is closer. (One damped draw of the
right width is exact everywhere.) A second table has the exact laws of runs of N steps, with the
defaults of `sample` and `fmrg`: the fresh draws of plug-in add a variance of order 1 / N.

    python -m benchmarks.accuracy.fmrg_or_plug_in [--quick]
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np

import theory
import tiltjax as tj
from benchmarks import common

WIDTHS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
SCALES = (0.01, 0.1, 0.3, 1.0, 3.0, 10.0)
SETTINGS = ((0.5, 1.0), (4.0, 0.1), (16.0, 0.1))
STEPS = (100, 400, 1600)
REWARD = tj.rewards.Quadratic([0.0, 2.5])


def far(law: tj.GaussianMixture, tilt: tj.GaussianMixture) -> jax.Array:
    """W2 of two Gaussians."""
    return jnp.sqrt(theory.bures(law.means[0], law.covs[0], tilt.means[0], tilt.covs[0]))


@jax.jit
def distances(width: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    """W2 to the tilt of FMRG and of one plug-in draw."""
    covs = width**2 * jnp.eye(2)[None]
    prior = tj.GaussianMixture(np.ones(1), np.zeros((1, 2)), covs)
    tilt = theory.tilt(prior, REWARD, scale).mixture
    fmrg, plug_in = (law(prior, REWARD, scale) for law in (theory.fmrg_law, theory.plug_in_law))
    return far(fmrg, tilt), far(plug_in, tilt)


def distances_of_runs(width: float, scale: float, steps: int) -> list[float]:
    """The same for runs of Heun's method on the default grid."""
    prior = tj.GaussianMixture([1.0], [[0.0, 0.0]], [width**2 * np.eye(2)])
    tilt, times = theory.tilt(prior, REWARD, scale).mixture, tj.Analytic(prior).grid(steps)
    fields = (field(prior, REWARD, scale) for field in (theory.fmrg_field, theory.plug_in_field))
    return [float(far(theory.discrete_law(field, times=times), tilt)) for field in fields]


def crossover(width: float) -> float:
    """The scale from which FMRG is closer, by bisection."""
    low, high = 1e-5, 1e3
    while high > 1.001 * low:
        middle = (low * high) ** 0.5
        fmrg, plug_in = distances(width, middle)
        low, high = (low, middle) if fmrg < plug_in else (middle, high)
    return high


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two widths, no record")
    args = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    rows = {}
    for width in WIDTHS[:2] if args.quick else WIDTHS:
        w2 = {scale: [float(far) for far in distances(width, scale)] for scale in SCALES}
        rows[width] = {"w2": w2, "equal": crossover(width)}
        cells = " ".join(f"{fmrg:7.3f}/{plug_in:.3f}" for fmrg, plug_in in w2.values())
        print(f"width {width:5g}: {cells}, equal at scale {rows[width]['equal']:.3g}", flush=True)
    runs = []
    for width, scale in SETTINGS[:1] if args.quick else SETTINGS:
        found = {steps: distances_of_runs(width, scale, steps) for steps in STEPS}
        limit = [float(w2) for w2 in distances(width, scale)]
        runs.append({"width": width, "scale": scale, "limit": limit, "w2": found})
        print(f"width {width:g}, scale {scale:g}, by steps: {found}", flush=True)
    if not args.quick:
        common.write("fmrg_or_plug_in", {"rows": rows, "runs": runs})


if __name__ == "__main__":
    main()
