"""Which is closer to the tilt, FMRG or plug-in guidance with one draw?

For one Gaussian `N(0, s^2 I)` in the plane, the reward `-|x - (0, 2.5)|^2` and the limit of small
steps, theory has the laws of both in closed form, so nothing is sampled. The table shows their W2
to the tilt by width s and scale, and the scale from which FMRG is closer. (One damped draw of the
right width is exact everywhere.)

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


@jax.jit
def distances(width: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    """W2 to the tilt of FMRG and of one plug-in draw."""
    covs = width**2 * jnp.eye(2)[None]
    prior = tj.GaussianMixture(np.ones(1), np.zeros((1, 2)), covs)
    reward = tj.rewards.Quadratic([0.0, 2.5])
    tilt = theory.tilt(prior, reward, scale).mixture
    laws = (law(prior, reward, scale) for law in (theory.fmrg_law, theory.plug_in_law))
    gaps = [theory.bures(a.means[0], a.covs[0], tilt.means[0], tilt.covs[0]) for a in laws]
    return jnp.sqrt(gaps[0]), jnp.sqrt(gaps[1])


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
    if not args.quick:
        common.write("fmrg_or_plug_in", {"rows": rows})


if __name__ == "__main__":
    main()
