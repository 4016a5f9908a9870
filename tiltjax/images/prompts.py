r"""Prompts: from a text to the two inputs that FLUX.1 takes, the states of T5 and of CLIP.

    prompt --CLIP tokenizer--> (start, ids, end, pad, ...), 77   --CLIP-->  pooled state (768,)
           --T5 tokenizer-->   (ids, end, pad, ...), 512         --T5-->    states (512, 4096)

    states, pooled = embed(
        "a red bird",
        clip=clip,
        clip_tokenizer=clip_tokenizer(folder / "tokenizer"),
        t5=t5,
        t5_tokenizer=t5_tokenizer(folder / "tokenizer_2"),
    )

T5 reads 512 tokens for FLUX.1-dev, and at most 256 for FLUX.1-schnell. A longer prompt is cut, with
a warning that quotes the part that was cut. A prompt is encoded once, without gradient, before
sampling.
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
# How CLIP splits a text into words: contractions, runs of letters, single digits, runs of other
# signs.
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Maps a text to exactly `length` token ids, `(length,)` int32: the start token if there is
    one, the text, the end token, and padding.

    **Arguments:**

    - `encode(prompt) -> (ids, places)`: the ids of the text alone, and for each the character of
      the prompt at which it begins.
    - `start`, `end`, `pad`: ids of the special tokens. `start` may be `None`.
    - `length`: the number of ids.
    - `name`: of the encoder, for messages.
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
                f"a prompt must be a string, got {type(prompt).__name__}: call once for each prompt"
            )
        ids, places = self.encode(prompt)
        first = [] if self.start is None else [self.start]
        room = self.length - len(first) - 1
        if len(ids) > room:
            _checks.warn(
                f"the prompt has {len(ids)} tokens for {self.name}, which reads {room}: "
                f"{prompt[places[room] :].strip()!r} is cut, so use a shorter prompt"
            )
        ids = [*first, *ids[:room], self.end]
        return np.asarray(ids + [self.pad] * (self.length - len(ids)), np.int32)


def clip_tokenizer(folder: str | os.PathLike, length: int = CLIP_LENGTH) -> Tokenizer:
    """The tokenizer of a CLIP, from a local folder with `tokenizer.json`, or with `vocab.json` and
    `merges.txt`.

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
    """The tokenizer of a T5, from a local folder with `tokenizer.json`.

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
    """`(states, pooled)`: the states of T5, `(length, d)`, and the state of CLIP at the end of the
    prompt, `(d,)`.

    **Arguments:** `prompt`; the two encoders and their tokenizers. A tokenizer is a `Tokenizer`, or
    a function from a prompt to its ids.

    **Warns** when a tokenizer cuts the prompt.
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
            raise ValueError(
                f"the tokenizer of {name} has no token {token!r}: check that the folder is right"
            )
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
    """The tokenizer of CLIP: lower case, single spaces, words as byte pairs with a mark at their
    end.
    """
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
    """The special tokens that the folder names, such as `eos_token`."""
    names = {}
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / file).is_file():
            for key, value in json.loads((folder / file).read_text()).items():
                content = value.get("content") if isinstance(value, dict) else value
                if key.endswith("_token") and isinstance(content, str):
                    names[key] = content
    return names
