"""What does a reward outside of JAX cost?

Reported are microseconds per call of a compiled `vmap(reward)`, and of
`vmap(value_and_grad(reward))`, on batches of 1, 64 and 4,096 states of dimension 16. The reward is
`tanh(W x) . v` with 64 units, in JAX, and in NumPy and PyTorch (if installed) through `External`.
The functions alone, called on NumPy arrays, are a comparison. The time is that of the fastest of
200 calls (50 at 4,096), because other work of the machine only slows calls down.

    OMP_NUM_THREADS=1 python -m benchmarks.rewards.external [--quick]

(With more threads, those of NumPy and PyTorch wait for those of the program.)
"""

import argparse
import importlib.util
import os
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import tiltjax as tj
from benchmarks import common

DIM, UNITS = 16, 64
SIZES = (1, 64, 4096)
RNG = np.random.default_rng(0)
W, V = (
    RNG.normal(size=(UNITS, DIM)).astype(np.float32) / 4,
    RNG.normal(size=UNITS).astype(np.float32) / 8,
)


def in_jax(x: jax.Array) -> jax.Array:
    return jnp.tanh(W @ x) @ V


def in_numpy(x: np.ndarray) -> np.ndarray:
    return np.tanh(x @ W.T) @ V


def both_in_numpy(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    hidden = np.tanh(x @ W.T)
    return hidden @ V, ((1 - hidden**2) * V) @ W


def rewards() -> dict[str, tuple[tj.rewards.Reward, Callable | None, Callable | None]]:
    """Each reward, and its functions on NumPy arrays: values, values and gradients."""
    rows: dict = {
        "JAX": (tj.rewards.as_reward(in_jax), None, None),
        "NumPy": (
            tj.external.from_numpy(in_numpy, value_and_grad=both_in_numpy),
            in_numpy,
            both_in_numpy,
        ),
        "NumPy, with a timeout": (
            tj.external.from_numpy(in_numpy, value_and_grad=both_in_numpy, timeout=60),
            in_numpy,
            both_in_numpy,
        ),
    }
    if importlib.util.find_spec("torch"):
        import torch

        w, v = torch.from_numpy(W), torch.from_numpy(V)
        reward = tj.external.from_torch(lambda x: torch.tanh(x @ w.T) @ v, name="torch")
        rows["PyTorch"] = (reward, reward.fn, reward.value_and_grad)
    return rows


def microseconds(call: Callable, x: jax.Array | np.ndarray, repeats: int) -> float:
    for _ in range(5):
        jax.block_until_ready(call(x))
    spent = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call(x))
        spent.append(time.perf_counter() - start)
    return 1e6 * min(spent)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few repeats, nothing written")
    quick = parser.parse_args().quick
    table: dict[str, dict] = {}
    print(
        "| reward | batch | value | the function alone | value and gradient | the function alone "
        "|\n|---|---|---|---|---|---|"
    )
    for name, (reward, fn, both) in rewards().items():
        table[name] = {}
        programs = jax.jit(jax.vmap(reward)), jax.jit(jax.vmap(jax.value_and_grad(reward)))
        for n in SIZES:
            repeats = 5 if quick else 200 if n < 1000 else 50
            host = RNG.normal(size=(n, DIM)).astype(np.float32)
            alone = [
                None if one is None else microseconds(one, host, repeats) for one in (fn, both)
            ]
            value, gradient = (
                microseconds(program, jnp.asarray(host), repeats) for program in programs
            )
            table[name][n] = {
                "value": value,
                "value_alone": alone[0],
                "gradient": gradient,
                "gradient_alone": alone[1],
            }
            cells = [value, alone[0], gradient, alone[1]]
            print(
                f"| {name} | {n:,} | "
                + " | ".join("" if cell is None else f"{cell:,.0f}" for cell in cells)
                + " |"
            )
    if not quick:
        common.write(
            "external",
            {
                "unit": "microseconds a call",
                "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
                "dim": DIM,
                "table": table,
            },
        )


if __name__ == "__main__":
    main()
