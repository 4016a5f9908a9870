"""README's snippet runs as it stands, and its distances come out as its comments say."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import environment

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def snippet():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return next(block for block in blocks if "theory.plug_in_law" in block)


def test_the_snippet_runs_in_a_fresh_interpreter(snippet, tmp_path):
    command, env = [sys.executable, "-c", snippet], environment.quick()
    run = subprocess.run(
        command, env=env, capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert run.returncode == 0, run.stderr
    naive, damped, better, tilted, best = (float(line) for line in run.stdout.split())
    assert naive > best > max(damped, better, tilted)
    assert tilted < 0.12  # the floor is .07 with a standard deviation of .01


def test_files_that_readme_names_exist():
    text = (ROOT / "README.md").read_text()
    for name in re.findall(r"\]\((?!http)([^)]+)\)", text) + re.findall(
        r"python (benchmarks/\w+\.py)", text
    ):
        assert (ROOT / name).exists(), name


def test_the_tables_are_those_of_the_results():
    text, results = (ROOT / "README.md").read_text(), ROOT / "benchmarks" / "results"
    tilt = json.loads((results / "gaussian_tilt.json").read_text())["table"]
    for method, row in tilt.items():
        line = next(
            line
            for line in text.splitlines()
            if line.startswith(f"| {method} | ") and line.count("|") == 8
        )
        for cell in row.values():
            assert "{:.3f} ± {:.3f}".format(*cell["w2"]) in line
    costs = json.loads((results / "cost_to_floor.json").read_text())["methods"]
    for row in costs.values():
        assert (
            f"| {row['over_floor']:.2f} ± {row['error']:.2f} | {row['run_cpu']:.4f} | "
            f"{row['forward']:,} |" in text
        )
    beside = text.split("What the published code takes")[1].split("\n\n")[1]
    table = {
        f"{row['problem']}, {row['method']}": row
        for row in json.loads((results / "vs_reference.json").read_text())["rows"]
    }
    for line in beside.splitlines()[2:]:
        row = table[line.split(" | ")[0].removeprefix("| ")]
        both = lambda key, form, row=row: " / ".join(
            form.format(row[side][key]) for side in ("published", "tiltjax")
        )
        cells = (
            both("run_cpu", "{:.3g}"),
            f"{row['ratios']['run_cpu']:.1f}",
            both("process_wall", "{:.1f}"),
            both("peak_gb", "{:.2f}"),
        )
        assert line.endswith(" | " + " | ".join(cells) + " |")
    assert len(beside.splitlines()) == 9
    study = json.loads((results / "any_reward.json").read_text())["rows"]
    for row in study:
        cells = " | ".join(
            "not finite" if cell is None else f"{cell['share']:.3f} / {cell['w2']:.2f}"
            for cell in row["methods"].values()
        )
        assert f"| {row['dim']} | {row['share']:.3f} | {row['floor']:.2f} | " in text
        for cell in cells.split(" | "):
            assert cell in text
    board = json.loads((results / "checkerboard.json").read_text())["rows"]
    exact, network = text.split("| network | mean reward")
    for row in json.loads((results / "checkerboard_network.json").read_text())["rows"]:
        if f"| {row['method']} |" in network:
            mean, trace = (
                "{:.3f} ± {:.3f}".format(*row[name]) for name in ("mean_reward", "trace")
            )
            assert f"| {row['method']} | {mean} | {trace} | {row['calls']:,} |" in network
    shown = [row for row in board if f"| {row['method']} |" in exact]
    assert len(shown) > 10
    for row in shown:
        mean, trace = ("{:.3f} ± {:.3f}".format(*row[name]) for name in ("mean_reward", "trace"))
        assert (
            f"| {row['method']} | {mean} | {trace} | {row['calls']:,} | {row['pullbacks']:,} |"
            in text
        )
    for row in json.loads((results / "learned.json").read_text())["rows"]:
        over = " | ".join(
            f"{cell['w2'] / row['floor']:.2f}" for cell in row.values() if isinstance(cell, dict)
        )
        assert f"| {row['scale']:g} | {over} |" in text
    predicted = json.loads((results / "predictions.json").read_text())
    assert " | ".join(f"{value:.3f}" for value in predicted["plain"].values()) in text
    assert " | ".join(f"{cell['w2']:.3f}" for cell in predicted["damped"].values()) in text
    assert (
        " | ".join(
            "none to 10,000" if c["k"] is None else f"{c['k']:,}"
            for c in predicted["damped"].values()
        )
        in text
    )
    for option in predicted["plans"]["1000"]:
        assert (
            f"| `{option['method']}` | {option['steps']} | {option['cost']:,.0f} | "
            f"{option['w2']:.4f} |" in text
        )


def test_the_tables_of_weighted_particles_are_those_of_the_results():
    text, results = (ROOT / "README.md").read_text(), ROOT / "benchmarks" / "results"
    read = lambda name: json.loads((results / f"{name}.json").read_text())
    signed, plain = "{:+.3f} ± {:.3f}".format, "{:.3f} ± {:.3f}".format
    shown = 0

    def expect(line):
        nonlocal shown
        shown += 1
        assert line in text

    weighted = read("weighted")
    for problem, row in weighted["planar"].items():
        methods = [
            name
            for name in row
            if f"| {problem} | {name} |" in text and isinstance(row[name], dict)
        ]
        for method in methods if problem == "double_well" else ["Laplace, Guided"]:
            cell = row[method]
            over = "{:.2f} ± {:.2f} | {:.2f}".format(*cell["over_floor"], cell["share"])
            right = plain(*cell["right"]) if "right" in cell else ""
            logs = " | ".join(signed(*cell[key]) for key in ("log_norm_off", "log_norm_off_long"))
            expect(f"| {problem} | {method} | {over} | {right} | {logs} |")
    for method, row in weighted["checkerboard"].items():
        if method == "exact":
            expect("| *the tilt* | {reward:.4f} | {trace:.4f} | {log_norm:.4f} |".format(**row))
        else:
            cells = " | ".join(
                "{:.4f} ± {:.4f}".format(*row[key]) for key in ("reward", "trace", "log_norm")
            )
            expect(f"| {method} | {cells} | {row['families'][0]:,.0f} |")
    for rows in read("toys")["table"].values():
        lines = [line for line in text.splitlines() if line.count("|") == 8]
        for method in (
            name for name in rows if any(line.startswith(f"| {name} |") for line in lines)
        ):
            mean = (
                f"{rows[method]['reward'][0]:.3f} "
                if method == "target (floor)"
                else plain(*rows[method]["reward"])
            )
            number = rows[method]["published"]
            published = "" if number is None else f"{number:.2f}"
            line = next(line for line in lines if line.startswith(f"| {method} |"))
            assert mean in line
            assert "| {:.2f} ± {:.2f} | {} |".format(*rows[method]["emd"], published) in line
            shown += 1
    for problem, rows in read("audits")["table"].items():
        for method, row in rows.items():
            if method != "floor" and f"| {problem} | {method} |" in text:
                kl = plain(*row["path_kl"])
                over = f"{row['log_norm_off'][0]:+.2f} | {row['over_floor']:.2f}"
                expect(
                    f"| {problem} | {method} | {row['share']:.3f} | {row['pareto_k']:.2f} | {kl} | "
                    f"{over} |"
                )
    for method, row in read("blackbox")["table"].items():
        expect(
            f"| {method} | {' | '.join(plain(*cell) for cell in row['regret'].values())} | "
            f"{row['found']:.2f} |"
        )
    for row in read("text")["rows"]:
        cells = " | ".join(
            "{:.2f} ± {:.2f}".format(*row["draw"][key]) for key in ("glad", "reward", "nats")
        )
        expect(f"| {row['method']} | {row['n']} | {cells} |")
    for model, row in read("smc_scaling")["ratios"].items():
        ratios = " | ".join(
            f"{row[gate]['ratio']:.2f}" for gate in ("none resampled", "below half", "every step")
        )
        expect(f"| {model} | {ratios} |")
    row = read("unbiased")["axes"]["all"][""]
    numbers = f"{row['mean']:+.2f} | {row['sd']:.2f} | {row['max']:.2f} | {row['above_2']:.1%}"
    expect(f"| {row['cells']:,} | {numbers} | " + "{:.4f} ± {:.4f} |".format(*row["pooled"]))
    for row in read("annealing")["eight modes"]["rows"]:
        if f"| {row['method']} | {row['setting']} |" in text:
            cells = f"{plain(*row['reward'])} | {plain(*row['divergence'])} | {row['tilt']:.3f} |"
            expect(f"| {row['method']} | {row['setting']} | {cells}")
    for row in read("annealing")["eight modes"]["collapse"]:
        numbers = f"{row['divergence'][0]:.2f} | {row['entropy']:.2f} | {row['coverage']:.2f} |"
        expect(f"| {row['steps']} | {row['reward'][0]:.3f} | {numbers}")
    training = read("training")
    for row in training["rows"]:
        share = "{:.1%} ± {:.1%}".format(*row["share_average"])
        expect(
            f"| {row['steps']:,} | {share} | {row['excess_average'][0]:.4f} | "
            f"{row['steps_per_second']:.0f} |"
        )
    for name in ("tiltjax", "published"):
        expect(f"{training['side_by_side'][name]['steps_per_second']:.1f}")
    assert shown > 60


def test_the_table_of_learned_toys_is_that_of_the_results():
    text, results = (ROOT / "README.md").read_text(), ROOT / "benchmarks" / "results"
    study = json.loads((results / "toys_learned.json").read_text())
    methods = list(next(iter(study["table"].values())))
    assert len(methods) > 15

    def pair(row, key, form):
        return " / ".join(
            row[w].get("failed") or form(row[w][key][0]) for w in ("exact", "learned")
        )

    for method in methods:
        cells = []
        for rows in study["table"].values():
            row = rows[method]
            published = "" if row["published"] is None else f"{row['published']:.2f}"
            cells += [
                pair(row, "reward", "{:.3f}".format),
                pair(row, "emd", "{:.2f}".format),
                published,
            ]
        assert f"| {method} | {' | '.join(cells)} |" in text
    share = lambda model: study["audits"]["eight modes"][model]["Laplace"]["share"]
    assert (
        f"share of {share('exact'):.2f} counts with the exact denoiser, {share('learned'):.2f} "
        "with the network" in text
    )
    slopes = study["slope"]["eight modes"]
    assert f"a slope of {slopes['learned']:.1f}\ninstead of {slopes['exact']:.2f}" in text
