"""The pages of the site: their code runs, their links lead somewhere, and the reference holds every
public name.

The site itself is built, strictly, by `make docs`; this needs nothing that builds it. Tier: exact.
"""

import ast
import functools
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
from helpers import environment

import theory
import tiltjax as tj

ROOT = Path(__file__).resolve().parents[2]
DOCS, NOTEBOOKS = ROOT / "docs", ROOT / "notebooks"
PAGES = {str(path.relative_to(DOCS)): path.read_text() for path in sorted(DOCS.rglob("*.md"))}
CONFIGURATION = (ROOT / "mkdocs.yml").read_text()
QUICK_START = "index.md"  # its code is README's, which tests/test_readme.py runs

# Runs the blocks of each page in one namespace, on eight devices, and prints what went wrong, by
# page.
RUNNER = """
import json, sys, traceback
wrong = {}
for page, blocks in json.load(sys.stdin).items():
    namespace = {"__name__": page}
    try:
        for i, block in enumerate(blocks):
            exec(compile(block, f"{page}, block {i + 1}", "exec"), namespace)
    except BaseException:
        wrong[page] = traceback.format_exc()
print("\\n" + json.dumps(wrong))
"""


def blocks(text):
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def prose(text):
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


RECIPES = {"CONTRIBUTING.md": blocks((ROOT / "CONTRIBUTING.md").read_text())}
CODE = {
    page: blocks(text) for page, text in PAGES.items() if page != QUICK_START and blocks(text)
} | RECIPES


def test_the_code_of_the_pages_runs():
    """In one process for all: most of the time goes into starting it and compiling."""
    env = environment.quick(8)
    run = subprocess.run(
        [sys.executable, "-c", RUNNER],
        input=json.dumps(CODE),
        capture_output=True,
        text=True,
        env=env,
        cwd=ROOT,
        timeout=600,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert len(CODE) > 3
    wrong = json.loads(run.stdout.splitlines()[-1])
    assert not wrong, "\n".join(wrong.values())


def test_the_quick_start_is_readmes():
    assert any(
        blocks(PAGES[QUICK_START])[0] == block for block in blocks((ROOT / "README.md").read_text())
    )


# The reference.


@functools.cache
def reference():
    """What the pages of the reference show: names by module, `None` for all that is public."""
    found = {}
    for page, text in PAGES.items():
        for module, options in re.findall(r"^::: ([\w.]+)\n((?:    .*\n)*)", text, re.MULTILINE):
            assert module not in found, f"{page} shows {module} again"
            members = re.search(r"members: \[(.*)\]", options)
            found[module] = (
                None if members is None else [name for name in members[1].split(", ") if name]
            )
    return found


def shown(package, name):
    value = getattr(package, name)
    if isinstance(value, types.ModuleType):
        return value.__name__ in reference()
    defined = getattr(value, "__module__", package.__name__)
    return defined in reference() and (reference()[defined] is None or name in reference()[defined])


@pytest.mark.parametrize("package", [tj, theory], ids=lambda package: package.__name__)
def test_every_public_name_is_in_the_reference(package):
    missing = [name for name in package.__all__ if not shown(package, name)]
    assert not missing


@pytest.mark.parametrize("name", reference())
def test_what_the_reference_shows_is_there_and_documented(name):
    module = importlib.import_module(name)
    assert inspect.getdoc(module)
    for member in reference()[name] or ():
        assert inspect.getdoc(getattr(module, member)), f"{name}.{member}"


def test_names_that_pages_link_to_are_in_the_reference():
    count = 0
    for page, text in PAGES.items():
        for target in re.findall(r"\]\[([\w.]+)\]", prose(text)):
            module, _, name = target.rpartition(".")
            assert module in reference(), f"{page}: {target}"
            assert isinstance(
                vars(importlib.import_module(module))[name], type | types.FunctionType
            ), f"{page}: {target}"
            assert reference()[module] is None or name in reference()[module], f"{page}: {target}"
            count += 1
    assert count > 50


# Pages, links, figures.


def destination(page, target):
    """The file that a relative link leads to: a page that a notebook becomes is the notebook."""
    path = Path(os.path.normpath(DOCS / Path(page).parent / target))
    return NOTEBOOKS / f"{path.stem}.ipynb" if path.parent == DOCS / "notebooks" else path


@functools.cache
def anchors(path):
    """What can be linked to on a page: its headings, and the modules it shows."""
    text = path.read_text()
    words = [
        re.sub(r"[^\w\s-]", "", title).strip().lower()
        for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    ]
    return {re.sub(r"[-\s]+", "-", word) for word in words} | set(
        re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE)
    )


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", prose(PAGES[page])):
        file, _, anchor = target.partition("#")
        path = destination(page, file) if file else DOCS / page
        assert path.exists(), f"{page}: {target}"
        assert not anchor or anchor in anchors(path), f"{page}: {target}"


def test_the_navigation_lists_every_page_once():
    listed = re.findall(r"^\s+- (?:[^:\n]+: )?([\w/.]+\.md)$", CONFIGURATION, re.MULTILINE)
    notebooks = [f"notebooks/{path.stem}.md" for path in NOTEBOOKS.glob("*.ipynb")]
    assert sorted(listed) == sorted([*PAGES, *notebooks])


def test_every_figure_is_in_the_gallery():
    figures = {path.name for path in DOCS.glob("*.png")}
    assert figures == set(re.findall(r"\]\(([\w.]+\.png)\)", PAGES["gallery.md"]))


def test_files_and_commands_that_pages_name_exist():
    makefile = (ROOT / "Makefile").read_text()
    documents = PAGES | {
        name: (ROOT / name).read_text() for name in ("CONTRIBUTING.md", "CHANGELOG.md")
    }
    for page, text in documents.items():
        for name in re.findall(
            r"\b((?:benchmarks|tests|docs|notebooks)/[\w/]+\.(?:py|md|png|json|ipynb))", text
        ):
            assert (ROOT / name).exists() or page in PAGES, f"{page}: {name}"
        for target in re.findall(r"`make ([\w-]+)", text):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{page}: make {target}"


def test_the_citation_names_this_version():
    lines = (ROOT / "CITATION.cff").read_text().splitlines()
    assert "cff-version: 1.2.0" in lines
    assert f"version: {tj.__version__}" in lines
    assert re.search(
        rf"^## \[{re.escape(tj.__version__)}\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE
    )


def test_the_memory_that_the_flux_page_shows_is_that_of_the_results():
    rows = json.loads((ROOT / "benchmarks" / "results" / "flux_memory.json").read_text())["results"]
    by = {(row["devices"], row["gradient"]): row for row in rows}
    for devices in {devices for devices, _ in by}:
        forward, gradient = by[devices, False], by[devices, True]
        numbers = (
            gradient["argument_bytes"],
            forward["computed_bytes"],
            gradient["computed_bytes"],
            gradient["estimated_activation_bytes"],
        )
        mesh = "{} x {}".format(*gradient["mesh"])
        assert (
            f"| {devices} | {mesh} | {' | '.join(f'{n / 2**30:.1f}' for n in numbers)} |"
            in PAGES["flux.md"]
        )


def test_code_that_is_not_run_is_at_least_python():
    """Blocks without a language hold commands, output, or code that needs weights or minutes; what
    calls this library must parse.
    """
    for page, text in PAGES.items():
        for block in re.findall(r"^```\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            if re.search(r"^(?:from|\w+ +=|print\()", block, re.MULTILINE):
                tree = ast.parse(block)
                for node in ast.walk(tree):
                    if (
                        isinstance(node, ast.Attribute)
                        and isinstance(node.value, ast.Name)
                        and node.value.id in ("tj", "theory")
                    ):
                        assert hasattr({"tj": tj, "theory": theory}[node.value.id], node.attr), (
                            f"{page}: {node.attr}"
                        )
