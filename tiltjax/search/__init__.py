"""Online search for the best sample of an expensive reward."""

from tiltjax.search import surrogates
from tiltjax.search._optimize import Search, optimize

__all__ = [
    "Search",
    "optimize",
    "surrogates",
]
