"""Who may import whom, what is documented, how long a file may be.

Tier: exact (read from the syntax trees). The layers are those of the design: a module imports only
from layers above its own.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = (
    {"inputs", "linalg", "files"},
    {
        "interpolants",
        "mixtures",
        "rewards",
        "progress",
        "resampling",
        "networks",
        "checkpoints",
        "trainable",
    },
    {"nets"},
    {"models", "external", "objectives", "lora", "descent"},
    {"tilted", "posteriors", "solvers", "particles", "scales", "checkerboard", "training"},
    {"guidance", "anisotropic", "potentials", "tempering", "proposals", "surrogates"},
    {"sampling", "selection", "flows", "populations", "annealed", "wrappers"},
    {"conjugate", "smc", "discrete", "densities", "finetuning"},
    {"audit", "online", "diversity"},
    {"flux.weights", "flux.layers"},
    {"flux.files", "flux.forms", "flux.waves", "flux.shapes"},
    {"flux.transformer", "flux.autoencoder", "flux.clip", "flux.t5"},
    {"flux.model", "flux.text", "flux.judges", "flux.rewards", "flux.album", "flux.loading"},
    {"flux.published", "flux.pipeline"},
    {"problems", "metrics", "plotting"},
)
LEAVES = LAYERS[-1]
SURFACE = {"__init__", "__main__"}
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
THEORY_MAY_IMPORT = {"interpolants", "mixtures", "rewards", "scales", "solvers", "inputs", "linalg"}
LONGEST, LONGEST_TEST = 450, 500
PACKAGES = ("flux",)
# Together they take longer to import than JAX: who uses one waits for it, who does not waits for
# none.
SLOW = {"flax", "diffrax", "optax", "scipy", "matplotlib", "torch", "ot"}
MADE_OF_FLAX = {"networks", "lora", "flux"}

TILTJAX = sorted((ROOT / "tiltjax").rglob("*.py"))
THEORY = sorted((ROOT / "theory").rglob("*.py"))
NAMED = {"argvalues": TILTJAX + THEORY, "ids": lambda path: str(path.relative_to(ROOT))}


def imported(source: str, package: str) -> set[str]:
    """The modules of `package` that `source` imports, at the top or inside functions; the package
    itself is `""`.
    """
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                head, _, rest = alias.name.partition(".")
                if head == package:
                    found.add(named(rest))
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                found.add("relative import")
                continue
            head, _, rest = node.module.partition(".")
            if head == package and rest in ("", *PACKAGES):
                found |= {named(f"{rest}.{alias.name}".lstrip(".")) for alias in node.names}
            elif head == package:
                found.add(named(rest))
    return found


def named(dotted: str) -> str:
    """A module as LAYERS calls it: its name, within a package behind that of the package."""
    head, _, rest = dotted.partition(".")
    return f"{head}.{rest.partition('.')[0]}" if head in PACKAGES and rest else head


def test_the_reader_of_imports_sees_every_form():
    source = "import tiltjax\nimport tiltjax.models as m\nfrom tiltjax import rewards\ndef f():\n  from tiltjax.solvers import Heun"
    assert imported(source, "tiltjax") == {"", "models", "rewards", "solvers"}
    assert imported("from . import models", "tiltjax") == {"relative import"}
    source = "from tiltjax.flux import text\nfrom tiltjax.flux.model import FluxModel\nimport tiltjax.flux.weights\nfrom tiltjax import flux"
    assert imported(source, "tiltjax") == {"flux.text", "flux.model", "flux.weights", "flux"}


@pytest.mark.parametrize("path", TILTJAX, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_from_layers_above_its_own(path):
    name = named(".".join(path.relative_to(ROOT / "tiltjax").with_suffix("").parts))
    if path.stem in SURFACE:
        return
    assert name in LEVEL, f"{name}.py has no place in the design: add it to LAYERS here"
    for other in imported(path.read_text(), "tiltjax"):
        assert other in LEVEL, f"{name} imports {other or 'the package itself'}"
        assert other not in LEAVES, f"{name} imports the leaf {other}"
        assert LEVEL[other] < LEVEL[name], (
            f"{name} (layer {LEVEL[name]}) imports {other} (layer {LEVEL[other]})"
        )


@pytest.mark.parametrize("path", TILTJAX, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_is_slow_to_import_waits_until_it_is_used(path):
    top = [
        node
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    names = [alias.name for node in top if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in top if isinstance(node, ast.ImportFrom) and not node.level]
    slow = SLOW & {name.partition(".")[0] for name in names}
    made_of_flax = {path.stem, path.parent.name} & MADE_OF_FLAX
    assert slow <= ({"flax"} if made_of_flax else set())
    if path.stem == "__init__" and path.parent.name == "tiltjax":
        eager = imported("\n".join(map(ast.unparse, top)), "tiltjax")
        assert not eager & MADE_OF_FLAX


@pytest.mark.parametrize("path", TILTJAX, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_the_demo_imports_theory(path):
    assert path.stem == "__main__" or not imported(path.read_text(), "theory")


@pytest.mark.parametrize("path", THEORY, ids=lambda path: str(path.relative_to(ROOT)))
def test_theory_uses_laws_and_steps_never_what_it_judges(path):
    assert imported(path.read_text(), "tiltjax") <= THEORY_MAY_IMPORT


@pytest.mark.parametrize("path", **NAMED)
def test_everything_public_is_documented(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), f"{path.name} has no docstring"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{path.name}: {node.name} has no docstring"


def test_no_file_is_long():
    rooms = [ROOT / name for name in ("tiltjax", "theory", "benchmarks", "tests", "notebooks")]
    assert all(room.is_dir() for room in rooms)
    lengths = {
        path: len(path.read_text().splitlines()) for room in rooms for path in room.rglob("*.py")
    }
    limit = lambda path: LONGEST_TEST if ROOT / "tests" in path.parents else LONGEST
    assert len(lengths) > 200
    assert not {str(path): length for path, length in lengths.items() if length > limit(path)}


def test_the_surface_holds_what_it_lists():
    import tiltjax

    missing = [name for name in tiltjax.__all__ if not hasattr(tiltjax, name)]
    assert not missing
