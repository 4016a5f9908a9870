"""The FLUX.1 transformer against `diffusers`, live; the stored answers against what it says today.

Run by `make test-parity`, in an environment of its own.
"""

import jax
import numpy as np
import pytest
from helpers import flux_fixtures
from helpers.flux_fixtures import (
    CONFIGS,
    FIXTURES,
    GRID,
    TRANSFORMERS,
    close,
    stored,
    transformer_inputs,
    weights,
)
from helpers.flux_parts import close_to_rounding, small_transformer
from keys import published
from reference import times
from reference import transformer as reference
from safetensors.numpy import load_file, save_file

from tiltjax.images import flux, loading
from tiltjax.pretrained import files


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_forward_and_gradient(name):
    shapes, expected = reference(name)
    inputs = transformer_inputs(name)
    guidance = inputs["guidance"] if TRANSFORMERS[name]["guidance_embeds"] else None
    network = loading.from_state_dict("transformer", weights(shapes), TRANSFORMERS[name])
    rest = (inputs["sigma"], inputs["text"], inputs["pooled"], guidance)
    call = lambda x: network(x, *rest, grid=GRID)
    output, pullback = jax.jit(lambda x: jax.vjp(call, x))(inputs["tokens"])
    forward = close_to_rounding(network, output, expected["output"])
    gradient = close_to_rounding(network, pullback(inputs["cotangent"])[0], expected["gradient"])
    print(
        f"{name}: forward {forward:.2g}, gradient {gradient:.2g}, rms "
        f"{np.sqrt(np.mean(expected['output'] ** 2)):.3g}"
    )


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_stored_answers_are_those_of_today(name):
    _, expected = reference(name)
    found = stored(f"transformer_{name}")
    assert found.keys() == expected.keys()
    for part, array in expected.items():
        close_to_rounding(small_transformer(name), found[part], array)


def test_the_grid_of_the_scheduler():
    found = stored("times")
    for name, sigmas in times().items():
        np.testing.assert_array_equal(found[name], sigmas)
        size, steps = map(int, name.split("_"))
        worst = close(
            1 - np.asarray(flux.times(steps, size, size, start=0.0), np.float64), sigmas, 1e-7
        )
        print(f"{name}: sigmas {worst:.2g}")


def test_stored_keys_are_those_of_today():
    assert flux_fixtures.keys() == {
        kind: {name: tuple(shape) for name, shape in sizes.items()}
        for kind, sizes in published().items()
    }
    assert CONFIGS.keys() == set(loading.KINDS)
    assert (FIXTURES / "keys.json.gz").stat().st_size < 20_000


def test_files_are_those_of_the_package_safetensors(tmp_path):
    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.ones((3,), np.float16),
        "c": np.full((), 2.0),
    }
    save_file(arrays, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    files.write(tmp_path / "ours.safetensors", arrays)
    for found in (
        files.read(tmp_path / "theirs.safetensors"),
        load_file(tmp_path / "ours.safetensors"),
    ):
        assert found.keys() == arrays.keys()
        for name in arrays:
            np.testing.assert_array_equal(found[name], arrays[name])
