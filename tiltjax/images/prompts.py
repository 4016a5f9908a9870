r"""Prompts: text to the two things that FLUX.1 knows of it, once per prompt.

    prompt --CLIP tokenizer--> (start, ids, end, pad, ...), 77   --CLIP-->  pooled state (768,)
           --T5 tokenizer-->   (ids, end, pad, ...), 512         --T5-->    states (512, 4096)

    states, pooled = embed(
        "a red bird",
        clip=clip,
        clip_tokenizer=clip_tokenizer(folder / "tokenizer"),
        t5=t5,
        t5_tokenizer=t5_tokenizer(folder / "tokenizer_2"),
    )

The length of the T5 text is 512 for FLUX.1-dev, at most 256 for -schnell. What a prompt has beyond
its length is cut, with a warning that quotes it. The encoders see a prompt once: without gradient,
and not within a sampler's loop.
"""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import numpy as np
from jaxtyping import Array

from tiltjax import _checks
from tiltjax.images.networks import clip, t5

CLIP_LENGTH = 77
T5_LENGTH = 512
# Words as CLIP's vocabulary was made of them: contractions, runs of letters, single digits, runs of
# signs.
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Text to exactly `length` token ids, `(length,)` int32: start, if there is one, text, end,
    padding.

    **Arguments:** `encode(prompt) -> (ids, places)`, the ids of the text alone, and the character
    of the prompt at which each begins; `start`, `end`, `pad`, ids; `length`; `name`, for messages.
    """

    encode: Callable[[str], tuple[list[int], list[int]]]
    start: int | None
    end: int
    pad: int
    length: int
    name: str

    def __call__(self, prompt: str) -> np.ndarray:
        if not isinstance(prompt, str):
            raise TypeError(
                f"a prompt is a string, got {type(prompt).__name__}: one call for each prompt"
            )
        ids, places = self.encode(prompt)
        first = [] if self.start is None else [self.start]
        room = self.length - len(first) - 1
        if len(ids) > room:
            _checks.warn(
                f"the prompt has {len(ids)} tokens for {self.name}, which reads {room}: cut is "
                f"{prompt[places[room] :].strip()!r}"
            )
        ids = [*first, *ids[:room], self.end]
        return np.asarray(ids + [self.pad] * (self.length - len(ids)), np.int32)


def clip_tokenizer(folder: str | os.PathLike, length: int = CLIP_LENGTH) -> Tokenizer:
    """The tokenizer of a CLIP, from `tokenizer.json` or from `vocab.json` and `merges.txt` in a
    local folder.

    **Raises:** `ImportError` without the package `tokenizers`; `FileNotFoundError` for a folder
    without these files.
    """
    tokenizers, folder = _tokenizers(), Path(folder)
    names = _special(folder)
    end = names.get("eos_token", "<|endoftext|>")
    start = names.get("bos_token", "<|startoftext|>")
    if (folder / "tokenizer.json").is_file():
        core = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    else:
        vocabulary, merges = _files(folder, "vocab.json", "merges.txt", instead="tokenizer.json")
        core = _byte_pairs(tokenizers, vocabulary, merges, unknown=names.get("unk_token", end))
        core.add_special_tokens([start, end])
    return _tokenizer(core, start, end, names.get("pad_token", end), length, "CLIP")


def t5_tokenizer(folder: str | os.PathLike, length: int = T5_LENGTH) -> Tokenizer:
    """The tokenizer of a T5, from `tokenizer.json` in a local folder.

    **Raises:** `ImportError` without the package `tokenizers`; `FileNotFoundError` for a folder
    without this file.
    """
    tokenizers, folder = _tokenizers(), Path(folder)
    (path,) = _files(
        folder,
        "tokenizer.json",
        instead="spiece.model saved as one, "
        "AutoTokenizer.from_pretrained(folder).save_pretrained(folder) of transformers",
    )
    names = _special(folder)
    core = tokenizers.Tokenizer.from_file(str(path))
    return _tokenizer(
        core, None, names.get("eos_token", "</s>"), names.get("pad_token", "<pad>"), length, "T5"
    )


def embed(
    prompt: str,
    *,
    clip: clip.Text,
    clip_tokenizer: Callable[[str], np.ndarray],
    t5: t5.T5,
    t5_tokenizer: Callable[[str], np.ndarray],
) -> tuple[Array, Array]:
    """`(states, pooled)`: T5's states of a prompt, `(length, d)`, and CLIP's state at its end,
    `(d,)`.

    **Arguments:** the encoders and their tokenizers: `Tokenizer`s, or functions of a prompt to its
    ids. **Warns:** what was cut off.
    """
    return _states(t5, t5_tokenizer(prompt)), _pooled(clip, clip_tokenizer(prompt))


_states = eqx.filter_jit(lambda t5, ids: t5(ids))
_pooled = eqx.filter_jit(lambda clip, ids: clip.pooled(ids))


def _tokenizers() -> Any:
    try:
        import tokenizers  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(
            "prompts need the package tokenizers: pip install 'tiltjax[images]'"
        ) from error
    return tokenizers


def _tokenizer(
    core: Any, start: str | None, end: str, pad: str, length: int, name: str
) -> Tokenizer:
    core.no_truncation()
    core.no_padding()

    def find(token: str) -> int:
        if (found := core.token_to_id(token)) is None:
            raise ValueError(f"the tokenizer of {name} has no token {token!r}: is this its folder?")
        return found

    def encode(prompt: str) -> tuple[list[int], list[int]]:
        found = core.encode(prompt, add_special_tokens=False)
        return found.ids, [begin for begin, _ in found.offsets]

    return Tokenizer(
        encode,
        None if start is None else find(start),
        find(end),
        find(pad),
        _checks.count(length, "length"),
        name,
    )


def _byte_pairs(tokenizers: Any, vocabulary: Path, merges: Path, unknown: str) -> Any:
    """CLIP's own: text in lower case, single spaces, words in bytes, the last of each marked."""
    model = tokenizers.models.BPE.from_file(
        str(vocabulary),
        str(merges),
        unk_token=unknown,
        continuing_subword_prefix="",
        end_of_word_suffix="</w>",
    )
    core = tokenizers.Tokenizer(model)
    normal, before = tokenizers.normalizers, tokenizers.pre_tokenizers
    spaces = normal.Replace(tokenizers.Regex(r"\s+"), " ")
    core.normalizer = normal.Sequence([normal.NFC(), spaces, normal.Lowercase()])
    words = before.Split(tokenizers.Regex(_WORDS), behavior="removed", invert=True)
    core.pre_tokenizer = before.Sequence(
        [words, before.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    return core


def _files(folder: Path, *names: str, instead: str) -> list[Path]:
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        found = (
            sorted(path.name for path in folder.iterdir()) if folder.is_dir() else "no such folder"
        )
        raise FileNotFoundError(
            f"{folder} has no {' and no '.join(missing)} (or {instead}), got {found}"
        )
    return [folder / name for name in names]


def _special(folder: Path) -> dict[str, str]:
    """Names of special tokens, `eos_token` and so on, as far as the folder tells them."""
    names = {}
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / file).is_file():
            for key, value in json.loads((folder / file).read_text()).items():
                content = value.get("content") if isinstance(value, dict) else value
                if key.endswith("_token") and isinstance(content, str):
                    names[key] = content
    return names
