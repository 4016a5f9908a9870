"""Masked diffusion of token sequences."""

from tiltjax.tokens._completions import Completions
from tiltjax.tokens._models import Logits, MarkovChain, Masked, as_tokens, from_logits
from tiltjax.tokens._unmask import Masking, Reveal, Unmask

__all__ = [
    "Masking",
    "Reveal",
    "Unmask",
    "Masked",
    "MarkovChain",
    "Logits",
    "from_logits",
    "as_tokens",
    "Completions",
]
