"""How much faster is tiltjax than the published PyTorch code for the same guided sampling, and is
it as close to the tilt?

The published functions (github.com/sanjitdp/reward-guidance, a local checkout) and tiltjax run
alternately. Each row of each side has a fresh process without caches, and 2,000 samples in the
published setting. The rows are six mixtures (49 Heun steps on [.001, .999], GLASS of 20 steps and a
jump, FMRG of 50, scores clipped at 100); two problems on the line (200 Euler steps, GLASS of 50),
with and without best-of-16; and the checkerboard with the same network on both sides (published
architecture, trained briefly here; GLASS of 50, and 100 of the published 200 Euler steps, as they
take minutes). Both sides evaluate the denoiser equally often: the number of GLASS steps of tiltjax
is chosen for this.

A process reports CPU seconds (user and system, of all threads) and wall seconds of a first call and
of later calls, of which the median counts (code that is not compiled counts its first call, too).
It also reports the time that a user waits: the wall seconds from the start of the process until the
samples are on the host, including imports and compilation, with the largest resident memory until
then. A row whose calls take minutes has only one call; its compilation time is then the difference
between two calls of two steps. Both sides choose their number of threads; `--cores 1` limits both
to one core. W2 is the distance from the samples to as many exact samples of the tilt, the same for
both sides. `double_well` is folded at its symmetry, x to -x, which leaves out the split between far
modes. For a row with one call W2 is computed on quarters of the samples. The error of W2 is the
pooled spread of both sides' calls. As there are few calls, its significance uses Student's t.

The goals are those of this library for two cores. Rows that miss a goal are named.

    python -m benchmarks.speed.vs_reference --reference CHECKOUT [--python OTHER_PYTHON]
        [--cores N] [--quick]
"""

import argparse
import hashlib
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import measures

MIXTURES = ("gaussian", "quadratic", "noniso", "unequal", "uncentered", "double_well")
METHODS = ("k = 1", "k = 8", "k = 16", "damped", "FMRG")
LINE = {"step": ("step", {"R": 10.0}), "bump": ("gaussian", {"center": 3.0, "sigma_r": 1.0})}
GROUP = 16
SIGMA = 0.5**0.5  # of the damping: the width of a mode
WIDTH = 3.0**0.5  # of the noise on the checkerboard
DRAWS = {"k = 1": 1, "k = 8": 8, "k = 16": 16, "damped": 1, "best of 16": 1}
PATIENCE, CALLS = 2.0, 4  # seconds of the counted calls, and their largest number
PARTS = 4  # of a single call's samples, for the error of W2
FOLDER = {"line": "mode_selection", "board": "checkerboard", "plane": "gaussian_mixture"}


class Row(NamedTuple):
    """One row of the table; `steps` are those of the outer solver."""

    problem: str
    method: str
    num: int
    steps: int

    @property
    def kind(self) -> str:
        return (
            "line"
            if self.problem in LINE
            else "board"
            if self.problem == "checkerboard"
            else "plane"
        )

    @property
    def once(self) -> bool:
        return self.kind == "board"


def calls(row: Row) -> dict[str, tuple[int, int]]:
    """The denoiser calls and pullbacks per sample, of each side."""
    if row.kind != "plane":
        group, inner = GROUP if row.method == "best of 16" else 1, 50
        return dict.fromkeys(
            ("published", "tiltjax"), (group * row.steps * (inner + 1), group * row.steps * inner)
        )
    if row.method == "FMRG":
        at = {"published": (101, 100), "tiltjax": (102, 101)}
    else:
        at = dict.fromkeys(
            ("published", "tiltjax"), (21 * DRAWS[row.method] + 1, 21 * DRAWS[row.method])
        )
    # In the last stage, at .999, the published guidance evaluates only the reward.
    evaluations = {"published": 2 * row.steps - 1, "tiltjax": 2 * row.steps}
    extra = {"published": 1, "tiltjax": 0}
    return {
        side: (evaluations[side] * f + extra[side], evaluations[side] * b)
        for side, (f, b) in at.items()
    }


# Functions that run in processes of their own:
# `prepare(row, ...) -> call(seed, steps) -> samples on the host`.


def published(row: Row, checkout: Path, weights: Path | None) -> Callable[[int, int], np.ndarray]:
    """A call of the published functions, without their progress bar."""
    bar: Any = types.ModuleType("tqdm")
    bar.trange = lambda n, **_: range(n)
    sys.modules["tqdm"] = bar
    sys.path.insert(0, str(checkout / FOLDER[row.kind]))
    import model as parts  # pyright: ignore[reportMissingImports]
    import sample as published  # pyright: ignore[reportMissingImports]
    import torch

    def seeded(run: Callable[[int], Any]) -> Callable[[int, int], np.ndarray]:
        def call(seed: int, steps: int) -> np.ndarray:
            torch.manual_seed(seed)
            np.random.seed(seed)  # noqa: NPY002  the published code's own generator
            return run(steps).numpy()

        return call

    if row.kind == "line":
        reward, settings = LINE[row.problem]

        def on_line(steps: int) -> Any:
            num = row.num * (GROUP if row.method == "best of 16" else 1)
            drawn, rewards, _ = published.sample_guided(
                num, 3.0, 1.0, 5.0, reward, settings, k=1, num_ode_steps=steps
            )
            return published.best_of_n(drawn, rewards, num // row.num)[0][:, None]

        return seeded(on_line)
    if row.kind == "board":
        network = parts.VelocityMLP(rescale=WIDTH)
        arrays = np.load(str(weights))
        state = {
            name: torch.tensor(arrays[name].T if arrays[name].ndim == 2 else arrays[name])
            for name in arrays.files
        }
        network.load_state_dict(state)
        return seeded(
            lambda steps: published.sample_guided(
                network, row.num, 10.0, parts.DEFAULT_REWARD_CENTER, 1.5, k=1, num_ode_steps=steps,
                sigma_schedule="memoryless", rescale=WIDTH,
            )[0]
        )  # fmt: skip
    of = lambda part: getattr(parts, f"{row.problem.upper()}_{part}")
    path = parts.LinearInterpolant(parts.GaussianMixture(of("WEIGHTS"), of("MEANS"), of("COVS")))
    reward = parts.reward_double_well
    if row.problem != "double_well":
        target = of("TARGET")
        reward = lambda x: parts.reward_quadratic(x, target)
    damped = row.method == "damped"
    sampler = published.GuidedSampler(
        path, reward, lam=3.0, sigma_hyper=SIGMA, apply_damping_scale=damped
    )
    method = (
        {"method": "fmrg"}
        if row.method == "FMRG"
        else {"method": "plugin", "k_particles": DRAWS[row.method]}
    )
    return seeded(
        lambda steps: published.sample_guided(sampler, row.num, num_steps=steps + 1, **method)[0]
    )


def gelu_network(params: dict[str, Any], t: Any, x: Any) -> Any:
    """The published architecture: `t` of shape (B,), `x` of shape (B, 2)."""
    import jax
    import jax.numpy as jnp

    hidden = jnp.concatenate([x / WIDTH, t[:, None]], axis=1)
    *inner, last = sorted({int(name.split(".")[1]) for name in params})
    for layer in inner:
        hidden = hidden @ params[f"net.{layer}.weight"] + params[f"net.{layer}.bias"][None]
        hidden = jax.nn.gelu(hidden, approximate=False)
    return hidden @ params[f"net.{last}.weight"] + params[f"net.{last}.bias"][None]


def ours(row: Row, checkout: Path | None, weights: Path | None) -> Callable[[int, int], np.ndarray]:
    """A call of tiltjax for the same row."""
    import jax
    import jax.numpy as jnp

    import tiltjax as tj

    if row.kind == "plane":
        problem = tj.problems.get(row.problem)
        model = tj.Analytic(problem.prior)
        scale = tj.Damped(problem.scale, SIGMA) if row.method == "damped" else problem.scale
        if row.method == "FMRG":
            guidance = tj.fmrg(model, problem.reward, scale, inner_steps=50)
        else:
            guidance = tj.PlugIn(
                tj.Glass(model, inner_steps=22), problem.reward, scale, k=DRAWS[row.method]
            )
        guidance = tj.guidance.Clipped(guidance, 100.0)

        def in_plane(seed: int, steps: int) -> np.ndarray:
            times = jnp.linspace(0.001, 0.999, steps + 1)
            return np.asarray(
                tj.sample(jax.random.key(seed), model, guidance, num=row.num, times=times).x
            )

        return in_plane

    if row.kind == "line":
        problem, num = (
            tj.problems.get(row.problem),
            row.num * (GROUP if row.method == "best of 16" else 1),
        )
        model, reward, scale, start = tj.Analytic(problem.prior), problem.reward, problem.scale, 1.0
    else:
        arrays = {name: jnp.asarray(array) for name, array in np.load(str(weights)).items()}
        reward, scale, num, start = tj.rewards.Bump([0.5, 0.5], 1.5), 10.0, row.num, WIDTH
        # As published: draws and gain assume unit noise, for any scale of the start.
        model = tj.from_velocity(
            gelu_network, arrays, shape=(2,), batched=True, interpolant=tj.Linear(1.0)
        )
    guidance = tj.PlugIn(tj.Glass(model, inner_steps=51), reward, scale)

    def by_euler(seed: int, steps: int) -> np.ndarray:
        key_start, key = jax.random.split(jax.random.key(seed))
        # The published first step is at t = 0, with its guidance evaluated at the second time.
        times = jnp.linspace(1 / row.steps, 1.0, steps + 1)
        noise = start * jax.random.normal(key_start, (num, *model.shape))
        drawn = tj.sample(
            key, model, guidance, num=num, times=times, start=noise, solver=tj.Euler()
        )
        return np.asarray(tj.best_of_n(drawn, reward, num // row.num).x)

    return by_euler


def clock() -> tuple[float, float]:
    """The wall time, by a clock that all processes share, and the CPU seconds of this process."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return time.monotonic(), usage.ru_utime + usage.ru_stime


def seconds(call: Callable[[], Any]) -> tuple[float, float]:
    before = clock()
    call()
    return tuple(after - start for after, start in zip(clock(), before, strict=True))  # pyright: ignore[reportReturnType]


def child(side: str, row: Row, checkout: Path, weights: Path | None, out: Path) -> None:
    """Run one row of one side: its seconds go to the standard output, its samples to `out`."""
    begun = clock()
    call = {"published": published, "tiltjax": ours}[side](row, checkout, weights)
    ready = clock()
    samples = [call(0, row.steps)]
    done = clock()
    report = {
        "imports_wall": ready[0] - begun[0],
        "done": done[0],
        "process_cpu": done[1],
        "peak_gb": measures.peak_gb(),
    }
    report |= {"first_wall": done[0] - ready[0], "first_cpu": done[1] - ready[1]}
    walls, cpus = (
        ([report["first_wall"]], [report["first_cpu"]])
        if row.once or side == "published"
        else ([], [])
    )
    if row.once and side == "tiltjax":
        first, second = (seconds(lambda seed=seed: call(seed, 2)) for seed in (1, 2))
        walls[0] -= first[0] - second[0]
        cpus[0] -= first[1] - second[1]
    while not row.once and len(walls) < CALLS and sum(walls) < PATIENCE:
        took = seconds(lambda: samples.append(call(len(samples), row.steps)))
        walls.append(took[0])
        cpus.append(took[1])
    np.save(out, np.stack(samples))
    threads = sys.modules["torch"].get_num_threads() if side == "published" else None
    module = sys.modules["torch" if side == "published" else "jax"]
    report |= {
        "run_wall": statistics.median(walls),
        "run_cpu": statistics.median(cpus),
        "calls": len(samples),
    }
    print(json.dumps(report | {"version": module.__version__, "threads": threads}))


# The parent process.


def spawn(
    side: str, row: Row, args: argparse.Namespace, weights: Path | None, folder: Path
) -> dict[str, Any]:
    """A side's report of a row, with `samples`, and the wall seconds of the whole process until the
    samples were ready.
    """
    out = folder / f"{side}.npy"
    command = [
        args.python if side == "published" else sys.executable,
        "-m",
        __spec__.name,
        "--side",
        side,
        "--out",
        str(out),
    ]
    command += ["--row", json.dumps(row), "--reference", str(args.reference.absolute())]
    command += ["--weights", str(weights)] if weights else []
    # As a user starts the process: no caches, no flags.
    unset = ("JAX_", "XLA_", "OMP_", "MKL_", "OPENBLAS_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(unset)}
    environment |= {
        "PYTHONPATH": os.pathsep.join(
            [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
        )
    }
    begun = time.monotonic()
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise SystemExit(f"{side}, {row.problem}, {row.method} failed:\n{ran.stderr[-3000:]}")
    report = json.loads(ran.stdout.splitlines()[-1])
    return report | {"process_wall": report.pop("done") - begun, "samples": np.load(out)}


def train(steps: int, folder: Path) -> Path:
    """A file with weights of the published architecture after `steps` steps of flow matching."""
    import jax
    import jax.numpy as jnp

    import tiltjax as tj

    sizes = [3, *[256] * 5, 2]
    params = {}
    for i, (n, m) in enumerate(itertools.pairwise(sizes)):
        key = jax.random.fold_in(jax.random.key(0), i)
        params[f"net.{2 * i}.weight"] = jax.random.normal(key, (n, m)) * n**-0.5
        params[f"net.{2 * i}.bias"] = jnp.zeros(m)
    board = tj.models.Checkerboard()
    network = jax.tree_util.Partial(gelu_network, params)
    data, settings = (
        lambda key: board.sample(key, 2048),
        {"interpolant": board.interpolant, "batched": True},
    )
    fit = tj.fit(jax.random.key(1), network, data, steps=steps, ema=0.99, **settings)
    path = folder / "weights.npz"
    np.savez(path, **{name: np.asarray(array) for name, array in fit.average.args[0].items()})
    return path


def truths(row: Row, number: int) -> list[np.ndarray]:
    """`number` sets of exact samples of the tilt."""
    import jax
    import jax.numpy as jnp

    import theory
    import tiltjax as tj

    if row.kind == "board":
        found = []
        for seed in range(number):
            key, key_keep = jax.random.split(jax.random.key(1000 + seed))
            drawn = tj.models.Checkerboard().sample(key, 60 * row.num)
            reward = jax.vmap(tj.rewards.Bump([0.5, 0.5], 1.5))(drawn)
            # by rejection
            keep = jax.random.uniform(key_keep, (len(drawn),)) < jnp.exp(10 * (reward - 1))
            found.append(np.asarray(drawn)[np.asarray(keep)][: row.num])
        return found
    problem = tj.problems.get(row.problem)
    of = theory.tilt if theory.tilts.is_quadratic(problem.reward) else theory.quadrature.tilt
    law = of(problem.prior, problem.reward, problem.scale)
    return [np.asarray(law.sample(jax.random.key(1000 + seed), row.num)) for seed in range(number)]


def distances(row: Row, samples: np.ndarray, exact: list[np.ndarray]) -> list[float]:
    import tiltjax as tj

    # The law of double_well is symmetric under x to -x: fold the left half to the right.
    folded = lambda x: x * np.where(x[:, :1] < 0, -1, 1) if row.problem == "double_well" else x
    parts = lambda sets: np.split(sets[0], PARTS) if row.once else list(sets)[:3]
    return [
        tj.metrics.wasserstein(folded(x), folded(y))
        for x, y in zip(parts(samples), parts(exact), strict=False)
    ]


def farther(w2: dict[str, list[float]]) -> float:
    """The number of standard errors by which tiltjax is farther from the tilt: the normal quantile
    of the probability of Student's t with the pooled spread.
    """
    import scipy.stats

    found = scipy.stats.ttest_ind(w2["tiltjax"], w2["published"], alternative="greater")
    # Clipped, because the results must not hold infinities.
    return float(scipy.stats.norm.isf(np.clip(found[1], 1e-300, 1 - 1e-16)))


def compare(
    row: Row, args: argparse.Namespace, weights: Path | None, folder: Path
) -> dict[str, Any]:
    sides = {side: spawn(side, row, args, weights, folder) for side in ("published", "tiltjax")}
    exact = truths(row, max(len(report["samples"]) for report in sides.values()))
    w2 = {side: distances(row, report.pop("samples"), exact) for side, report in sides.items()}
    keys = ("run_cpu", "run_wall", "first_wall", "process_wall", "process_cpu", "peak_gb")
    ratios = {key: sides["published"][key] / sides["tiltjax"][key] for key in keys}
    return {
        **row._asdict(),
        "calls": calls(row),
        **sides,
        "ratios": ratios,
        "w2": w2,
        "w2_z": farther(w2),
    }


def fingerprint(checkout: Path) -> str:
    """A checksum of the published files that run here."""
    files = [
        checkout / folder / name
        for folder in sorted(FOLDER.values())
        for name in ("model.py", "sample.py")
    ]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


def goals(rows: list[dict]) -> dict[str, dict]:
    """Each goal, its worst row, and the rows that miss the goal."""
    name = lambda row: f"{row['problem']}, {row['method']}"
    ratio = lambda key: lambda row: row["ratios"][key]
    plane = lambda method: [
        row for row in rows if row["problem"] in MIXTURES and row["method"] == method
    ]
    table = {
        "16 times fewer CPU-seconds, mixtures, k = 8": (plane("k = 8"), ratio("run_cpu"), 16.0),
        "40 times fewer CPU-seconds, mixtures, k = 1": (plane("k = 1"), ratio("run_cpu"), 40.0),
        "5 times less wall of a whole process": (rows, ratio("process_wall"), 5.0),
        "never slower: CPU-seconds": (rows, ratio("run_cpu"), 1.0),
        "never slower: wall": (rows, ratio("run_wall"), 1.0),
        "never slower: whole process": (rows, ratio("process_wall"), 1.0),
        "never more memory": (rows, ratio("peak_gb"), 1.0),
        "W2 no worse, at three standard errors": (rows, lambda row: -row["w2_z"], -3.0),
    }
    found = {}
    for goal, (chosen, value, least) in table.items():
        if chosen:
            worst = min(chosen, key=value)
            missed = [name(row) for row in chosen if value(row) < least]
            found[goal] = {
                "worst": value(worst),
                "row": name(worst),
                "rows": len(chosen),
                "missed": missed,
            }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="four rows with 500 samples or 100; nothing is written"
    )
    parser.add_argument(
        "--reference", type=Path, required=True, help="a checkout of the published code"
    )
    parser.add_argument("--python", default=sys.executable, help="of an environment with torch")
    parser.add_argument("--cores", type=int, help="hold both to so many cores")
    for hidden in ("--side", "--row", "--weights", "--out"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        return child(args.side, Row(*json.loads(args.row)), args.reference, args.weights, args.out)
    if args.cores:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])
    from benchmarks import common

    num = 500 if args.quick else 2000
    rows = [Row(problem, method, num, 49) for problem in MIXTURES for method in METHODS]
    rows += [
        Row(problem, method, num, 200) for problem in LINE for method in ("k = 1", "best of 16")
    ]
    rows.append(Row("checkerboard", "k = 1", *((100, 20) if args.quick else (num, 100))))
    if args.quick:
        quick = {
            ("quadratic", "k = 1"),
            ("quadratic", "k = 8"),
            ("bump", "k = 1"),
            ("checkerboard", "k = 1"),
        }
        rows = [row for row in rows if (row.problem, row.method) in quick]
    load, results, begun = os.getloadavg(), [], time.monotonic()
    print(
        "| problem | method | CPU-seconds | published / tiltjax | wall | whole process | memory, "
        "GB | W2 (standard errors) |"
    )
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights = train(50 if args.quick else 600, folder)
        for row in rows:
            result = compare(row, args, weights if row.kind == "board" else None, folder)
            results.append(result)
            both = lambda key, form, result=result: " / ".join(
                form(result[s][key]) for s in ("published", "tiltjax")
            )
            ratios, w2 = (
                result["ratios"],
                {s: statistics.mean(values) for s, values in result["w2"].items()},
            )
            print(
                f"| {row.problem} | {row.method} | {both('run_cpu', '{:.3g}'.format)} | "
                f"{ratios['run_cpu']:.1f} | "
                f"{both('run_wall', '{:.3g}'.format)}: {ratios['run_wall']:.1f} | "
                f"{both('process_wall', '{:.1f}'.format)}: "
                f"{ratios['process_wall']:.1f} | {both('peak_gb', '{:.2f}'.format)} | "
                f"{w2['published']:.3f} / {w2['tiltjax']:.3f}"
                f" ({result['w2_z']:+.1f}) |",
                flush=True,
            )
    print(f"\n{time.monotonic() - begun:.0f} s\n")
    met = goals(results)
    for goal, found in met.items():
        verdict = (
            f"missed at {len(found['missed'])} of {found['rows']}" if found["missed"] else "met"
        )
        print(f"{goal}: {verdict}; worst {found['worst']:.2f} ({found['row']})")
        if found["missed"]:
            print(f"    {'; '.join(found['missed'])}")
    if not args.quick:
        settings = {
            "num": num,
            "cores_used": args.cores,
            "load_before": load[0],
            "published_files": fingerprint(args.reference),
        }
        settings["torch"] = results[0]["published"]["version"]
        common.write("vs_reference", {"settings": settings, "goals": met, "rows": results})
    return None


if __name__ == "__main__":
    main()
