"""Write the tables of results into the documentation: docs/evidence/*.md and README.md.

    python -m benchmarks.tables [--check]

The lines between `<!-- table: NAME -->` and `<!-- end -->` are replaced by the table NAME, which is
made from one file of `results`. With `--check` nothing is written, and a page that would change is
an error.
"""

import argparse
import json
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks import run

ROOT = Path(__file__).resolve().parents[1]
EVIDENCE = ROOT / "docs" / "evidence"
MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
NUMBER = re.compile(r"[-+]?[\d.,]+%?( [±/(].*)?")
GIB = 2**30


# Formats


def markdown(header: str | Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """The lines of a table, with columns of numbers aligned to the right. A header of fixed columns
    is one text, `"method | W2"`.
    """
    names = header.split(" | ") if isinstance(header, str) else header
    table = [[str(cell).replace("|", r"\|") for cell in row] for row in rows]
    number = [any(map(NUMBER.fullmatch, column)) for column in zip(*table, strict=True)]
    rule = ["---:" if right else "---" for right in [False, *number[1:]]]
    return [f"| {' | '.join(row)} |" for row in (names, rule, *table)]


def value(pair: Sequence[float], form: str = ".3f") -> str:
    """A mean and its standard error. An error of zero means that the number is exact."""
    center, error = pair
    return f"{center:{form}}" + (f" ± {error:{form.lstrip('+')}}" if error else "")


def both(cells: dict[str, Any], key: str, form: str) -> str:
    """The same measurement of the published code and of tiltjax."""
    return " / ".join(f"{cells[side][key]:{form}}" for side in ("published", "tiltjax"))


# Accuracy


def gaussian_tilt(r: dict, methods: Sequence[str] = (), errors: bool = True) -> list[str]:
    table, problems = r["table"], list(r["table"]["floor"])

    def w2(cell: dict) -> str:
        ours = value(cell["w2"]) if errors else f"{cell['w2'][0]:.3f}"
        return ours + (f" ({cell['published']:.3f})" if cell["published"] else "")

    def row(method: str) -> list[str]:
        cells = table[method]
        cpu = cells["quadratic"].get("run_cpu")
        return [method, *(w2(cells[p]) for p in problems), "" if cpu is None else f"{cpu:.3f}"]

    header = ["method", *problems, "CPU-seconds, `quadratic`"]
    return markdown(header, map(row, methods or table))


def readme_accuracy(r: dict) -> list[str]:
    methods = ("floor", "plug-in k=1", "plug-in k=8", "damped k=1", "FMRG", "Laplace", "Tilted")
    return gaussian_tilt(r, methods, errors=False)


def cost_to_floor(r: dict) -> list[str]:
    return markdown(
        "method | within 1.2 times the floor | setting | W2 / floor | "
        "CPU-seconds | denoiser calls | backward passes",
        (
            [
                method,
                "yes" if row["over_floor"] <= 1.2 else "no",
                row["setting"],
                value((row["over_floor"], row["error"]), ".2f"),
                f"{row['run_cpu']:.4f}",
                f"{row['forward']:,}",
                f"{row['backward']:,}",
            ]
            for method, row in r["methods"].items()
        ),
    )


def predicted_draws(r: dict) -> list[str]:
    header = ["draws k", *(f"{int(k):,}" for k in r["plain"])]
    return markdown(header, [["predicted W2", *(f"{w2:.3f}" for w2 in r["plain"].values())]])


def predicted_widths(r: dict) -> list[str]:
    cells = r["damped"].values()
    closer = [f"{c['k']:,}" if c["k"] else "none up to 10,000" for c in cells]
    return markdown(
        ["assumed width / true width", *r["damped"]],
        [
            ["predicted W2, one damped draw", *(f"{c['w2']:.3f}" for c in cells)],
            ["plain draws that come closer", *closer],
        ],
    )


def predicted_plans(r: dict, budget: str = "1000") -> list[str]:
    return markdown(
        "method | steps | denoiser calls | predicted W2 | basis of the prediction",
        (
            [f"`{p['method']}`", p["steps"], f"{p['cost']:.0f}", f"{p['w2']:.4f}", p["basis"]]
            for p in r["plans"][budget]
        ),
    )


def closer_in_bold(pair: Sequence[float]) -> str:
    """Two distances, with the smaller one in bold if they differ in the table."""
    texts = [f"{w2:.3f}" for w2 in pair]
    closer = pair.index(min(pair))
    if texts[0] != texts[1]:
        texts[closer] = f"**{texts[closer]}**"
    return " / ".join(texts)


def fmrg_or_plug_in(r: dict) -> list[str]:
    rows = r["rows"]
    scales = list(next(iter(rows.values()))["w2"])
    header = ["width", *(f"scale {float(scale):g}" for scale in scales), "equal at scale"]
    cells = lambda row: [*map(closer_in_bold, row["w2"].values()), f"{row['equal']:.3g}"]
    return markdown(header, ([f"{float(w):g}", *cells(row)] for w, row in rows.items()))


def fmrg_or_plug_in_runs(r: dict) -> list[str]:
    steps = r["runs"][0]["w2"]
    header = ["width", "scale", *(f"{int(n):,} steps" for n in steps), "limit"]
    cells = lambda row: map(closer_in_bold, [*row["w2"].values(), row["limit"]])
    rows = ([f"{row['width']:g}", f"{row['scale']:g}", *cells(row)] for row in r["runs"])
    return markdown(header, rows)


def between_modes_named(r: dict) -> list[str]:
    cell = lambda c: value((c["w2"], c["error"]))
    rows = ([name, cell(row["plain"]), cell(row["damped"])] for name, row in r["named"].items())
    return markdown("problem | plain | damped", rows)


def between_modes(r: dict) -> list[str]:
    rows = []
    for name, laws in r["runs"].items():
        for method, law in laws.items():
            gaps = law[str(r["steps"][-1])]
            numbers = [f"{gaps[part]:.1f}" for part in ("mean", "cov", "masses")]
            w2 = value((law["w2"], law["w2 error"]))
            rows.append([name, method, w2, *numbers, f"{gaps['masses gap']:.4f}"])
    return markdown("mixture | method | W2 | mean | covariance | masses | largest gap", rows)


def recommended(r: dict) -> list[str]:
    def of_all_pairs(rows: list[dict]) -> str:
        """Of pairs whose measured W2 differ by more than 20%, errors or not."""
        w2 = [(row["measured"][0], row["predicted"][0]) for row in rows]
        pairs = [(a, b) for a in w2 for b in w2 if b[0] > 1.2 * a[0]]
        return f"{sum(b[1] < a[1] for a, b in pairs)} of {len(pairs)}"

    def count(row: dict) -> list[Any]:
        wrong = f"{row['wrong']} of {row['pairs']}"
        return [len(row["rows"]), wrong, of_all_pairs(row["rows"]), row["off"]]

    rows = ([name, *count(row), f"{row['seconds']:.0f}"] for name, row in r["table"].items())
    head = "mixture | methods | wrong pairs | of all pairs | W2 off | seconds"
    return markdown(head, rows)


def recommended_methods(r: dict, mixture: str = "four modes, one singular") -> list[str]:
    rows = r["table"][mixture]["rows"]
    cells = lambda row: [f"`{row['method']}`", row["steps"]]
    w2 = lambda row: [value(row["predicted"]), value(row["measured"])]
    return markdown("method | steps | predicted W2 | measured W2", (cells(r) + w2(r) for r in rows))


def recommended_damped(r: dict) -> list[str]:
    rows = r["damped"].items()
    return markdown(
        "problem | predicted W2 | published W2, with the floor",
        ([name, value(row["predicted"]), f"{row['published']:.3f}"] for name, row in rows),
    )


def two_modes(r: dict) -> list[str]:
    problems = r["problems"]
    header = ["n"] + [f"{p}: {column}" for p in problems for column in ("P(X >= 0)", "published")]

    def row(n: str) -> list[str]:
        cells = [problems[p]["best_of_n"][n] for p in problems]
        texts = ((value((c["share"], c["error"])), f"{c['published']:.3f}") for c in cells)
        return [n, *(text for pair in texts for text in pair)]

    exact = [text for p in problems.values() for text in (f"{p['tilt']:.3f}", "")]
    return markdown(header, [*map(row, problems["step"]["best_of_n"]), ["exact tilt", *exact]])


def checkerboard(r: dict) -> list[str]:
    def row(found: dict) -> list[str]:
        published = found["published"]
        return [
            found["method"].replace("keep = 0", "smoothing = 0"),  # the option's name today
            value(found["mean_reward"]),
            value(found["trace"]),
            f"{found['calls']:,}",
            f"{found['pullbacks']:,}",
            " / ".join(f"{number:.3f}" for number in published) if published else "",
        ]

    truth = ["exact tilt", f"{r['truth']['mean_reward']:.4f}", f"{r['truth']['trace']:.4f}"]
    failed = [[method, "not finite", "not finite", "", "", ""] for method in r.get("failed", ())]
    return markdown(
        "method | mean reward | trace of the covariance | denoiser calls | "
        "backward passes | published (reward / trace)",
        [[*truth, "", "", ""], *map(row, r["rows"]), *failed],
    )


def learned(r: dict) -> list[str]:
    methods = [name for name in r["rows"][0] if name.endswith((", exact", ", network"))]
    return markdown(
        ["target", "scale", *methods],
        (
            [
                "({:g}, {:g})".format(*row["target"]),
                f"{row['scale']:g}",
                *(f"{row[method]['w2'] / row['floor']:.2f}" for method in methods),
            ]
            for row in r["rows"]
        ),
    )


# Weighted particles


def weighted_planar(r: dict) -> list[str]:
    return markdown(
        "problem | twist, proposal | W2 / floor | ESS fraction | "
        "fraction in the right half | log Z minus truth, 200 steps | 1,000 steps",
        (
            [
                problem,
                method,
                value(row["over_floor"], ".2f"),
                f"{row['share']:.2f}",
                value(row["right"]) if "right" in row else "",
                value(row["log_norm_off"], "+.3f"),
                value(row["log_norm_off_long"], "+.3f"),
            ]
            for problem, table in r["planar"].items()
            for method, row in table.items()
            if isinstance(row, dict)
        ),
    )


def weighted_bump(r: dict) -> list[str]:
    methods = {name: row for name, row in r["bump"].items() if name != "exact"}
    rows = [[name, value(row["right"], ".4f"), f"{row['z']:+.1f}"] for name, row in methods.items()]
    exact = ["exact tilt", f"{r['bump']['exact']:.4f}", ""]
    return markdown("twist | P(X >= 0) | difference in standard errors", [exact, *rows])


def weighted_checkerboard(r: dict) -> list[str]:
    keys = ("reward", "trace", "log_norm")
    exact, *methods = r["checkerboard"].items()
    rows = [["exact tilt", *(f"{exact[1][key]:.4f}" for key in keys), ""]]
    for name, row in methods:
        cells = (value(row[key], ".4f") for key in keys)
        rows.append([name, *cells, f"{row['families'][0]:,.0f}"])
    header = ["twist, proposal", "mean reward", "trace of the covariance", "log Z"]
    return markdown([*header, f"distinct ancestors of {r['num']:,}"], rows)


def intervals(r: dict, of: str = "P(x_1 < -1)") -> list[str]:
    return markdown(
        "particles | method | 95% interval | mean ± 1.96 standard errors | warned | neither covers "
        "nor warns | width / spread | median support",
        (
            [
                f"{int(size):,}",
                method,
                f"{cell['covered']:.1%}",
                f"{cell['normal']:.1%}",
                f"{cell['warned']:.1%}",
                f"{cell['silent']:.1%}",
                f"{cell['width']:.2f}",
                f"{cell['support']:.1f}",
            ]
            for size, table in r["table"].items()
            for method, cell in ((name, row[of]) for name, row in table.items())
        ),
    )


def intervals_coverage(r: dict, size: str = "2000") -> list[str]:
    text = lambda cell: f"{cell['covered']:.1%} ({cell['normal']:.1%}, {cell['warned']:.0%})"
    rows = r["table"][size].items()
    return markdown(
        ["method", *r["right"]],
        ([method, *(text(cell) for cell in row.values())] for method, row in rows),
    )


def unbiased(r: dict) -> list[str]:
    axes = {"all": r["axes"]["all"], **r["axes"]}
    return markdown(
        "part | choice | combinations | mean of z | sd of z | largest abs(z) | "
        "abs(z) above 2 | mean of the estimates of Z / Z",
        (
            [
                axis,
                choice,
                f"{row['cells']:,}",
                f"{row['mean']:+.2f}",
                f"{row['sd']:.2f}",
                f"{row['max']:.2f}",
                f"{row['above_2']:.1%}",
                value(row["pooled"], ".4f"),
            ]
            for axis, table in axes.items()
            for choice, row in table.items()
        ),
    )


def _toys(r: dict, columns: tuple[str, str], cells: Callable[[dict], list[str]]) -> list[str]:
    """A row for each method; for each data set two columns, and the published mean reward."""
    table = r["table"]
    header = [f"{data}: {column}" for data in table for column in (*columns, "published reward")]

    def row(method: str) -> list[str]:
        found = [table[data][method] for data in table]
        number = lambda cell: "" if cell["published"] is None else f"{cell['published']:.2f}"
        return [method, *(text for cell in found for text in (*cells(cell), number(cell)))]

    return markdown(["method", *header], map(row, next(iter(table.values()))))


def toys(r: dict) -> list[str]:
    cells = lambda cell: [value(cell["reward"]), value(cell["emd"], ".2f")]
    return _toys(r, ("mean reward", "EMD"), cells)


def toys_learned(r: dict) -> list[str]:
    def text(cell: dict, key: str, form: str) -> str:
        return "did not converge" if "failed" in cell else f"{cell[key][0]:{form}}"

    def cells(cell: dict) -> list[str]:
        models = cell["exact"], cell["learned"]
        return [
            " / ".join(text(model, key, form) for model in models)
            for key, form in (("reward", ".3f"), ("emd", ".2f"))
        ]

    return _toys(r, ("mean reward, exact / network", "EMD, exact / network"), cells)


def toys_audits(r: dict) -> list[str]:
    return markdown(
        "data | guidance | denoiser | ESS fraction | Pareto k | path KL, nats",
        (
            [
                data,
                guidance,
                {"exact": "exact", "learned": "network"}[model],
                f"{row['share']:.4f}",
                f"{row['pareto_k']:.2f}",
                value(row["path_kl"], ",.2f"),
            ]
            for data, models in r["audits"].items()
            for guidance in models["exact"]
            for model, row in ((model, models[model][guidance]) for model in models)
        ),
    )


def audits(r: dict) -> list[str]:
    return markdown(
        "problem | method | ESS fraction | Pareto k | "
        "path KL, nats | log Z minus truth | W2 / floor",
        (
            [
                problem,
                method,
                f"{row['share']:.3f}",
                f"{row['pareto_k']:.2f}",
                value(row["path_kl"]),
                f"{row['log_norm_off'][0]:+.2f}",
                f"{row['over_floor']:.2f}",
            ]
            for problem in ("quadratic", "uncentered", "double_well")
            for method, row in r["table"][problem].items()
            if method != "floor"
        ),
    )


# Rewards


def any_reward(r: dict) -> list[str]:
    methods = list(r["rows"][0]["methods"])
    text = lambda cell: f"{cell['share']:.3f} / {cell['w2']:.2f}" if cell else "-"
    return markdown(
        ["reward", "d", "exact P(x_1 >= 0)", "floor of W2", *methods],
        (
            [
                row["problem"],
                row["dim"],
                f"{row['share']:.3f}",
                f"{row['floor']:.2f}",
                *(text(row["methods"].get(method)) for method in methods),
            ]
            for row in r["rows"]
        ),
    )


def pareto(r: dict) -> list[str]:
    methods = list(r["rows"][0]["methods"])
    return markdown(
        ["weight of r_1", *methods],
        (
            [f"{row['w']:g}", *(f"{row['methods'][m]['w2'] / row['floor']:.2f}" for m in methods)]
            for row in r["rows"]
        ),
    )


def blackbox(r: dict) -> list[str]:
    first = next(iter(r["table"].values()))
    return markdown(
        ["method", *(f"regret after {n} queries" for n in first["regret"]), "found the high peak"],
        (
            [method, *map(value, row["regret"].values()), f"{row['found']:.0%}"]
            for method, row in r["table"].items()
        ),
    )


def external(r: dict) -> list[str]:
    keys = ("value", "value_alone", "gradient", "gradient_alone")
    number = lambda found: "" if found is None else f"{found:,.0f}"
    return markdown(
        "reward written in | states | value | function alone | value and gradient | function alone",
        (
            [name, f"{int(num):,}", *(number(row[key]) for key in keys)]
            for name, rows in r["table"].items()
            for num, row in rows.items()
        ),
    )


# Training


def training(r: dict) -> list[str]:
    rows = [
        [
            f"{row['steps']:,}",
            value(row["share_average"], ".1%"),
            value(row["excess_average"], ".4f"),
            f"{row['steps_per_second']:.0f}",
        ]
        for row in r["rows"]
    ]
    return markdown(
        "training steps | samples in filled squares | "
        "mean square error of the velocity | steps per second",
        [*rows, ["exact denoiser", f"{r['exact_share'][0]:.1%}", "0", ""]],
    )


def training_side_by_side(r: dict) -> list[str]:
    return markdown(
        "code | steps per second | CPU-seconds per step",
        (
            [name, f"{row['steps_per_second']:.1f}", f"{row['cpu_seconds_per_step']:.3f}"]
            for name, row in r["side_by_side"].items()
            if isinstance(row, dict)
        ),
    )


def annealing(r: dict, data: str) -> list[str]:
    return markdown(
        "method | setting | mean reward | divergence | divergence of the exact tilt",
        (
            [
                row["method"],
                row["setting"],
                value(row["reward"]),
                value(row["divergence"]),
                f"{abs(row['tilt']):.3f}",
            ]
            for row in r[data]["rows"]
        ),
    )


def collapse(r: dict, data: str = "eight modes") -> list[str]:
    return markdown(
        "steps | mean reward | divergence | entropy | coverage",
        (
            [
                row["steps"],
                f"{row['reward'][0]:.3f}",
                f"{row['divergence'][0]:.2f}",
                f"{row['entropy']:.2f}",
                f"{row['coverage']:.2f}",
            ]
            for row in r[data]["collapse"]
        ),
    )


# Text and images


def text(r: dict) -> list[str]:
    keys = ("glad", "reward", "nats")
    truth = f"{r['truth']['glad']:.2f}", "", f"{r['truth']['nats']:.2f}"
    rows = [
        [row["method"], row["n"], *(value(row["draw"][key], ".2f") for key in keys)]
        for row in r["rows"]
    ]
    return markdown(
        "method | n | probability of a glad sentence | reward | nats per word",
        [["the language itself", "", *truth], *rows],
    )


def flux_memory(r: dict) -> list[str]:
    forward, gradient = ([x for x in r["results"] if x["gradient"] is g] for g in (False, True))
    return markdown(
        "devices | mesh | parameters and inputs | forward pass | "
        "with its gradient | estimate with fused attention, with gradient",
        (
            [
                a["devices"],
                " x ".join(map(str, a["mesh"])),
                f"{a['argument_bytes'] / GIB:.1f}",
                f"{a['computed_bytes'] / GIB:.1f}",
                f"{b['computed_bytes'] / GIB:.1f}",
                f"{b['estimated_activation_bytes'] / GIB:.1f}",
            ]
            for a, b in zip(forward, gradient, strict=True)
        ),
    )


def train_tiny_flux(r: dict) -> list[str]:
    keys = ("shape", "color", "place", "background", "all")
    clip, maps = r["clip"], r["flow_map"]

    def row(name: str, stage: dict, found: dict) -> list[str]:
        cells = (f"{found[key]:.1%}" if key in found else "" for key in keys)
        return [name, f"{stage['steps']:,}", f"{stage['wall_s'] / 60:.0f}", *cells]

    return markdown(
        ["stage", "training steps", "minutes", *keys[:-1], "all four"],
        [
            row("autoencoder, decoded images", r["autoencoder"], r["autoencoder"]),
            row("text encoder, right caption of 64", clip, {"all": clip["most_similar_of_64"]}),
            row("velocity, 28 steps", r["velocity"], r["velocity"]),
            row("flow map, 28 steps of its velocity", maps, maps["velocity_28_steps"]),
            row("flow map, 4 steps", maps, maps["map_4_steps"]),
            row("flow map, 1 step", maps, maps["map_1_step"]),
        ],
    )


# Speed


def vs_reference(r: dict) -> list[str]:
    return markdown(
        "problem | method | CPU-seconds | ratio | seconds of a process | memory, GB | W2",
        (
            [
                row["problem"],
                row["method"],
                both(row, "run_cpu", ".3g"),
                f"{row['ratios']['run_cpu']:.1f}",
                both(row, "process_wall", ".1f"),
                both(row, "peak_gb", ".2f"),
                " / ".join(f"{mean(row['w2'][side]):.3f}" for side in ("published", "tiltjax")),
            ]
            for row in r["rows"]
        ),
    )


def goals(r: dict) -> list[str]:
    return markdown(
        "goal | rows that meet it | smallest value | in the row",
        (
            [
                name,
                f"{goal['rows'] - len(goal['missed'])} of {goal['rows']}",
                f"{goal['worst']:.1f}",
                goal["row"],
            ]
            for name, goal in r["goals"].items()
        ),
    )


def readme_speed(r: dict) -> list[str]:
    rows = {row["method"]: row for row in r["rows"] if row["problem"] == "quadratic"}
    return markdown(
        "method on `quadratic` | CPU-seconds, published / tiltjax | ratio",
        (
            [name, both(rows[name], "run_cpu", ".3g"), f"{rows[name]['ratios']['run_cpu']:.1f}"]
            for name in ("k = 1", "k = 8", "damped", "FMRG")
        ),
    )


def limits(r: dict) -> list[str]:
    return markdown(
        "denoiser | k | evaluations per sample | seconds of the evaluations alone | "
        "seconds of sampling | ratio | ratio of CPU-seconds",
        (
            [
                row["row"],
                row["k"],
                f"{row['evaluations']:,}",
                f"{row['floor_wall']:.3g}",
                f"{row['run_wall']:.3g}",
                f"{row['ratio_wall']:.2f}",
                f"{row['ratio_cpu']:.2f}",
            ]
            for row in r["rows"]
        ),
    )


def plain(r: dict) -> list[str]:
    return markdown(
        "task | components | dimension | points | tiltjax, ms | "
        "plain JAX, ms | ratio | ratio on busy cores | first call, s",
        (
            [
                {"none": "no guidance"}.get(row["task"], row["task"]),
                row["components"],
                row["dim"],
                f"{row['num']:,}",
                f"{1e3 * row['ours']:.1f}",
                f"{1e3 * row['plain']:.1f}",
                f"{row['ratio']:.2f}",
                f"{row['busy_ratio']:.2f}",
                " / ".join(f"{seconds:.1f}" for seconds in row["first"]),
            ]
            for row in r["rows"]
        ),
    )


def particles(r: dict) -> list[str]:
    return markdown(
        "particles | CPU-seconds | CPU-microseconds per particle | peak memory, GB",
        (
            [
                f"{row['num']:,}",
                f"{row['run_cpu']:.3g}",
                f"{1e6 * row['run_cpu'] / row['num']:.1f}",
                f"{row['peak_gb']:.2f}",
            ]
            for row in r["rows"]
        ),
    )


def smc_scaling(r: dict) -> list[str]:
    keys = ("none resampled", "below half", "every step")
    return markdown(
        "model | never resampled | resampled below an ESS fraction of one half | "
        "resampled after every step",
        (
            [name, *(f"{row[key]['ratio']:.2f}" for key in keys)]
            for name, row in r["ratios"].items()
        ),
    )


def devices(r: dict) -> list[str]:
    verb = lambda name, scaling: [
        row for row in r["rows"] if row["verb"] == name and row["scaling"] in (scaling, "both")
    ]

    def row(scaling: str, a: dict, b: dict) -> list[str]:
        compiled = lambda x: (
            f"{x['operations'] / 1e6:.1f}",
            f"{(x['argument_bytes'] + x['buffer_bytes']) / 1024:.0f}",
        )
        exchanged = f"{b['collectives_a_step']:.0f}", f"{b['received_a_step'] / 1024:.0f}"
        times = (f"{1000 * x['run_cpu']:.0f}" for x in (a, b))
        return [scaling, a["devices"], a["num"], *compiled(a), *compiled(b), *exchanged, *times]

    return markdown(
        "scaling | devices | particles | `sample`, Mflop | KiB | `smc`, Mflop | KiB | "
        "collective operations per step | KiB received per step | CPU-ms, `sample` | `smc`",
        (
            row(scaling, a, b)
            for scaling in ("strong", "weak")
            for a, b in zip(verb("sample", scaling), verb("smc", scaling), strict=True)
        ),
    )


def devices_predicted(r: dict) -> list[str]:
    chips = r["predicted"]
    cases = [(case, chip) for case in next(iter(chips.values())) for chip in chips]
    sizes = next(iter(next(iter(chips.values())).values()))
    return markdown(
        ["chips", *(f"{case}: {chip}" for case, chip in cases)],
        ([n, *(f"{chips[chip][case][n]:.1%}" for case, chip in cases)] for n in sizes),
    )


# By name: the results file and what makes a table of it.
TABLES: dict[str, tuple[str, Callable[[dict[str, Any]], list[str]]]] = {
    "readme_accuracy": ("gaussian_tilt", readme_accuracy),
    "readme_speed": ("vs_reference", readme_speed),
    "gaussian_tilt": ("gaussian_tilt", gaussian_tilt),
    "cost_to_floor": ("cost_to_floor", cost_to_floor),
    "predicted_draws": ("predictions", predicted_draws),
    "predicted_widths": ("predictions", predicted_widths),
    "predicted_plans": ("predictions", predicted_plans),
    "fmrg_or_plug_in": ("fmrg_or_plug_in", fmrg_or_plug_in),
    "fmrg_or_plug_in_runs": ("fmrg_or_plug_in", fmrg_or_plug_in_runs),
    "between_modes_named": ("between_modes", between_modes_named),
    "between_modes": ("between_modes", between_modes),
    "recommended": ("recommended", recommended),
    "recommended_methods": ("recommended", recommended_methods),
    "recommended_damped": ("recommended", recommended_damped),
    "two_modes": ("two_modes", two_modes),
    "checkerboard": ("checkerboard", checkerboard),
    "checkerboard_network": ("checkerboard_network", checkerboard),
    "learned": ("learned", learned),
    "weighted_planar": ("weighted", weighted_planar),
    "weighted_bump": ("weighted", weighted_bump),
    "weighted_checkerboard": ("weighted", weighted_checkerboard),
    "unbiased": ("unbiased", unbiased),
    "intervals": ("intervals", intervals),
    "intervals_coverage": ("intervals", intervals_coverage),
    "toys": ("toys", toys),
    "toys_learned": ("toys_learned", toys_learned),
    "toys_audits": ("toys_learned", toys_audits),
    "audits": ("audits", audits),
    "any_reward": ("any_reward", any_reward),
    "pareto": ("pareto", pareto),
    "blackbox": ("blackbox", blackbox),
    "external": ("external", external),
    "training": ("training", training),
    "training_side_by_side": ("training", training_side_by_side),
    "annealing_eight_modes": ("annealing", partial(annealing, data="eight modes")),
    "annealing_nine_modes": ("annealing", partial(annealing, data="nine modes")),
    "annealing_swiss_roll": ("annealing", partial(annealing, data="swiss roll")),
    "collapse": ("annealing", collapse),
    "text": ("text", text),
    "flux_memory": ("flux_memory", flux_memory),
    "train_tiny_flux": ("train_tiny_flux", train_tiny_flux),
    "vs_reference": ("vs_reference", vs_reference),
    "goals": ("vs_reference", goals),
    "limits": ("limits", limits),
    "plain": ("plain", plain),
    "many_particles": ("many_particles", particles),
    "smc_scaling": ("smc_scaling", smc_scaling),
    "smc_particles": ("smc_scaling", particles),
    "devices": ("devices", devices),
    "devices_predicted": ("devices", devices_predicted),
}


# Pages


def load(name: str) -> dict[str, Any]:
    return json.loads((run.RESULTS / f"{name}.json").read_text())


def pages() -> dict[str, str]:
    """The page of evidence that shows a results file, by the name of the file."""
    shown = {}
    for page in EVIDENCE.glob("*.md"):
        for found in MARKED.finditer(page.read_text()):
            if found[2] in TABLES:
                shown[TABLES[found[2]][0]] = page.name
    return shown


def overview() -> list[str]:
    """One row for each results file: its question, and the machine that answered it."""
    page = pages()

    def row(name: str) -> list[str]:
        device, versions, commit = run.machine(load(name)["environment"])
        return [f"[{name}]({page[name]})", run.question(name), device, versions, f"`{commit}`"]

    return markdown(
        "results | question | device | versions | commit",
        [row(name) for name in run.HEADLINES if name in page],
    )


def lines(name: str) -> list[str]:
    """The table of that name."""
    if name == "overview":
        return overview()
    results, make = TABLES[name]
    return make(load(results))


def filled(page: str, spaced: bool) -> str:
    """The text of a page with its tables made anew, `spaced` from the markers as the site needs it.
    **Raises:** `KeyError` for an unknown table.
    """
    gap = [""] if spaced else []

    def table(found: re.Match) -> str:
        return "\n".join([found[1].rstrip(), *gap, *lines(found[2]), *gap, found[3]])

    return MARKED.sub(table, page)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing: name stale pages")
    check = parser.parse_args().check
    changed = []
    for page in [ROOT / "README.md", *sorted(EVIDENCE.glob("*.md"))]:
        before = page.read_text()
        if (after := filled(before, page.parent == EVIDENCE)) != before:
            changed.append(str(page.relative_to(ROOT)))
            if not check:
                page.write_text(after)
    if check and changed:
        raise SystemExit(f"run python -m benchmarks.tables, it changes {', '.join(changed)}")


if __name__ == "__main__":
    main()
