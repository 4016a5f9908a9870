"""The stand-in for the package tokenizers that the suite uses, against the package.

Tier: exact.
"""

import sys

import flux_small as small
import pytest
import tokenizers
import words

from tiltjax.flux import text


@pytest.mark.parametrize(("load", "part"), [(text.clip_tokenizer, "tokenizer"), (text.t5_tokenizer, "tokenizer_2")])
def test_words_are_the_same(load, part, tmp_path, monkeypatch):
    folder = small.folder(tmp_path / "model") / part
    prompts = ("a red square, on green!", "something unknown", "")
    expected = [load(folder, 9)(prompt).tolist() for prompt in prompts]
    assert sys.modules["tokenizers"] is tokenizers
    monkeypatch.setitem(sys.modules, "tokenizers", words.module())
    assert [load(folder, 9)(prompt).tolist() for prompt in prompts] == expected
