"""Published names, shapes and layouts into Flax modules and back.

Tier: exact.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tiltjax.pretrained import state_dicts

STACKED = ("blocks",)
RENAMES = {"to_out": "to_out.0", "block": "never a part of a longer name"}


class Block(nnx.Module):
    """One of a stack."""

    def __init__(self, *, rngs):
        self.to_out = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.RMSNorm(4, rngs=rngs)


class Network(nnx.Module):
    """Every kind of leaf there is: stacked and not, in a list, a convolution, an embedding."""

    def __init__(self, *, rngs, dtype=jnp.float32):
        make = nnx.vmap(lambda r: Block(rngs=r), in_axes=0, out_axes=0)
        self.blocks = nnx.split_rngs(splits=2)(make)(rngs)
        self.layers = nnx.List([nnx.Linear(4, 3, param_dtype=dtype, rngs=rngs)])
        self.conv = nnx.Conv(3, 5, (2, 1), use_bias=False, rngs=rngs)
        self.tokens = nnx.Embed(7, 3, rngs=rngs)


SHAPES = {
    "blocks.0.norm.weight": (4,),
    "blocks.0.to_out.0.bias": (4,),
    "blocks.0.to_out.0.weight": (4, 3),
    "blocks.1.norm.weight": (4,),
    "blocks.1.to_out.0.bias": (4,),
    "blocks.1.to_out.0.weight": (4, 3),
    "layers.0.bias": (3,),
    "layers.0.weight": (3, 4),
    "conv.weight": (5, 3, 2, 1),
    "tokens.weight": (7, 3),
}


@pytest.fixture
def abstract():
    return nnx.eval_shape(lambda: Network(rngs=nnx.Rngs(0)))


@pytest.fixture
def published():
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


def built(abstract, published, **kwargs):
    return state_dicts.from_state_dict(
        abstract, published, renames=RENAMES, stacked=STACKED, **kwargs
    )


def test_names_and_shapes_are_the_published_ones(abstract):
    assert state_dicts.shapes(abstract, RENAMES, STACKED) == SHAPES


def test_every_layout_is_the_one_flax_computes_with(abstract, published):
    network = built(abstract, published)
    x = np.random.default_rng(1).normal(size=(3,)).astype(np.float32)
    first = jax.tree.map(lambda leaf: leaf[1], network.blocks)
    expected = published["blocks.1.to_out.0.weight"] @ x + published["blocks.1.to_out.0.bias"]
    np.testing.assert_allclose(first.to_out(jnp.asarray(x)), expected, atol=1e-5)
    np.testing.assert_array_equal(network.tokens(jnp.int32(4)), published["tokens.weight"][4])
    image = np.random.default_rng(2).normal(size=(1, 2, 1, 3)).astype(np.float32)
    # One place where the kernel of height 2 sees the whole image.
    kernel = published["conv.weight"]
    expected = np.einsum("hwi,oihw->o", image[0], kernel)
    valid = nnx.Conv(3, 5, (2, 1), use_bias=False, padding="VALID", rngs=nnx.Rngs(0))
    valid.kernel = network.conv.kernel
    np.testing.assert_allclose(valid(jnp.asarray(image))[0, 0, 0], expected, atol=1e-5)


def test_there_and_back_is_the_identity(abstract, published):
    back = state_dicts.to_state_dict(built(abstract, published), RENAMES, STACKED)
    assert back.keys() == published.keys()
    for name, array in published.items():
        np.testing.assert_array_equal(back[name], array)


def test_the_dtype_is_the_modules(published):
    abstract = nnx.eval_shape(lambda: Network(rngs=nnx.Rngs(0), dtype=jnp.bfloat16))
    network = built(abstract, published)
    assert network.layers[0].kernel.dtype == jnp.bfloat16
    assert network.tokens.embedding.dtype == jnp.float32


def test_missing_unused_and_misshapen_keys_are_errors_with_names(abstract, published):
    wrong = dict(published)
    del wrong["blocks.1.norm.weight"]
    wrong["blocks.2.norm.weight"] = np.zeros(4)
    wrong["conv.weight"] = np.zeros((5, 3, 1, 2))
    with pytest.raises(ValueError, match="do not match Network") as error:
        built(abstract, wrong)
    for part in ("1 missing: blocks.1.norm.weight (4,)", "1 unused: blocks.2.norm.weight (4,)"):
        assert part in str(error.value)
    assert "conv.weight has (5, 3, 1, 2), expected (5, 3, 2, 1)" in str(error.value)
    with pytest.raises(ValueError, match=r"10 missing: .*, \.\.\."):
        built(abstract, {})


def test_keys_that_may_be_there_for_nothing(abstract, published):
    extra = published | {"position_ids": np.arange(3)}
    with pytest.raises(ValueError, match="1 unused: position_ids"):
        built(abstract, extra)
    built(abstract, extra, ignored=("position_ids",))


def test_nothing_is_read_before_all_keys_are_right(abstract, published):
    reads = []

    def parts(shapes):
        return state_dicts.View(
            {name: (shape, lambda name=name: reads.append(name)) for name, shape in shapes.items()}
        )

    with pytest.raises(ValueError, match="1 missing"):
        built(
            abstract,
            parts({name: shape for name, shape in SHAPES.items() if name != "conv.weight"}),
        )
    assert not reads


def test_each_array_is_read_once(abstract, published):
    reads = []

    def read(name):
        reads.append(name)
        return published[name]

    built(
        abstract,
        state_dicts.View(
            {name: (shape, lambda name=name: read(name)) for name, shape in SHAPES.items()}
        ),
    )
    assert sorted(reads) == sorted(SHAPES)


def test_a_sharding_decides_where_a_parameter_goes(abstract, published):
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    placed_at = []

    def sharding(path, leaf):
        placed_at.append((path, leaf.shape))
        return device

    placed, plain = built(abstract, published, sharding=sharding), built(abstract, published)
    assert (("blocks", "to_out", "kernel"), (2, 3, 4)) in placed_at
    jax.tree.map(np.testing.assert_array_equal, placed, plain)
