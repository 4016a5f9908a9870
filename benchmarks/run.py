"""Run the benchmarks, one process after the other, and write one table of their results to
results/README.md.

    python -m benchmarks.run [NAME ...] [--quick] [--reference CHECKOUT [--python OTHER_PYTHON]]
    python -m benchmarks.run --table  # from the results that exist

Every benchmark writes `results/<name>.json`. With `--quick` the benchmarks run on a small scale,
and neither they nor this program write anything. A benchmark that fails, or whose reference is
missing, is named at the end and does not stop the others.
"""

import argparse
import ast
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results"
SCRIPTS = {"checkerboard_network": "checkerboard"}  # results whose benchmark has another name
VARIANTS = {"checkerboard_network": "With a trained network instead of the closed form."}
NEEDS_REFERENCE = ("vs_reference",)  # those that cannot run without the reference
ENVIRONMENT = {"external": {"OMP_NUM_THREADS": "1"}}
INTRODUCTION = """# Results

This file is written by `python -m benchmarks.run` (`make bench`), and by its `--table` from the
JSON files in this folder. Each row summarizes its JSON file, on the given device at the given
commit. Rows come from different runs, so compare CPU-seconds only within a row.
[changes.md](changes.md) lists what each change of the code gained.
"""


def _gaussian_tilt(r: dict) -> str:
    row = lambda method: r["table"][method]["quadratic"]
    of = lambda method: "{:.3f} ± {:.3f}".format(*row(method)["w2"])
    return (
        f"W2 on `quadratic`: plug-in k = 8 {of('plug-in k=8')}, Laplace {of('Laplace')}, Tilted "
        f"{of('Tilted')}, floor {of('floor')}"
    )


def _cost_to_floor(r: dict) -> str:
    reached = {name: m for name, m in r["methods"].items() if m["over_floor"] <= 1.2}
    cheapest = min(reached, key=lambda name: reached[name]["run_cpu"])
    return (
        f"{len(reached)} of {len(r['methods'])} methods come within 1.2 times the floor; "
        f"{cheapest} in {1000 * reached[cheapest]['run_cpu']:.1f} CPU-ms, "
        f"plug-in ends at {r['methods']['plug-in']['over_floor']:.1f} times"
    )


def _two_modes(r: dict) -> str:
    bump = r["problems"]["bump"]
    return (
        f"bump: the tilt has {bump['tilt']:.3f} on the right, best-of-1 "
        f"{bump['best_of_n']['1']['share']:.3f}, best-of-4 {bump['best_of_n']['4']['share']:.3f}"
    )


def _checkerboard(r: dict) -> str:
    hits = [row for row in r["rows"] if row["is_tilt"]]
    cost = lambda row: row["calls"] + row["pullbacks"]
    if not hits:
        return f"none of {len(r['rows'])} settings within 1% of the mean reward and 4% of the trace"
    best = min(hits, key=cost)
    return (
        f"{len(hits)} of {len(r['rows'])} settings are the tilt; cheapest {best['method']}: "
        f"{cost(best)} calls and pullbacks a sample"
    )


def _any_reward(r: dict) -> str:
    finite = lambda row: {name: cell["w2"] for name, cell in row["methods"].items() if cell}
    nearest = [min(finite(row), key=finite(row).__getitem__) for row in r["rows"]]
    conjugate = sum(name.startswith("Conjugate") for name in nearest)
    return f"Conjugate is nearest to the tilt in {conjugate} of {len(nearest)} problems"


def _learned(r: dict) -> str:
    worst = lambda name: max(row[name]["w2"] / row["floor"] for row in r["rows"])
    return (
        f"Tilted at worst {worst('Tilted, exact'):.2f} times the floor with the exact denoiser, "
        f"{worst('Tilted, network'):.2f} with the network"
    )


def _predictions(r: dict) -> str:
    return (
        f"plain plug-in predicted to W2 {r['plain']['1']:.3f} at k = 1, {r['plain']['1024']:.3f} "
        f"at k = 1,024; damped of the right width {r['damped']['1.0']['w2']:.3f}"
    )


def _fmrg_or_plug_in(r: dict) -> str:
    equal = [
        f"{float(width):g}: {r['rows'][width]['equal']:.2g}" for width in ("0.5", "2.0", "16.0")
    ]
    return f"the scale from which FMRG is closer, by width: {', '.join(equal)}"


def _between_modes(r: dict) -> str:
    laws = [law for row in r["runs"].values() for law in row.values()]
    worst = lambda part: max(law[str(r["steps"][-1])][part] for law in laws)
    damped = r["named"]["quadratic"]["damped"]
    return (
        f"{len(laws)} laws on {len(r['runs'])} mixtures: means within {worst('mean'):.1f} errors, "
        f"covariances within {worst('cov'):.1f}, masses within {worst('masses gap'):.3f}; damped "
        f"plug-in on `quadratic` W2 {damped['w2']:.3f} ± {damped['error']:.3f}"
    )


def _recommended(r: dict) -> str:
    total = lambda key: sum(row[key] for row in r["table"].values())
    methods = sum(len(row["rows"]) for row in r["table"].values())
    return (
        f"{total('wrong')} of {total('pairs')} pairs of methods on {len(r['table'])} mixtures in "
        f"the wrong order, beyond the errors; W2 of {total('off')} of {methods} methods not within "
        "15% and the errors"
    )


def _weighted(r: dict) -> str:
    plane = {
        name: row["Laplace, Guided"] for name, row in r["planar"].items() if name != "double_well"
    }
    over, off = (
        max(c["over_floor"][0] for c in plane.values()),
        max(abs(c["log_norm_off"][0]) for c in plane.values()),
    )
    return (
        f"Laplace's twist on {len(plane)} mixtures: W2 at most {over:.2f} times the floor, log Z "
        f"off by at most {off:.3f}"
    )


def _unbiased(r: dict) -> str:
    row = r["axes"]["all"][""]
    return (
        f"{row['cells']:,} combinations: z has mean {row['mean']:+.2f} and deviation "
        f"{row['sd']:.2f}; mean of Z's estimates over Z {row['pooled'][0]:.4f} ± "
        f"{row['pooled'][1]:.4f}"
    )


def _intervals(r: dict) -> str:
    cells = [row["P(x_1 < -1)"] for row in r["table"]["2000"].values()]
    span = lambda key: "{:.2f} to {:.2f}".format(*(f(c[key] for c in cells) for f in (min, max)))
    return (
        f"a mass of {r['right']['P(x_1 < -1)'][0]:.2f}, 2,000 particles: 95% intervals cover it in "
        f"{span('covered')} of the runs of a method, 1.96 standard errors in {span('normal')}"
    )


def _audits(r: dict) -> str:
    row = r["table"]["quadratic"]
    return (
        f"`quadratic`: {row['plug-in']['share']:.1%} of plug-in's samples count, "
        f"{row['exact h']['share']:.1%} of the exact h's"
    )


def _toys(r: dict) -> str:
    row = r["table"]["eight modes"]
    of = lambda name: "{:.2f} ± {:.2f}".format(*row[name]["emd"])
    return (
        f"eight modes, distance to the target: DAS with both faults {of('DAS, both faults')}, with "
        f"neither {of('DAS, neither fault')}, floor {of('target (floor)')}"
    )


def _toys_learned(r: dict) -> str:
    row = r["table"]["eight modes"]["DAS"]
    return (
        f"eight modes, DAS's distance to the target: {row['exact']['emd'][0]:.2f} with the exact "
        f"score, {row['learned']['emd'][0]:.2f} with the network"
    )


def _pareto(r: dict) -> str:
    worst = lambda name: max(row["methods"][name]["w2"] / row["floor"] for row in r["rows"])
    return (
        f"W2 over the floor, the worst of {len(r['rows'])} weights: Tilted {worst('Tilted'):.2f}, "
        f"plug-in {worst('plug-in'):.1f}"
    )


def _blackbox(r: dict) -> str:
    return "optimum found by " + ", ".join(
        f"{name} {row['found']:.0%}" for name, row in r["table"].items()
    )


def _external(r: dict) -> str:
    of = lambda name: r["table"][name]["64"]["gradient"]
    return f"gradient of 64 states: JAX {of('JAX'):.0f} microseconds, NumPy {of('NumPy'):.0f}"


def _text(r: dict) -> str:
    most = max(row["n"] for row in r["rows"])
    best = {row["method"]: row["draw"]["glad"][0] for row in r["rows"] if row["n"] == most}
    return (
        f"share of glad sentences, {r['truth']['glad']:.2f} of the data: "
        + ", ".join(f"{m} {v:.2f}" for m, v in best.items())
        + f" (n = {most})"
    )


def _training(r: dict) -> str:
    last, beside = r["rows"][-1], r["side_by_side"]
    text = (
        f"{last['share_average'][0]:.1%} in filled squares after {last['steps']:,} steps, "
        f"{last['steps_per_second']:.1f} steps a second"
    )
    return (
        text
        if beside is None
        else f"{text}; {beside['ratio']:.2f} times those of the published code side by side"
    )


def _annealing(r: dict) -> str:
    reached = [row for row in r["eight modes"]["rows"] if row["tilt"] > 1]
    row = min(reached, key=lambda row: row["divergence"][0] / row["tilt"])
    return (
        f"eight modes: {row['method']}, {row['setting']}, is nearest to the frontier: mean reward "
        f"{row['reward'][0]:.2f} at a divergence of "
        f"{row['divergence'][0]:.2f}, where the tilt has {row['tilt']:.2f}"
    )


def _plain(r: dict) -> str:
    worst = lambda task: max(row["ratio"] for row in r["rows"] if row["task"] == task)
    tasks = dict.fromkeys(row["task"] for row in r["rows"])
    return "at most " + ", ".join(f"{worst(task):.1f} ({task})" for task in tasks) + " times plain"


def _many_particles(r: dict) -> str:
    first, last = r["rows"][0], r["rows"][-1]
    each = lambda row: 1e6 * row["run_cpu"] / row["num"]
    return (
        f"{each(first):.0f} CPU-microseconds a particle at {first['num']:,}, {each(last):.0f} at "
        f"{last['num']:,}, in {last['peak_gb']:.2f} GB"
    )


def _smc_scaling(r: dict) -> str:
    return "weighted over unweighted time, resampling below half: " + ", ".join(
        f"{name} {row['below half']['ratio']:.2f}" for name, row in r["ratios"].items()
    )


def _devices(r: dict) -> str:
    work = lambda n, verb: next(
        row["operations"]
        for row in r["rows"]
        if (row["devices"], row["verb"]) == (n, verb) and row["scaling"] != "weak"
    )
    most = max(row["devices"] for row in r["rows"])
    last = next(row for row in r["rows"] if (row["devices"], row["verb"]) == (most, "smc"))
    falls = " and ".join(
        f"1/{work(1, verb) / work(most, verb):.1f} in `{verb}`" for verb in ("sample", "smc")
    )
    return (
        f"a device of {most} does {falls} of the work of one alone; `sample` exchanges nothing in "
        f"a step, `smc` {last['collectives_a_step']:.0f} "
        f"arrays, {last['received_a_step'] / last['num']:.0f} bytes a particle to each device"
    )


def _flux_memory(r: dict) -> str:
    at = lambda n: max(
        (row["argument_bytes"] + row["computed_bytes"]) / 2**30
        for row in r["results"]
        if row["devices"] == n
    )
    return f"with a gradient, {at(1):.1f} GiB on one device, {at(8):.1f} GiB on each of eight"


def _flux_speed(r: dict) -> str:
    row = r["rows"][0]
    return (
        f"{row['size']} x {row['size']}: forward {row['forward']['s']:.3f} s, "
        f"{row['forward']['share_of_ceiling']:.0%} of a large product's rate; "
        f"a picture {row['picture']['s']:.2f} s, guided {row['guided_picture']['s']:.2f} s"
    )


def _train_tiny_flux(r: dict) -> str:
    minutes = (
        sum(
            stage["wall_s"] for stage in r.values() if isinstance(stage, dict) and "wall_s" in stage
        )
        / 60
    )
    maps = r["flow_map"]
    right = lambda steps: f"{maps[steps]['all']:.1%}"
    return (
        f"{minutes:.0f} minutes; samples right in shape, color, place and background: "
        f"{right('velocity_28_steps')} in 28 steps, "
        f"{right('map_4_steps')} in 4 of the map"
    )


def _vs_reference(r: dict) -> str:
    met = sum(not goal["missed"] for goal in r["goals"].values())
    span = lambda key: "{:.1f} to {:.1f}".format(
        *(f(row["ratios"][key] for row in r["rows"]) for f in (min, max))
    )
    return (
        f"{span('run_cpu')} times fewer CPU-seconds, {span('process_wall')} times less wall of a "
        f"process; {met} of {len(r['goals'])} goals met"
    )


def _vs_peers(r: dict) -> str:
    row = next(row for row in r["rows"] if row["problem"] == "quadratic")
    return "`quadratic`: " + ", ".join(
        f"{name} {cell['over_floor'][0]:.2f} times the floor in {cell['run_cpu']:.3f} CPU-s"
        for name, cell in row["methods"].items()
    )


def _limits(r: dict) -> str:
    worst = max(r["rows"], key=lambda row: row["ratio_wall"])
    return (
        f"{len(r['rows']) - len(r['beyond'])} of {len(r['rows'])} rows within {r['within']:g} "
        f"times the floor; worst {worst['ratio_wall']:.2f} ({worst['row']}, k = {worst['k']})"
    )


# In the order of the runs.
HEADLINES: dict[str, Callable[[dict[str, Any]], str]] = {
    "gaussian_tilt": _gaussian_tilt,
    "cost_to_floor": _cost_to_floor,
    "two_modes": _two_modes,
    "checkerboard": _checkerboard,
    "checkerboard_network": _checkerboard,
    "any_reward": _any_reward,
    "learned": _learned,
    "predictions": _predictions,
    "fmrg_or_plug_in": _fmrg_or_plug_in,
    "between_modes": _between_modes,
    "recommended": _recommended,
    "weighted": _weighted,
    "unbiased": _unbiased,
    "intervals": _intervals,
    "audits": _audits,
    "toys": _toys,
    "toys_learned": _toys_learned,
    "pareto": _pareto,
    "blackbox": _blackbox,
    "external": _external,
    "text": _text,
    "training": _training,
    "annealing": _annealing,
    "plain": _plain,
    "many_particles": _many_particles,
    "smc_scaling": _smc_scaling,
    "devices": _devices,
    "flux_memory": _flux_memory,
    "flux_speed": _flux_speed,
    "train_tiny_flux": _train_tiny_flux,
    "limits": _limits,
    "vs_reference": _vs_reference,
    "vs_peers": _vs_peers,
}


def script(name: str) -> Path:
    """The path of the benchmark that writes `results/<name>.json`."""
    (path,) = FOLDER.glob(f"*/{SCRIPTS.get(name, name)}.py")
    return path


def question(name: str) -> str:
    """The first paragraph of a benchmark's docstring, and what is special about these results."""
    text = ast.get_docstring(ast.parse(script(name).read_text())) or ""
    return " ".join([*text.split("\n\n")[0].split(), *VARIANTS.get(name, "").split()])


def machine(where: dict[str, Any]) -> tuple[str, str, str]:
    """The device, the versions and the commit of an environment."""
    cpu = where["backend"] == "cpu"
    device = f"{where['processor']}, {where['cores']} cores" if cpu else where["device"]
    return device, f"Python {where['python']}, JAX {where['jax']}", where["commit"]


def line(name: str, results: dict[str, Any]) -> str:
    """One row of the table."""
    cells = (
        f"[{name}]({name}.json)",
        question(name),
        HEADLINES[name](results),
        *machine(results["environment"]),
    )
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def table(folder: Path = RESULTS) -> str:
    """The text of the whole file, from the JSON files of the folder."""
    found = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
    if unknown := sorted(set(found) - set(HEADLINES)):
        raise ValueError(
            f"no headline for {', '.join(unknown)}: add one to HEADLINES in {Path(__file__).name}"
        )
    head = (
        "| benchmark | question | headline | device | versions | commit "
        "|\n|---|---|---|---|---|---|"
    )
    return (
        "\n".join(
            [INTRODUCTION, head, *(line(name, found[name]) for name in HEADLINES if name in found)]
        )
        + "\n"
    )


def names() -> list[str]:
    """The names of the benchmarks, in order."""
    return [name for name in HEADLINES if name not in SCRIPTS]


def command(name: str, args: argparse.Namespace) -> list[str] | None:
    """The command of a benchmark, or None if its reference is missing."""
    path = script(name)
    module = f"benchmarks.{path.parent.name}.{path.stem}"
    words = [sys.executable, "-m", module, *(["--quick"] if args.quick else [])]
    if name in (*NEEDS_REFERENCE, "training") and args.reference is not None:
        return [*words, "--reference", str(args.reference), "--python", args.python]
    return None if name in NEEDS_REFERENCE else words


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"some of {', '.join(names())}; all by default"
    )
    parser.add_argument(
        "--quick", action="store_true", help="each on a small scale; nothing is written"
    )
    parser.add_argument(
        "--table",
        action="store_true",
        help="run nothing: write the table of the results that exist",
    )
    parser.add_argument(
        "--reference",
        type=Path,
        help="a checkout of the published code, for vs_reference and training",
    )
    parser.add_argument(
        "--python", default=sys.executable, help="of an environment in which it runs"
    )
    args = parser.parse_args()
    if unknown := sorted(set(args.names) - set(names())):
        parser.error(f"no benchmark is called {', '.join(unknown)}: there are {', '.join(names())}")
    failed, left_out = [], []
    for name in [] if args.table else args.names or names():
        words = command(name, args)
        if words is None:
            left_out.append(name)
            continue
        print(f"\n== {name}: {question(name)}\n", flush=True)
        begun = time.monotonic()
        if subprocess.run(
            words, env=os.environ | ENVIRONMENT.get(name, {}), cwd=FOLDER.parent, check=False
        ).returncode:
            failed.append(name)
        print(f"\n== {name}: {time.monotonic() - begun:.0f} s", flush=True)
    if not args.quick:
        (RESULTS / "README.md").write_text(table())
        print(f"written: {RESULTS / 'README.md'}")
    if left_out:
        print(f"left out: {', '.join(left_out)}, which needs --reference CHECKOUT")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
