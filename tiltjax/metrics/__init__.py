r"""Distances between samples, and diversity.

`wasserstein`, `sliced_wasserstein`, `mmd`; `mode_weights`; `pairwise_diversity`,
`cosine_diversity`, `spectral_diversity`, `truncated_entropy`; `spectral_distance`, `recall`,
`coverage`; `standard_error`, `bootstrap`.
"""

from tiltjax.metrics._distances import (
    bootstrap,
    mmd,
    mode_weights,
    sliced_wasserstein,
    standard_error,
    wasserstein,
)
from tiltjax.metrics._diversity import (
    cosine_diversity,
    coverage,
    pairwise_diversity,
    recall,
    spectral_distance,
    spectral_diversity,
    truncated_entropy,
)

__all__ = [
    "wasserstein",
    "sliced_wasserstein",
    "mmd",
    "mode_weights",
    "pairwise_diversity",
    "cosine_diversity",
    "spectral_diversity",
    "truncated_entropy",
    "spectral_distance",
    "recall",
    "coverage",
    "standard_error",
    "bootstrap",
]
