"""The text encoders against stored answers of the published ones; prompts to ids.

Tiers: parity, to 1e-12 in float64 and to rounding (`flux_parts.rounding`) in float32; exact.
"""

import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import flux_parts as parts

from tiltjax.images import loading, prompts
from tiltjax.images.networks import clip, t5
from tiltjax.pretrained import state_dicts

DTYPES = (jnp.float32, jnp.float64)
FULL = prompts.Tokenizer(
    lambda prompt: ([ord(c) for c in prompt], list(range(len(prompt)))), 48, 49, 49, 12, "CLIP"
)


def close(network, got, expected, dtype):
    allowed = parts.rounding(network, expected) if dtype == jnp.float32 else 1e-12
    return parts.close(got, expected, allowed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("remat", [False, True])
def test_t5_states_are_the_published_ones(dtype, remat):
    network = parts.small_t5(param_dtype=dtype, remat=remat)
    states = jax.jit(lambda network, ids: network(ids))(network, jnp.asarray(parts.T5_IDS))
    assert states.dtype == dtype
    close(network, states, parts.stored("t5")["states"], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", parts.CLIPS)
def test_clip_states_are_the_published_ones_and_pooled_at_the_end_of_the_text(name, dtype):
    tower, expected = (
        parts.small_clip(name, param_dtype=dtype).text_model,
        parts.stored(f"clip_{name}"),
    )
    states, pooled = jax.jit(lambda tower, ids: (tower(ids), tower.pooled(ids)))(
        tower, jnp.asarray(parts.CLIP_IDS)
    )
    close(tower, states, expected["states"], dtype)
    close(tower, pooled, expected["pooled"], dtype)
    parts.close(pooled, np.asarray(states)[[0, 1], [3, 5]], 0)


def test_the_end_may_be_another_id_than_the_largest():
    config = clip.TextConfig.from_json({**parts.CLIPS["recent"]["text_config"], "eos_token_id": 8})
    abstract = nnx.eval_shape(lambda: clip.Text(config, rngs=nnx.Rngs(0)))
    tower = parts.made(abstract, stacked=clip.STACKED)
    parts.close(tower.pooled(parts.CLIP_IDS[1]), tower(parts.CLIP_IDS[1])[3], 0)
    with pytest.raises(ValueError, match="no end-of-text token 8"):
        tower.pooled(parts.CLIP_IDS)


def test_a_token_sees_no_later_one_in_clip_and_all_in_t5():
    ids = jnp.asarray(parts.CLIP_IDS[0])
    other = ids.at[2].set(11)
    tower, encoder = parts.small_clip().text_model, parts.small_t5()
    same = lambda network: np.all(np.asarray(network(ids) == network(other)), axis=-1)
    assert same(tower).tolist() == [True, True, False, False, False, False]
    assert not same(encoder).any()


def test_half_precision():
    for network, ids, expected in (
        (parts.small_t5(param_dtype=jnp.bfloat16), parts.T5_IDS, parts.stored("t5")["states"]),
        (
            parts.small_clip(param_dtype=jnp.bfloat16).text_model,
            parts.CLIP_IDS,
            parts.stored("clip_legacy")["states"],
        ),
    ):
        states = jax.jit(lambda network, ids: network(ids))(network, ids)
        assert states.dtype == jnp.bfloat16
        error = np.asarray(states, np.float64) - expected
        assert 1e-4 < np.sqrt(np.mean(error**2)) / np.sqrt(np.mean(expected**2)) < 0.02


def test_buckets_of_distances():
    found = t5.buckets(200, 32, 128)
    assert found.dtype == np.int32
    assert found[0, :10].tolist() == [0, 17, 18, 19, 20, 21, 22, 23, 24, 24]
    assert found[:10, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 8]
    assert (found[0, -1], found[-1, 0]) == (31, 15)
    assert np.all(np.diff(found[0]) >= 0)
    assert np.all(found[1:, 1:] == found[:-1, :-1])


def test_default_sizes_are_those_of_flux():
    big = nnx.eval_shape(lambda: t5.T5(t5.Config(), rngs=nnx.Rngs(0)))
    shapes = state_dicts.shapes(big, t5.RENAMES, t5.STACKED)
    assert (len(shapes), sum(map(np.prod, shapes.values()))) == (219, 4_762_310_656)
    small = nnx.eval_shape(lambda: clip.Text(clip.TextConfig(), rngs=nnx.Rngs(0)))
    shapes = state_dicts.shapes(small, stacked=clip.STACKED)
    assert (len(shapes), sum(map(np.prod, shapes.values()))) == (196, 123_060_480)


def test_published_keys_in_every_form():
    config, tower = parts.CLIPS["legacy"]["text_config"], parts.small_clip().text_model
    bare = state_dicts.to_state_dict(tower, stacked=clip.STACKED)
    old = {f"text_model.{name}": array for name, array in bare.items()}
    old["text_model.embeddings.position_ids"] = np.arange(12)[None]
    expected = np.asarray(tower(parts.CLIP_IDS))
    for form in (bare, old):
        np.testing.assert_array_equal(
            loading.from_state_dict("clip", form, config)(parts.CLIP_IDS), expected
        )
    encoder = parts.small_t5()
    bare = state_dicts.to_state_dict(encoder, t5.RENAMES, t5.STACKED)
    again = loading.from_state_dict("t5", {**bare, t5.TIED: bare["shared.weight"]}, parts.T5)
    np.testing.assert_array_equal(again(parts.T5_IDS[:, :5]), encoder(parts.T5_IDS[:, :5]))


def test_configurations():
    assert t5.Config.from_json({**parts.T5, "dropout_rate": 0.1}).num_layers == 2
    for name, value in (("feed_forward_proj", "relu"), ("is_decoder", True)):
        with pytest.raises(ValueError, match=f"{name} = .* is not implemented"):
            t5.Config.from_json({**parts.T5, name: value})
    with pytest.raises(ValueError, match="feed_forward_proj = 'relu'"):
        t5.Config.from_json(
            {name: value for name, value in parts.T5.items() if name != "feed_forward_proj"}
        )
    published = parts.CLIPS["recent"]["text_config"]
    assert clip.TextConfig.from_json(published).hidden_act == "gelu"
    with pytest.raises(ValueError, match="hidden_act = 'relu' is not implemented"):
        clip.TextConfig.from_json({**published, "hidden_act": "relu"})
    with pytest.raises(
        ValueError, match="hidden_size = 25 must be a multiple of num_attention_heads = 4"
    ):
        clip.TextConfig.from_json({**published, "hidden_size": 25})
    with pytest.raises(ValueError, match="num_channels = 1 is not implemented"):
        clip.VisionConfig.from_json({"num_channels": 1})


def test_ids_that_are_none():
    tower, encoder = parts.small_clip().text_model, parts.small_t5()
    with pytest.raises(ValueError, match="CLIP takes 12 tokens, got 13"):
        tower(np.zeros(13, np.int32))
    with pytest.raises(ValueError, match=r"must lie in \[0, 50\), got \[0, 50\]"):
        encoder(np.asarray([0, 50]))
    with pytest.raises(TypeError, match="must be integers"):
        encoder(np.zeros(3))
    within = jax.jit(
        lambda x: x + jnp.sum(encoder(jnp.asarray(parts.T5_IDS[:, :3])))
    )  # ids that are constants of a program
    assert np.isfinite(within(jnp.float32(0)))


def test_a_prompt_is_padded_and_one_too_long_is_cut_with_a_warning_that_quotes_the_rest():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert FULL("ab").tolist() == [48, 97, 98, *[49] * 9]
        assert FULL("0123456789").tolist() == [48, *range(48, 58), 49]
    with pytest.warns(UserWarning, match=r"13 tokens for CLIP, which reads 10: 'abc' is cut"):
        ids = FULL("0123456789abc")
    assert ids.dtype == np.int32
    assert ids.tolist() == [48, *range(48, 58), 49]
    with pytest.raises(TypeError, match="call once for each prompt"):
        FULL(["a", "b"])


def test_embed_is_both_encoders_on_one_prompt():
    clip_tokens, t5_tokens = (
        lambda prompt, ids=ids: ids[len(prompt)] for ids in (parts.CLIP_IDS, parts.T5_IDS)
    )
    tower, encoder = parts.small_clip().text_model, parts.small_t5()
    states, pooled = prompts.embed(
        "!", clip=tower, clip_tokenizer=clip_tokens, t5=encoder, t5_tokenizer=t5_tokens
    )
    parts.close_to_rounding(encoder, states, parts.stored("t5")["states"][1])
    parts.close_to_rounding(tower, pooled, parts.stored("clip_legacy")["pooled"][1])


@pytest.mark.parametrize("load", [prompts.clip_tokenizer, prompts.t5_tokenizer])
def test_tokenizers_say_what_is_missing(load, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"pip install 'tiltjax\[images\]'"):
        load(tmp_path)
    monkeypatch.setitem(sys.modules, "tokenizers", sys)
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(
        FileNotFoundError, match=r"has no (merges.txt|tokenizer.json) .*got \['vocab.json'\]"
    ):
        load(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load(tmp_path / "nowhere")
