r"""How much slower is the library than plain JAX?

The comparison is the same flow of a mixture, written in twenty lines with one `eigh`, in the same
process. A row has a number of components, a dimension, and a guidance: none, `dps` or `Laplace`,
whose plain forms are JAX's own derivatives of the plain denoiser. A further row is the log-density
of a mixture on a grid, as `theory` evaluates it. There are 2,048 particles (65,536 for two
components in the plane) and 40 Heun steps. Times are medians of five alternating runs, without the
first calls.

    python -m benchmarks.speed.plain [--quick] [--busy]

`--busy` repeats the runs while two other JAX processes multiply matrices on the same cores.
"""

import argparse
import contextlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import tiltjax as tj
from benchmarks import common

SIZES = ((2, 2), (2, 8), (9, 9), (2, 32), (5, 128))
ALLOWED = {(2, 2): 2.2, (2, 8): 2.2}  # times plain; 1.6 for the others
STEPS, SCALE, REPEATS = 40, 0.5, 5
GUIDED = ("dps", "Laplace")
_BUSY = """
import jax, jax.numpy as jnp
a = jnp.ones((1024, 1024))
f = jax.jit(lambda a: a @ a / 1024)
while True:
    a = f(a)
    a.block_until_ready()
"""


class Row(NamedTuple):
    """A mixture of `components` in `dim` dimensions, the computation, and the number of points."""

    components: int
    dim: int
    task: str
    num: int


def mixture(components: int, dim: int) -> tj.GaussianMixture:
    """Random means and covariances, in single precision."""
    rng = np.random.default_rng(10 * components + dim)
    roots = rng.normal(size=(components, dim, dim)) / np.sqrt(dim)
    covs = roots @ np.swapaxes(roots, 1, 2) + 0.1 * np.eye(dim)
    means = 2 * rng.normal(size=(components, dim))
    weights = np.ones(components)
    return tj.GaussianMixture(*(part.astype(np.float32) for part in (weights, means, covs)))


# The plain code, for one particle. A mixture is (log_weights, means, variances, axes).


def decompose(law: tj.GaussianMixture) -> tuple:
    return law.log_weights, law.means, *jnp.linalg.eigh(law.covs)


def posterior(parts: tuple, alpha: Any, sigma: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    log_weights, means, variances, axes = parts
    noisy = alpha**2 * variances + sigma**2
    along = jnp.einsum("kij,ki->kj", axes, x[None] - alpha * means)
    log_probs = log_weights - jnp.sum(along**2 / noisy + jnp.log(noisy), axis=1) / 2
    return log_probs, alpha * variances / noisy * along


def denoise(parts: tuple, t: Any, x: jax.Array) -> jax.Array:
    log_probs, moved = posterior(parts, t, 1 - t, x)
    p = jax.nn.softmax(log_probs)
    return p @ parts[1] + jnp.einsum("kij,kj->i", parts[3], p[:, None] * moved)


def dps(parts: tuple, target: jax.Array, t: Any, x: jax.Array) -> jax.Array:
    denoised, pullback = jax.vjp(lambda x: denoise(parts, t, x), x)
    return denoised + (1 - t) ** 2 / t * pullback(-2 * SCALE * (denoised - target))[0]


def laplace(parts: tuple, target: jax.Array, t: Any, x: jax.Array) -> jax.Array:
    value = lambda x: (denoise(parts, t, x),) * 2
    jacobian, denoised = jax.jacrev(value, has_aux=True)(x)
    cov = (1 - t) ** 2 / t * (jacobian + jacobian.T) / 2
    gradient = cov @ (-2 * SCALE * (denoised - target))
    return denoised + jnp.linalg.solve(jnp.eye(len(x)) + 2 * SCALE * cov, gradient)


def heun(field: Callable, x: jax.Array, times: jax.Array) -> jax.Array:
    velocity = lambda t, x: (jax.vmap(lambda x: field(t, x))(x) - x) / (1 - t)

    def step(x: jax.Array, pair: tuple) -> tuple[jax.Array, None]:
        t, u = pair
        first = velocity(t, x)
        second = velocity(u, x + (u - t) * first)
        return x + (u - t) * (first + second) / 2, None

    return jax.lax.scan(step, x, (times[:-1], times[1:]))[0]


def plain(row: Row, law: tj.GaussianMixture, target: jax.Array) -> Callable[[int], jax.Array]:
    field = {"dps": dps, "Laplace": laplace}.get(row.task)

    @jax.jit
    def run(key: jax.Array, law: tj.GaussianMixture) -> jax.Array:
        parts = decompose(law)
        if row.task == "log-density":
            one = lambda x: jax.nn.logsumexp(posterior(parts, 1.0, 0.0, x)[0])
            log_probs = jax.vmap(one)(3 * jax.random.normal(key, (row.num, row.dim)))
            return log_probs - row.dim / 2 * jnp.log(2 * jnp.pi)
        times = jnp.linspace(1e-3, 0.999, STEPS + 1)
        x = (1 - times[0]) * jax.random.normal(key, (row.num, row.dim))
        guided = lambda t, x: field(parts, target, t, x) if field else denoise(parts, t, x)
        return heun(guided, x, times)

    return lambda seed: run(jax.random.key(seed), law)


def ours(row: Row, law: tj.GaussianMixture, target: jax.Array) -> Callable[[int], jax.Array]:
    if row.task == "log-density":

        @jax.jit
        def log_prob(key: jax.Array, law: tj.GaussianMixture) -> jax.Array:
            return jax.vmap(law.log_prob)(3 * jax.random.normal(key, (row.num, row.dim)))

        return lambda seed: log_prob(jax.random.key(seed), law)
    model, reward = tj.Analytic(law), tj.rewards.Quadratic(target)
    guidances = {"dps": tj.dps, "Laplace": tj.Laplace}
    guidance = guidances[row.task](model, reward, SCALE) if row.task in guidances else None
    times = jnp.linspace(1e-3, 0.999, STEPS + 1)
    return lambda seed: tj.sample(jax.random.key(seed), model, guidance, num=row.num, times=times).x


def seconds(call: Callable[[int], Any], seed: int) -> float:
    start = time.perf_counter()
    jax.block_until_ready(call(seed))
    return time.perf_counter() - start


def compare(row: Row, calls: list[Callable[[int], Any]], repeats: int) -> list[float]:
    """The median seconds of each call, run alternately."""
    runs = [[seconds(call, seed) for call in calls] for seed in range(1, repeats + 1)]
    return [statistics.median(column) for column in zip(*runs, strict=True)]


@contextlib.contextmanager
def busy(processes: int = 2) -> Iterator[None]:
    """A context in which other processes multiply matrices."""
    others = [subprocess.Popen([sys.executable, "-c", _BUSY]) for _ in range(processes)]
    try:
        time.sleep(5)  # until they are compiled
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def rows(quick: bool) -> list[Row]:
    """All comparisons, or with `quick` only those of small mixtures."""
    sizes = SIZES[:3] if quick else SIZES
    found = [Row(k, d, "none", 65_536 if d == 2 else 2_048) for k, d in sizes]
    found += [Row(k, d, "dps", 65_536 if d == 2 else 2_048) for k, d in sizes]
    # Laplace is for low dimensions, because its pullbacks cost d times a denoiser.
    found += [Row(k, d, "Laplace", 65_536 if d == 2 else 2_048) for k, d in sizes if d < 10]
    return found + [Row(k, d, "log-density", 200_000 if d == 2 else 20_000) for k, d in sizes]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small mixtures; nothing is written")
    parser.add_argument("--busy", action="store_true", help="also beside two other processes")
    args = parser.parse_args()
    print("| K, d | guidance | ours, ms | plain, ms | ratio | allowed | first calls, s | busy |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    results = []
    for row in rows(args.quick):
        law = mixture(row.components, row.dim)
        target = jnp.ones(row.dim, jnp.float32)
        calls = [ours(row, law, target), plain(row, law, target)]
        first = [seconds(call, 0) for call in calls]
        idle = compare(row, calls, REPEATS)
        beside = [float("nan")] * 2
        if args.busy:
            with busy():
                beside = compare(row, calls, REPEATS)
        allowed = ALLOWED.get((row.components, row.dim), 1.6)
        ratio, busy_ratio = idle[0] / idle[1], beside[0] / beside[1]
        print(
            f"| {row.components}, {row.dim} | {row.task} | {1e3 * idle[0]:.1f} "
            f"| {1e3 * idle[1]:.1f} | {ratio:.2f} | {allowed} | {first[0]:.2f} / {first[1]:.2f} "
            f"| {busy_ratio:.2f} |",
            flush=True,
        )
        results.append(
            {**row._asdict(), "ours": idle[0], "plain": idle[1], "ratio": ratio, "first": first}
            | ({"busy": beside, "busy_ratio": busy_ratio} if args.busy else {})
        )
    if not args.quick:
        common.write("plain", {"rows": results})


if __name__ == "__main__":
    main()
