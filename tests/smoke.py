"""The installed package, used as a user would, from a folder that is not the checkout: `make smoke`
runs this on a freshly built wheel.

Run with `-I`, the interpreter sees neither the current folder nor PYTHONPATH.
"""

import importlib
import importlib.metadata
import pkgutil
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp

import theory
import tiltjax as tj
from tiltjax.cli import main

jax.config.update("jax_disable_most_optimizations", True)  # it compiles for longer than it runs
HERE = Path(sys.prefix).resolve()
for package in (tj, theory):
    place = Path(package.__file__).resolve()
    assert place.is_relative_to(HERE), f"{package.__name__} comes from {place}, not from the wheel"
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)

installed = importlib.metadata.distribution("tiltjax")
assert installed.version == tj.__version__, (installed.version, tj.__version__)
files = [Path(file).parts for file in installed.files or ()]
assert any(parts[-2:] == ("bin", "tiltjax") for parts in files), "the command tiltjax is missing"
shipped = {parts[0] for parts in files if parts[-2] != "bin"}
assert shipped == {"tiltjax", "theory", f"tiltjax-{tj.__version__}.dist-info"}, (
    f"the wheel also holds {shipped}"
)

prior = tj.GaussianMixture([0.5, 0.5], [[-2.5, 0.0], [2.5, 0.0]], 0.5 * jnp.stack([jnp.eye(2)] * 2))
model, reward = tj.Analytic(prior), tj.rewards.Quadratic([0.0, 2.5])
points = tj.sample(jax.random.key(0), tj.Tilted(model, reward, 3.0), num=256, steps=20)
truth = theory.tilt(prior, reward, 3.0).mixture
assert jnp.all(
    jnp.abs(points.mean() - truth.mean()) < 5 * jnp.sqrt(jnp.diagonal(truth.cov()) / 256)
)

with tempfile.TemporaryDirectory() as folder:
    figure = Path(folder) / "tilt.png"
    assert main(["demo", "--num", "20", "--steps", "3", "--output", str(figure)]) == 0
    assert figure.stat().st_size > 10_000
print(f"tiltjax {installed.version} works from {HERE.name}")
