r"""Online search for the best samples of an expensive reward: `optimize`, with the surrogates of
`search.surrogates`.
"""

from tiltjax.search import surrogates
from tiltjax.search._optimize import Search, optimize

__all__ = [
    "optimize",
    "Search",
    "surrogates",
]
