r"""Masked diffusion of token sequences: models, a solver, a guidance.

`MarkovChain` and `from_logits` are models (`Masked`), `Unmask` is the solver, and `Completions` is
the guidance. `sample`, `smc` and `audit` take token models as they take models of real vectors.
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
