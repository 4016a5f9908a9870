"""What the sources must hold, besides the layers, which `make lint` checks.

Tier: exact.
"""

import ast
import importlib
import subprocess
import sys
import types
from pathlib import Path

import pytest

import tiltjax

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted([*ROOT.glob("tiltjax/**/*.py"), *ROOT.glob("theory/**/*.py")])
BY_PATH = {"argvalues": SOURCES, "ids": lambda path: str(path.relative_to(ROOT))}
PACKAGES = [
    ".".join(path.parent.relative_to(ROOT).parts)
    for path in SOURCES
    if path.name == "__init__.py" and path.parent.name != "cli"
]
# Together these take longer to import than JAX: only who uses one waits for it.
OPTIONAL = (
    "flax optax diffrax scipy matplotlib torch orbax typer rich tqdm PIL ot tokenizers safetensors"
)


def imports(tree):
    """The dotted names that a syntax tree imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(inner, outer):
    return f"{inner}.".startswith(f"{outer}.")


def test_what_is_slow_to_import_waits_until_it_is_used():
    code = f"import sys, tiltjax; print([m for m in {OPTIONAL.split()} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.stdout == "[]\n", run.stdout + run.stderr


@pytest.mark.parametrize("name", ["images", "pretrained"])
def test_packages_that_need_flax_are_there_when_they_are_used(name, monkeypatch):
    package = importlib.import_module(f"tiltjax.{name}")
    monkeypatch.delattr(tiltjax, name)  # as before its first import
    assert getattr(tiltjax, name) is package
    with pytest.raises(AttributeError, match="module 'tiltjax' has no attribute 'nothing'"):
        _ = tiltjax.nothing


@pytest.mark.parametrize("path", **BY_PATH)
def test_no_private_name_crosses_a_package(path):
    package = ".".join(path.parent.relative_to(ROOT).parts)
    for name in imports(ast.parse(path.read_text())):
        parts = name.split(".")
        assert not name.startswith("jax._src"), name
        for i, part in enumerate(parts):
            if part.startswith("_") and parts[0] in ("tiltjax", "theory"):
                owner = ".".join(parts[:i])
                assert owner == "tiltjax" or within(owner, package) or within(package, owner), name


@pytest.mark.parametrize("path", **BY_PATH)
def test_everything_public_is_documented(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), f"{path.name} has no docstring"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{path.name}: {node.name} has no docstring"


@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_has_and_documents_what_it_lists(name):
    package = importlib.import_module(name)
    assert len(set(package.__all__)) == len(package.__all__)
    for public in package.__all__:
        value = getattr(package, public)
        if isinstance(value, type | types.FunctionType | types.ModuleType):
            assert value.__doc__, public
