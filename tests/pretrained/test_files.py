"""FLUX.1 from files: the format, the folder, the hub, both forms of the transformer, adapters.

Tier: exact.
"""

import json
import sys
import types

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from helpers.flux_fixtures import CONFIGS, TRANSFORMERS, keys, weights
from safetensors.numpy import save_file

from tiltjax.images import loading
from tiltjax.images.networks.transformer import RENAMES, STACKED, Config, Transformer
from tiltjax.pretrained import adapters, files, key_names
from tiltjax.pretrained.state_dicts import View, shapes, to_state_dict

SMALL = TRANSFORMERS["dev"]
DUAL = {**SMALL, "dual_time": True}


def abstract(kind, config):
    network, settings, naming = loading._kind(kind)
    module = nnx.eval_shape(lambda: network(settings.from_json(config), rngs=nnx.Rngs(0)))
    return module, naming.get("renames"), naming.get("stacked", ())


def published(config=SMALL):
    """Small weights under the names of diffusers."""
    return weights(shapes(*abstract("transformer", config)))


def same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(np.asarray(a[key]), np.asarray(b[key]), err_msg=key)


def arrays_of(network):
    return to_state_dict(network, RENAMES, STACKED)


# The keys of FLUX.1-dev.


@pytest.mark.parametrize("kind", loading.KINDS)
def test_no_published_key_is_missing_unused_or_of_another_shape(kind):
    expected = {name.removeprefix("text_model."): shape for name, shape in keys()[kind].items()}
    tied = {"encoder.embed_tokens.weight"} if kind == "t5" else set()
    found = shapes(*abstract(kind, CONFIGS[kind]))
    assert found == {name: shape for name, shape in expected.items() if name not in tied}


def test_the_single_file_form_has_the_same_keys():
    known = keys()
    converted = key_names.diffusers(
        View({name: (shape, lambda: None) for name, shape in known["single_file"].items()})
    )
    assert {name: converted.shape(name) for name in converted} == known["transformer"]
    assert sum(int(np.prod(shape)) for shape in known["transformer"].values()) == 11_901_408_320


def test_a_flow_map_has_the_keys_of_two_embedders():
    known = keys()["transformer"]
    doubled = key_names.dual(View({name: (shape, lambda: None) for name, shape in known.items()}))
    found = shapes(*abstract("transformer", {**CONFIGS["transformer"], "dual_time": True}))
    assert {name: doubled.shape(name) for name in doubled} == found
    assert sum(int(np.prod(shape)) for shape in found.values()) - 11_901_408_320 == 32_262_144


# The single-file form.


def single_file(arrays):
    """Weights under the names of diffusers in the single-file form, fused by hand."""
    found = {}
    both = lambda name: ((leaf, arrays[f"{name}.{leaf}"]) for leaf in ("weight", "bias"))
    embedders = {
        "time_in": "timestep_embedder",
        "guidance_in": "guidance_embedder",
        "vector_in": "text_embedder",
    }
    plain = {"img_in": "x_embedder", "txt_in": "context_embedder", "final_layer.linear": "proj_out"}
    for theirs, ours in embedders.items():
        plain |= {f"{theirs}.in_layer": f"time_text_embed.{ours}.linear_1"}
        plain |= {f"{theirs}.out_layer": f"time_text_embed.{ours}.linear_2"}
    for i in range(2):
        old, new = f"double_blocks.{i}", f"transformer_blocks.{i}"
        for stream, (norm, ff, out) in {
            "img": ("norm1", "ff", "to_out.0"),
            "txt": ("norm1_context", "ff_context", "to_add_out"),
        }.items():
            plain |= {
                f"{old}.{stream}_mod.lin": f"{new}.{norm}.linear",
                f"{old}.{stream}_attn.proj": f"{new}.attn.{out}",
            }
            plain |= {
                f"{old}.{stream}_mlp.0": f"{new}.{ff}.net.0.proj",
                f"{old}.{stream}_mlp.2": f"{new}.{ff}.net.2",
            }
        old, new = f"single_blocks.{i}", f"single_transformer_blocks.{i}"
        plain |= {
            f"{old}.modulation.lin": f"{new}.norm.linear",
            f"{old}.linear2": f"{new}.proj_out",
        }
    for theirs, ours in plain.items():
        found |= {f"{theirs}.{leaf}": array for leaf, array in both(ours)}
    for i in range(2):
        for leaf in ("weight", "bias"):
            of = lambda block, names, leaf=leaf: np.concatenate(
                [arrays[f"{block}.{name}.{leaf}"] for name in names]
            )
            block, attn = f"transformer_blocks.{i}", ("attn.to_q", "attn.to_k", "attn.to_v")
            found[f"double_blocks.{i}.img_attn.qkv.{leaf}"] = of(block, attn)
            text = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
            found[f"double_blocks.{i}.txt_attn.qkv.{leaf}"] = of(block, text)
            found[f"single_blocks.{i}.linear1.{leaf}"] = of(f"single_{block}", (*attn, "proj_mlp"))
        for name, short in (("query", "q"), ("key", "k")):
            place = f"{name}_norm.scale"
            found[f"double_blocks.{i}.img_attn.norm.{place}"] = arrays[
                f"{block}.attn.norm_{short}.weight"
            ]
            found[f"double_blocks.{i}.txt_attn.norm.{place}"] = arrays[
                f"{block}.attn.norm_added_{short}.weight"
            ]
            found[f"single_blocks.{i}.norm.{place}"] = arrays[
                f"single_{block}.attn.norm_{short}.weight"
            ]
    for leaf, array in both("norm_out.linear"):
        scale, shift = np.split(array, 2)
        found[f"final_layer.adaLN_modulation.1.{leaf}"] = np.concatenate([shift, scale])
    return found


def test_the_single_file_form_is_the_same_network():
    arrays = published()
    original = single_file(arrays)
    assert original.keys() == {  # of the real one, less its further blocks
        name
        for name in keys()["single_file"]
        if "blocks." not in name or name.split(".")[1] in "01"
    }
    same(arrays_of(loading.from_state_dict("transformer", original, SMALL)), arrays)
    prefixed = {f"model.diffusion_model.{name}": array for name, array in original.items()}
    same(arrays_of(loading.from_state_dict("transformer", prefixed, SMALL)), arrays)
    original["img_out.weight"] = original.pop("img_in.weight")
    with pytest.raises(ValueError, match=r"1 missing: x_embedder\.weight .* 1 unused: img_out"):
        loading.from_state_dict("transformer", original, SMALL)


# Adapters.


def factors(m, n, rank=2, seed=0):
    rng = np.random.default_rng([seed, m, n])
    return rng.normal(size=(rank, n)).astype(np.float32), rng.normal(size=(m, rank)).astype(
        np.float32
    )


def assumed():
    """The warning about adapters without an alpha."""
    return pytest.warns(UserWarning, match="alpha = rank is assumed.*multiply scale by alpha / ra")


def test_adapters_are_added_to_their_matrices_and_to_nothing_else():
    arrays = published()
    name = "single_transformer_blocks.1.proj_mlp"
    a, b = factors(192, 48)
    expected = arrays | {f"{name}.weight": arrays[f"{name}.weight"] + 0.5 * b @ a}
    low_rank = {f"transformer.{name}.lora_A.weight": a, f"transformer.{name}.lora_B.weight": b}
    with assumed():
        merged = adapters.merged(arrays, low_rank, 0.5)
    for key in arrays:
        np.testing.assert_allclose(merged[key], expected[key], atol=1e-6)
    # An alpha counts by the rank.
    merged = adapters.merged(arrays, {**low_rank, f"transformer.{name}.alpha": np.float32(1.0)})
    np.testing.assert_allclose(merged[f"{name}.weight"], expected[f"{name}.weight"], atol=1e-6)


def test_adapters_of_the_single_file_form_are_cut_as_its_weights_are():
    arrays = published()
    modules = {
        "double_blocks_1_img_attn_qkv": (144, 48),
        "double_blocks_0_txt_mlp_2": (48, 192),
        "single_blocks_0_linear1": (336, 48),
        "time_in_in_layer": (48, 256),
        "final_layer_adaLN_modulation_1": (96, 48),
    }
    low_rank, original = {}, single_file(arrays)
    dotted = {
        name.rpartition(".")[0].replace(".", "_"): name.rpartition(".")[0] for name in original
    }
    for seed, (module, shape) in enumerate(modules.items()):
        a, b = factors(*shape, seed=seed)
        low_rank |= {
            f"lora_unet_{module}.lora_down.weight": a,
            f"lora_unet_{module}.lora_up.weight": b,
        }
        low_rank[f"lora_unet_{module}.alpha"] = np.asarray(0.5, np.float32)
        original[f"{dotted[module]}.weight"] = original[f"{dotted[module]}.weight"] + 0.25 * b @ a
    expected, merged = key_names.diffusers(original), adapters.merged(arrays, low_rank)
    assert merged.keys() == expected.keys()
    for key in expected:
        np.testing.assert_allclose(merged[key], expected[key], atol=1e-6, err_msg=key)


def test_adapters_of_a_flow_map_reach_the_second_embedder():
    arrays = published()
    low_rank = {}
    for seed, which in enumerate(("original", "second")):
        a, b = factors(48, 256, seed=seed)
        place = f"transformer.time_text_embed.{which}_embedder.timestep_embedder.linear_1"
        low_rank |= {f"{place}.lora_A.weight": a, f"{place}.lora_B.weight": b}
        low_rank[f"{place}.alpha"] = np.asarray([2.0], np.float32)  # some files have the shape (1,)
    with pytest.raises(ValueError, match=r"2 of 2 adapters match no matrix .*key_names\.dual"):
        adapters.merged(arrays, low_rank)
    merged = adapters.merged(key_names.dual(arrays), low_rank)
    base = arrays["time_text_embed.timestep_embedder.linear_1.weight"]
    for seed, which in enumerate(("original", "second")):
        a, b = factors(48, 256, seed=seed)
        name = f"time_text_embed.{which}_embedder.timestep_embedder.linear_1.weight"
        np.testing.assert_allclose(merged[name], base + b @ a, atol=1e-5)
    network = loading.from_state_dict("transformer", merged, DUAL)
    assert network.config.dual_time


def test_wrong_adapters_are_errors_with_names():
    arrays, (a, b) = published(), factors(48, 48)
    place = "transformer_blocks.0.attn.to_q"
    with pytest.raises(ValueError, match=r"lack the other half of their pair: .*lora_A"):
        adapters.merged(arrays, {f"{place}.lora_A.weight": a})
    with pytest.raises(ValueError, match=r"1 keys are not adapters.*to_q.lora_C"):
        adapters.merged(
            arrays, {f"{place}.lora_A.weight": a, f"{place}.lora_B.weight": b, f"{place}.lora_C": a}
        )
    pair = lambda a, b: {f"{place}.lora_A.weight": a, f"{place}.lora_B.weight": b}
    with pytest.raises(ValueError, match="different ranks, 2 and 1"):
        adapters.merged(arrays, pair(a, b[:, :1]))
    alpha = {f"{place}.alpha": np.ones(())}
    with pytest.raises(ValueError, match=r"to_q.weight \(47, 48\)"):
        adapters.merged(arrays, pair(a, b[:47]) | alpha)
    with pytest.raises(ValueError, match=r"alpha must be one number, got shape \(2,\)"):
        adapters.merged(arrays, pair(a, b) | {f"{place}.alpha": np.ones(2)})
    with pytest.raises(ValueError, match=r"of a convolution, got \(2, 48\) and \(48, 2, 3, 3\)"):
        adapters.merged(arrays, pair(a, np.ones((48, 2, 3, 3))) | alpha)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("dora_scale", "DoRA"),
        ("lora_magnitude_vector", "DoRA"),
        ("lora_magnitude_vector.default.weight", "DoRA"),
        ("lora_mid.weight", "LoCon with a middle factor"),
    ],
)
def test_adapters_of_another_kind_are_named(name, kind):
    place, (a, b) = "transformer_blocks.0.attn.to_q", factors(48, 48)
    pair = {f"{place}.lora_down.weight": a, f"{place}.lora_up.weight": b}
    with pytest.raises(ValueError, match=f"are {kind}, as .* shows, which is not supported: merge"):
        adapters.merged(published(), pair | {f"{place}.{name}": np.ones(2)})


MATRICES = {"a.to_q.weight": np.zeros((3, 5), np.float32), "a.to_k.weight": np.zeros((3, 5))}
LORA = {
    f"transformer.a.{name}.lora_{which}.weight": factor
    for name in ("to_q", "to_k")
    for which, factor in zip("AB", factors(3, 5), strict=True)
}
UNIT = factors(3, 5)[1] @ factors(3, 5)[0]


def strengths(file, names=("to_q", "to_k")):
    """The factors alpha / rank that a file is merged with."""
    found = adapters.merged(MATRICES, files.read(file))
    ratios = [found[f"a.{name}.weight"] / UNIT for name in names]
    for ratio in ratios:
        np.testing.assert_allclose(ratio, ratio[0, 0], rtol=1e-5)
    return [float(ratio[0, 0]) for ratio in ratios]


def in_header(file, settings, arrays=LORA):
    """A file as diffusers writes it."""
    save_file(
        arrays, file, metadata={"format": "pt", "lora_adapter_metadata": json.dumps(settings)}
    )
    return file


SETTINGS = {
    "alpha of a pipeline": ({"transformer.r": 2, "transformer.lora_alpha": 4}, [2, 2]),
    "alpha of a network": ({"r": 2, "lora_alpha": 3}, [1.5, 1.5]),
    "alphas by modules": (
        {
            "transformer.r": 8,
            "transformer.lora_alpha": 1,
            "transformer.rank_pattern": {"to_q": 2, "^a.to_k": 2},
            "transformer.alpha_pattern": {"a.to_q": 5.0, "q": 7, "o_k": 7},
        },
        [2.5, 0.5],
    ),
    "the root of the rank": ({"r": 2, "lora_alpha": 4, "use_rslora": True}, [8**0.5, 8**0.5]),
}


@pytest.mark.parametrize(("settings", "expected"), SETTINGS.values(), ids=SETTINGS.keys())
def test_the_strength_in_a_header_counts(tmp_path, settings, expected):
    found = strengths(in_header(tmp_path / "x.safetensors", settings))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_strength_beside_a_file_counts_less_than_in_its_header_and_that_less_than_an_array(
    tmp_path,
):
    peft = {key.replace("transformer.", "base_model.model."): LORA[key] for key in LORA}
    files.write(tmp_path / "adapter_model.safetensors", peft)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "alpha_pattern": {"to_k": 1}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    found = strengths(tmp_path / "adapter_model.safetensors")
    np.testing.assert_allclose(found, [3, 0.5], rtol=1e-5)
    arrays = LORA | {"transformer.a.to_k.alpha": np.ones(1)}
    file = in_header(tmp_path / "x.safetensors", {"r": 2, "lora_alpha": 4}, arrays)
    np.testing.assert_allclose(strengths(file), [2, 0.5], rtol=1e-5)
    save_file(LORA, file, metadata={"ss_network_alpha": "5.0", "ss_network_dim": "2"})
    (tmp_path / "adapter_config.json").unlink()
    np.testing.assert_allclose(strengths(file), [2.5, 2.5], rtol=1e-5)


def test_an_unknown_strength_is_said(tmp_path):
    files.write(tmp_path / "x.safetensors", LORA)
    with assumed():
        assert strengths(tmp_path / "x.safetensors") == pytest.approx([1, 1])
    # The settings of another network do not count.
    file = in_header(
        tmp_path / "y.safetensors", {"text_encoder.r": 2, "text_encoder.lora_alpha": 4}
    )
    with assumed():
        assert strengths(file) == pytest.approx([1, 1])
    file = in_header(tmp_path / "y.safetensors", {"r": 4, "lora_alpha": 4})
    with pytest.raises(ValueError, match=r"has rank 2.*have rank 4.*dict\(adapters\)"):
        strengths(file)
    with assumed():
        adapters.merged(MATRICES, dict(files.read(file)))
    file = in_header(tmp_path / "y.safetensors", {"r": 2, "lora_alpha": 4, "use_dora": True})
    with pytest.raises(ValueError, match="use_dora, which is not supported: merge"):
        strengths(file)
    save_file(LORA, file, metadata={"lora_adapter_metadata": "nothing"})
    with pytest.raises(ValueError, match="lora_adapter_metadata of these adapters is no JSON"):
        strengths(file)


def test_adapters_of_convolutions():
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    weights = {"conv.weight": draw(4, 3, 3, 3), "one.weight": draw(4, 3, 1, 1)}
    a, b, c, d = draw(2, 3, 3, 3), draw(4, 2, 1, 1), draw(2, 3), draw(4, 2)
    low_rank = {
        "conv.lora_down.weight": a,
        "conv.lora_up.weight": b,
        "conv.alpha": np.ones(1),
        "one.lora_down.weight": c,
        "one.lora_up.weight": d,
        "one.alpha": np.ones(()),
    }
    found = adapters.merged(weights, low_rank)
    x = draw(1, 3, 8, 8)
    convolution = lambda x, w: jax.lax.conv(x, w, (1, 1), "SAME")
    expected = convolution(x, weights["conv.weight"]) + 0.5 * convolution(convolution(x, a), b)
    np.testing.assert_allclose(convolution(x, found["conv.weight"]), expected, atol=1e-4)
    shift = (found["one.weight"] - weights["one.weight"])[:, :, 0, 0]
    np.testing.assert_allclose(shift, 0.5 * d @ c, atol=1e-5)


def test_adapters_of_text_encoders_are_told_apart():
    a, b = factors(4, 4)
    names = {
        "transformer": ["transformer.x", "lora_unet_x", "diffusion_model.x"],
        "text_encoder": ["text_encoder.text_model.x", "lora_te1_text_model_x", "lora_te_x"],
        "text_encoder_2": ["text_encoder_2.encoder.x", "lora_te3_encoder_x"],
    }
    for network, modules in names.items():
        for module in modules:
            low_rank = {f"{module}.lora_down.weight": a, f"{module}.lora_up.weight": b}
            assert adapters.parts(low_rank) == {network: 2}
            base = "encoder.x.weight" if network == "text_encoder_2" else "x.weight"
            for prefix in ("", "text_model.") if network == "text_encoder" else ("",):
                with assumed():
                    found = adapters.merged({prefix + base: np.zeros((4, 4))}, low_rank)
                np.testing.assert_allclose(found[prefix + base], b @ a, atol=1e-5)
    both = LORA | {f"text_encoder.x.lora_linear_layer.{d}.weight": a for d in ("up", "down")}
    with pytest.raises(ValueError, match=r"4 of the transformer, 2 of the text_encoder: pass"):
        adapters.merged(MATRICES, both)
    assert set(adapters.part(both, "transformer")) == set(LORA)
    assert len(adapters.part(both, "text_encoder")) == 2
    with pytest.raises(ValueError, match="no adapters of the text_encoder_2, only of"):
        adapters.part(both, "text_encoder_2")
    with pytest.raises(ValueError, match="name must be one of transformer"):
        adapters.part(both, "vae")
    plain = {"x.lora_A.weight": a}
    assert adapters.part(plain, "text_encoder").keys() == plain.keys()


# Files.


def test_files_are_read_as_they_were_written(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        "a": rng.normal(size=(3, 4)).astype(np.float32),
        "b.weight": rng.normal(size=5).astype(ml_dtypes.bfloat16),
        "scalar": np.asarray(2.0, np.float64),
        "none": np.zeros((0, 3), np.float16),
    }
    files.write(tmp_path / "x.safetensors", arrays)
    found = files.read(tmp_path / "x.safetensors")
    same(found, arrays)
    assert {name: found[name].dtype for name in found} == {
        name: array.dtype for name, array in arrays.items()
    }
    assert {name: found.shape(name) for name in found} == {
        name: array.shape for name, array in arrays.items()
    }


def test_a_part_of_an_array_is_read_alone(tmp_path):
    array = np.arange(12.0).reshape(3, 4).T  # not contiguous
    files.write(tmp_path / "x.safetensors", {"a": array})
    found = files.read(tmp_path / "x.safetensors")
    np.testing.assert_array_equal(found["a"], array)
    rows, columns = slice(1, 3), slice(None, 2)
    np.testing.assert_array_equal(found.parts["a"][1](rows, columns), array[rows, columns])
    cut = key_names.renamed(found, str.upper)
    np.testing.assert_array_equal(cut.parts["A"][1](rows), array[rows])


def test_spoilt_files_are_errors(tmp_path):
    path = tmp_path / "x.safetensors"
    files.write(path, {"a": np.zeros((3, 4), np.float32)})
    whole = path.read_bytes()
    for spoilt in (
        whole[:-1],
        whole[:20],
        b"",
        whole.replace(b'"F32"', b'"X32"'),
        whole.replace(b'"dtype"', b'"dtypo"'),
        b"<!DOCTYPE html><html>" * 9,
    ):
        path.write_bytes(spoilt)
        with pytest.raises(ValueError, match="not a safetensors file, or is truncated"):
            files.read(path)
    path.write_bytes(whole.replace(b'"F32"', b'"U32"'))
    with pytest.raises(ValueError, match="a has the unsupported dtype U32"):
        files.read(path)
    with pytest.raises(FileNotFoundError, match=r"y\.safetensors does not exist"):
        files.read(tmp_path / "y.safetensors")


def folder(path, config=SMALL, shards=2, dtype=np.float32):
    """A folder as FLUX.1 is published, of a small transformer."""
    part = path / "transformer"
    part.mkdir(parents=True)
    (part / "config.json").write_text(
        json.dumps({"_class_name": "FluxTransformer2DModel", **config})
    )
    arrays = {name: array.astype(dtype) for name, array in published(config).items()}
    names = sorted(arrays)
    weight_map = {name: f"model-{i % shards}.safetensors" for i, name in enumerate(names)}
    for shard in set(weight_map.values()):
        files.write(
            part / shard, {name: arrays[name] for name in names if weight_map[name] == shard}
        )
    if shards > 1:
        (part / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": weight_map})
        )
    return arrays


@pytest.mark.parametrize("shards", [1, 3])
def test_a_folder_is_loaded(tmp_path, shards):
    arrays = folder(tmp_path, shards=shards, dtype=ml_dtypes.bfloat16)
    network = loading.load("transformer", tmp_path, param_dtype=jnp.bfloat16)
    assert network.x_embedder.kernel.dtype == jnp.bfloat16
    same(arrays_of(network), arrays)


def test_adapters_are_merged_while_loading(tmp_path):
    arrays = folder(tmp_path)
    a, b = factors(48, 256)
    place = "transformer.time_text_embed.second_embedder.timestep_embedder.linear_1"
    files.write(
        tmp_path / "lora.safetensors", {f"{place}.lora_A.weight": a, f"{place}.lora_B.weight": b}
    )
    with assumed():
        network = loading.load(
            "transformer", tmp_path, adapters=tmp_path / "lora.safetensors", scale=0.5
        )
    found = arrays_of(network)
    first, second = (
        found[f"time_text_embed.{each}_embedder.timestep_embedder.linear_1.weight"]
        for each in ("original", "second")
    )
    np.testing.assert_array_equal(
        first, arrays["time_text_embed.timestep_embedder.linear_1.weight"]
    )
    np.testing.assert_allclose(second, first + 0.5 * b @ a, atol=1e-5)
    (tmp_path / "vae").symlink_to(tmp_path / "transformer")
    with pytest.raises(ValueError, match="only a transformer or a text encoder takes"):
        loading.load("autoencoder", tmp_path, adapters=tmp_path / "lora.safetensors")


def test_folders_without_what_is_needed_are_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="not of the form of the Hugging Face hub"):
        loading.load("transformer", tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        loading.load("transformer", tmp_path)
    folder(tmp_path)
    (tmp_path / "transformer" / "model-1.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks model-1\.safetensors"):
        loading.load("transformer", tmp_path)
    (tmp_path / "transformer" / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match=r"\d+ missing: "):
        loading.load("transformer", tmp_path)
    (tmp_path / "transformer" / "model-0.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no safetensors files, only config\.json"):
        loading.load("transformer", tmp_path)
    with pytest.raises(ValueError, match="kind must be one of transformer"):
        loading.load("unet", tmp_path)


def test_the_hub_and_its_refusals(monkeypatch, tmp_path):
    errors = types.ModuleType("huggingface_hub.errors")
    for name in ("GatedRepoError", "RepositoryNotFoundError", "LocalEntryNotFoundError"):
        setattr(errors, name, type(name, (Exception,), {}))
    hub = types.ModuleType("huggingface_hub")
    hub.errors = errors
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", errors)
    monkeypatch.chdir(tmp_path)

    def answer(result):
        def download(name, allow_patterns):
            assert name == "someone/model"
            if isinstance(result, type):
                raise result
            return result

        hub.snapshot_download = download
        return files.located("someone/model")

    assert answer(str(tmp_path)) == tmp_path
    with pytest.raises(PermissionError, match=r"gated model: accept its license.*HF_TOKEN"):
        answer(errors.GatedRepoError)
    with pytest.raises(FileNotFoundError, match="no model of this name"):
        answer(errors.RepositoryNotFoundError)
    with pytest.raises(FileNotFoundError, match="cannot be reached"):
        answer(errors.LocalEntryNotFoundError)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"pip install 'tiltjax\[images\]'"):
        files.located("someone/model")


def test_other_parts_are_built_from_their_configuration():
    config = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 30,
    }
    config |= {"max_position_embeddings": 7, "hidden_act": "quick_gelu", "eos_token_id": 2}
    arrays = weights(shapes(*abstract("clip", config)))
    prefixed = {f"text_model.{name}": array for name, array in arrays.items()}
    prefixed["text_model.embeddings.position_ids"] = np.arange(7)[None]
    plain, other = (loading.from_state_dict("clip", each, config) for each in (arrays, prefixed))
    jax.tree.map(np.testing.assert_array_equal, plain, other)
    with pytest.raises(ValueError, match="do not match T5"):
        loading.from_state_dict("t5", arrays, CONFIGS["t5"])


def test_a_default_configuration_is_the_published_one():
    assert Config.from_json(CONFIGS["transformer"]) == Config()
    assert Transformer.__name__ == loading._kind("transformer").network.__name__
