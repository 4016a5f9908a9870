"""The parts of FLUX.1 with published weights: from arrays, from a folder, or from the hub.

| kind | module | published as |
|---|---|---|
| `transformer` | `transformer.Transformer` | `FluxTransformer2DModel`, or the single-file form |
| `autoencoder` | `autoencoder.Autoencoder` | `AutoencoderKL`, or the single-file form |
| `clip` | `clip.Text` | `CLIPTextModel`, with or without the prefix `text_model.` |
| `t5` | `t5.T5` | `T5EncoderModel` |
"""

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from flax import nnx

from tiltjax import _checks
from tiltjax.pretrained import adapters as low_rank
from tiltjax.pretrained import files, key_names, state_dicts

_FOLDERS = {
    "transformer": "transformer",
    "autoencoder": "vae",
    "clip": "text_encoder",
    "t5": "text_encoder_2",
}
KINDS = tuple(_FOLDERS)
_ADAPTED = {"transformer": "transformer", "clip": "text_encoder", "t5": "text_encoder_2"}


class _Kind(NamedTuple):
    network: Any
    config: Any
    key_names: dict[str, Any]


def _kind(kind: str) -> _Kind:
    # Modules are imported when used: a transformer needs no text encoder.
    if kind == "transformer":
        from tiltjax.images.networks import transformer as module

        return _Kind(
            module.Transformer,
            module.Config,
            {"renames": module.RENAMES, "stacked": module.STACKED},
        )
    if kind == "autoencoder":
        from tiltjax.images.networks import autoencoder as module

        return _Kind(module.Autoencoder, module.Config, {})
    if kind == "clip":
        from tiltjax.images.networks import clip as module

        ignored = ("embeddings.position_ids",)
        return _Kind(
            module.Text, module.TextConfig, {"stacked": module.STACKED, "ignored": ignored}
        )
    if kind == "t5":
        from tiltjax.images.networks import t5 as module

        naming = {"renames": module.RENAMES, "stacked": module.STACKED, "ignored": (module.TIED,)}
        return _Kind(module.T5, module.Config, naming)
    raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")


def from_state_dict(
    kind: str,
    state_dict: Mapping[str, Any],
    config: Mapping[str, Any],
    *,
    sharding: state_dicts.Placement | None = None,
    **options: Any,
) -> Any:
    """One part of FLUX.1 with published weights.

    **Arguments:**

    - `kind`: one of `KINDS`.
    - `state_dict`: NumPy arrays by their published names, which are read one by one. Those of a
      transformer and of an autoencoder may also have the names of the single-file form.
    - `config`: the published JSON configuration, as a dictionary. A flow map has
      `dual_time: True` (`key_names.dual`, `adapters.merged`).
    - `sharding`: a function of `(path, array)` that returns the sharding of a parameter, such as
      `transformer.sharded(mesh)`.
    - `options`: of the module, such as `dtype`, `param_dtype` and `remat`.

    **Raises:** `ValueError` that lists the keys that are missing, unused or of another shape;
    `ValueError` for an unknown kind or an unsupported configuration.
    """
    network, settings_of, naming = _kind(kind)
    settings = settings_of.from_json(config)
    if kind == "transformer":
        state_dict = key_names.diffusers(state_dict)
    if kind == "autoencoder":
        from tiltjax.images.networks import autoencoder

        state_dict = autoencoder.published(state_dict)
    if kind == "clip":
        state_dict = key_names.renamed(state_dict, lambda key: key.removeprefix("text_model."))
    abstract = nnx.eval_shape(lambda: network(settings, **options, rngs=nnx.Rngs(0)))
    return state_dicts.from_state_dict(abstract, state_dict, sharding=sharding, **naming)


def load(
    kind: str,
    model: str | os.PathLike,
    *,
    adapters: str | os.PathLike | Mapping[str, Any] | None = None,
    scale: float = 1.0,
    sharding: state_dicts.Placement | None = None,
    **options: Any,
) -> Any:
    """One part of FLUX.1, from a folder in the published layout or from the Hugging Face hub.

    **Arguments:**

    - `kind`, `sharding`, `options`: as in `from_state_dict`.
    - `model`: the folder, or a name such as `"black-forest-labs/FLUX.1-dev"`.
    - `adapters`: a safetensors file of low-rank adapters, or its arrays. Those of this part are
      multiplied by `scale` and merged into a transformer or a text encoder. If a transformer's hold
      a second time embedder, the network is a flow map. A warning names the parts of which a file
      also has adapters.

    **Raises:** as `from_state_dict`, and `FileNotFoundError`, `PermissionError` and `ImportError`
    of `files.located`.
    """
    if kind not in KINDS:
        _kind(kind)
    folder = files.located(model) / _FOLDERS[kind]
    config, state_dict = files.configuration(folder), files.read_folder(folder)
    if adapters is not None:
        factors = _factors(kind, adapters)
        if kind == "transformer":
            state_dict = key_names.diffusers(state_dict)
            if key_names.is_dual(factors):
                config, state_dict = {**config, "dual_time": True}, key_names.dual(state_dict)
        state_dict = low_rank.merged(state_dict, factors, scale)
    return from_state_dict(kind, state_dict, config, sharding=sharding, **options)


def adapters_by_kind(file: str | os.PathLike) -> dict[str, Mapping[str, Any]]:
    """The adapters in a file, for each part of which there are some. Those without a prefix are of
    the transformer.
    """
    arrays = files.read(file)
    names = low_rank.parts(arrays) or ("transformer",)
    return {kind: low_rank.part(arrays, name) for kind, name in _ADAPTED.items() if name in names}


def _factors(kind: str, adapters: str | os.PathLike | Mapping[str, Any]) -> Mapping[str, Any]:
    """The adapters of one part, with a warning about those of other parts."""
    if kind not in _ADAPTED:
        raise ValueError(
            f"only a transformer or a text encoder takes adapters, got kind = {kind!r}: leave "
            "adapters out"
        )
    arrays = adapters if isinstance(adapters, Mapping) else files.read(adapters)
    factors = low_rank.part(arrays, _ADAPTED[kind])
    counts = low_rank.parts(arrays)
    if left := [each for each in KINDS if counts.get(_ADAPTED.get(each, "")) and each != kind]:
        calls = " and ".join(f"load({each!r}, ..., adapters=...)" for each in left)
        _checks.warn(
            f"{len(arrays) - len(factors)} arrays of these adapters are of other parts than the "
            f"{kind} and are left out: add them by {calls}, or use flux.load_model"
        )
    return factors
