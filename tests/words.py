"""The package tokenizers in the little that `tiltjax.flux.text` asks of it, for `tokenizer.json` files of whole words.

The suite runs without that package; the tests of parity use it itself.
"""

import json
import re
import types
from pathlib import Path


class Tokenizer:
    """Whole words and signs, by their place in the vocabulary."""

    def __init__(self, content):
        assert content["model"]["type"] == "WordLevel"
        assert content["pre_tokenizer"]["type"] == "Whitespace"
        self.vocabulary, self.unknown = content["model"]["vocab"], content["model"]["unk_token"]

    @classmethod
    def from_file(cls, path):
        return cls(json.loads(Path(path).read_text()))

    def no_truncation(self): ...

    def no_padding(self): ...

    def token_to_id(self, token):
        return self.vocabulary.get(token)

    def encode(self, text, add_special_tokens):
        assert not add_special_tokens
        found = list(re.finditer(r"\w+|[^\w\s]+", text))
        ids = [self.vocabulary.get(each[0], self.vocabulary[self.unknown]) for each in found]
        return types.SimpleNamespace(ids=ids, offsets=[each.span() for each in found])


def module():
    """What `import tokenizers` finds."""
    found = types.ModuleType("tokenizers")
    found.Tokenizer = Tokenizer
    return found
