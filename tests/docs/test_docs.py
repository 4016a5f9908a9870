"""The pages of the site: their code runs, and the reference shows every public name.

Links and navigation are checked by `make docs`, which builds the site strictly. Tier: exact.
"""

import ast
import importlib
import json
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
PAGES = {path: path.read_text() for path in sorted((ROOT / "docs").rglob("*.md"))}
DOCUMENTS = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
}

# Runs the blocks of each page in one namespace, on eight devices, and prints the errors by page.
RUNNER = """
import json, sys, traceback
errors = {}
for page, blocks in json.load(sys.stdin).items():
    namespace = {"__name__": page}
    try:
        for i, block in enumerate(blocks):
            exec(compile(block, f"{page}, block {i + 1}", "exec"), namespace)
    except BaseException:
        errors[page] = traceback.format_exc()
print("\\n" + json.dumps(errors))
"""


def blocks(text, language=""):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize("is_reference", [False, True], ids=["pages", "reference"])
def test_the_code_of_the_pages_runs(is_reference, tmp_path):
    """In one process for all pages: most of the time is start-up and compilation."""
    pages = {
        name: blocks(text, "python")
        for name, text in DOCUMENTS.items()
        if name.startswith("docs/reference") == is_reference and name != "README.md"
    }
    pages = {name: code for name, code in pages.items() if code}
    assert len(pages) > 3
    run = subprocess.run(
        [sys.executable, "-c", RUNNER],
        input=json.dumps(pages),
        env=environment.quick(8) | {"PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    errors = json.loads(run.stdout.splitlines()[-1])
    assert not errors, "\n".join(errors.values())


# What users get, or subclass, and do not call.
NOT_CALLED = {
    *("Audit", "Curve", "Denoiser", "Estimate", "Estimated", "Fit", "Flow", "Guidance", "Info"),
    *("LogNorm", "Masked", "Masking", "Model", "Network", "Objective", "Option", "PathLaw", "Plan"),
    *("Potential", "Proposal", "Reveal", "Reward", "Rollout", "Schedule", "Search", "Selected"),
    *("State", "Tempering", "Tilt", "TokenLaw", "Variance", "W2Bounds", "AffineField", "DrawsLaw"),
    *("MeanDriftLaw", "Logits", "Posterior", "Scale", "Solver", "Interpolant", "Particles"),
    *("Problem", "Surrogate", "External", "WeightLaw", "Composed", "ConsistencyNetwork"),
    *("FlowMapNetwork", "FlowLaw", "PointLaw", "Measured"),
    *("ClipScore", "Aesthetic", "image_reward", "yes_or_no"),  # weights of gigabytes
}


def test_the_reference_calls_every_public_function():
    """In an example that runs, on the page that describes it."""
    missing = {}
    for path, text in PAGES.items():
        called = set(re.findall(r"(\w+)", "\n".join(blocks(text, "python"))))
        for name in re.findall(r"^::: ([\w.]+)$", text, re.M):
            if name == "tiltjax.images.flux":  # weights of gigabytes
                continue
            module = importlib.import_module(name)
            public = {
                key for key in getattr(module, "__all__", ()) if callable(getattr(module, key))
            }
            if absent := public - called - NOT_CALLED:
                missing[path.name, name] = sorted(absent)
    assert not missing


def test_code_that_is_not_run_names_what_exists():
    """Blocks without a language hold commands, output, or code that needs weights or minutes."""
    for name, text in DOCUMENTS.items():
        for block in blocks(text):
            if re.search(r"^(?:from|\w+ +=|print\()", block, re.MULTILINE):
                for node in ast.walk(ast.parse(block)):
                    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                        package = {"tj": tj, "theory": theory}.get(node.value.id)
                        assert package is None or hasattr(package, node.attr), (name, node.attr)


def test_files_and_commands_that_pages_name_exist():
    makefile = (ROOT / "Makefile").read_text()
    for page, text in DOCUMENTS.items():
        for name in re.findall(r"\b((?:benchmarks|tests|docs|notebooks)/[\w/]+\.\w+)", text):
            # The site makes pages and figures of notebooks.
            made = re.sub(r"(_\d+\.png|\.md)$", ".ipynb", name)
            path = ROOT / (made if name.startswith("notebooks/") else name)
            assert path.exists(), f"{page}: {name}"
        for module in re.findall(r"python -m (benchmarks[\w.]+)", text):
            assert (ROOT / f"{module.replace('.', '/')}.py").exists(), f"{page}: {module}"
        for target in re.findall(r"`make ([\w-]+)", text):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{page}: make {target}"


def reference():
    """The modules that the reference shows, by name."""
    names = [name for text in PAGES.values() for name in re.findall(r"^::: ([\w.]+)$", text, re.M)]
    assert len(names) == len(set(names))
    return {name: importlib.import_module(name) for name in names}


@pytest.mark.parametrize("package", [tj, theory], ids=lambda package: package.__name__)
def test_every_public_name_is_in_the_reference(package):
    modules = reference()
    listed = [name for name in package.__all__ if name not in ("images", "pretrained")]
    for name in listed:
        value = getattr(package, name)
        if isinstance(value, types.ModuleType):
            assert value.__name__ in modules, name
        else:
            assert any(getattr(module, name, None) is value for module in modules.values()), name


def test_the_citation_names_this_version():
    assert f"version: {tj.__version__}" in (ROOT / "CITATION.cff").read_text().splitlines()
    assert f"## [{tj.__version__}]" in DOCUMENTS["CHANGELOG.md"]
