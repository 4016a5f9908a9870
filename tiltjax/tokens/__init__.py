r"""Masked diffusion of token sequences: models, a solver, a guidance.

`MarkovChain` and `from_logits` are models (`Masked`), `Unmask` is the solver, `Completions` the
guidance. `sample`, `smc` and `audit` take them as they take models of numbers.
"""

from tiltjax.tokens._completions import Completions
from tiltjax.tokens._models import Logits, MarkovChain, Masked, as_tokens, from_logits
from tiltjax.tokens._unmask import Masking, Reveal, Unmask

__all__ = [
    "Masked",
    "MarkovChain",
    "Logits",
    "from_logits",
    "Unmask",
    "Reveal",
    "Masking",
    "Completions",
]
