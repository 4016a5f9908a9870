r"""`optimize`: maximize a reward with a few hundred evaluations, steered by a surrogate that is
learned during the search.

    round 0:      x_1, ..., x_b ~ the model      (unless `earlier` has queries)
    round j:
        fit an optimistic surrogate to all queries --> smc tilts the model by it
            --> b of the particles are the next queries

The model restricts the queries to plausible data. Optimism moves them to regions in which the
surrogate is uncertain. Reference: Kim et al. (arXiv 2501.05803, online black-box optimization).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from tiltjax import _checks, _progress, _pytree, _random
from tiltjax.guidance import Guidance, dps
from tiltjax.models import Model
from tiltjax.rewards import Reward
from tiltjax.samplers import sample
from tiltjax.search.surrogates import GaussianProcess, Surrogate
from tiltjax.weighted import smc


class Search(NamedTuple):
    """All queries in order: states `x` `(n, *shape)`, `values` `(n,)`, the round of each query
    `(n,)`, and the last surrogate (`None` if the search failed).
    """

    x: np.ndarray
    values: np.ndarray
    rounds: np.ndarray
    surrogate: Reward | None

    @property
    def best(self) -> np.ndarray:
        """The state with the largest value."""
        return self.x[np.argmax(self.values)]

    def regret(self, optimum: float) -> np.ndarray:
        """The optimum minus the best value so far, after each query, `(n,)`."""
        return optimum - np.maximum.accumulate(self.values)


def optimize(
    key: Array,
    model: Model,
    query: Callable[[np.ndarray], Any],
    surrogate: Surrogate | None = None,
    *,
    scale: float | Array,
    rounds: int = 16,
    queries: int = 16,
    num: int = 256,
    guide: Callable[[Model, Reward, Any], Guidance] = dps,
    earlier: Search | None = None,
    progress: bool = False,
    **settings: Any,
) -> Search:
    """A search for the states of largest value with `rounds * queries` evaluations.

    **Arguments:**

    - `query`: a Python function from states `(queries, *shape)`, a NumPy array, to `queries`
      values; called once per round.
    - `surrogate`: `GaussianProcess()` by default; `Bootstrap()`.
    - `scale`: how strongly the surrogate tilts the model. A large scale exploits the surrogate; a
      small scale stays near the model.
    - `num`: the number of particles per round, of which `queries` are drawn by weight. No state is
      evaluated twice in a round if there are enough distinct states.
    - `guide`: makes a guidance from a model, a reward and a scale: `dps`, `Laplace`, `Conjugate`.
    - `earlier`: a search to continue, from another call or from a failed call.
    - `settings`: of `smc`: `steps`, `proposal`, `tempering` and so on.

    **Returns:** a `Search`.

    **Raises:** `ValueError` if `query` returns another number of values, or values that are not
    finite, and every error of `query`. The `.search` of the error contains the queries that were
    evaluated before.
    """
    key = _checks.key(key)
    how = "use Analytic, from_velocity, from_noise or from_denoiser"
    _checks.instance(model, Model, "model", how)
    _checks.function(query, "query")
    _checks.function(guide, "guide")
    _checks.nonnegative(scale, "scale")
    rounds, queries = _checks.count(rounds, "rounds"), _checks.count(queries, "queries")
    num = _checks.count(num, "num")
    if num < queries:
        raise ValueError(
            f"num must be at least queries = {queries}, the particles that a round evaluates, got "
            f"{num}"
        )
    surrogate = GaussianProcess() if surrogate is None else surrogate
    _checks.instance(surrogate, Surrogate, "surrogate", "use GaussianProcess() or Bootstrap()")
    key_start, key_last, *keys = jax.random.split(key, rounds + 2)
    log = _Log.after(_check_earlier(earlier, model), model, rounds, queries)

    def propose(key: Array) -> Array:
        """The next queries, from the model tilted by the current surrogate."""
        key_fit, key_run, key_choice = jax.random.split(key, 3)
        guidance = guide(model, log.fit(key_fit, surrogate), scale)
        particles = smc(key_run, model, guidance, num=num, **settings)
        return _distinct(key_choice, particles.x, particles.log_weights, queries)

    with _progress.bar("searching", rounds, enabled=progress) as bar:
        for j, key_round in enumerate(keys):
            first = log.done == 0
            states = sample(key_start, model, num=queries).x if first else propose(key_round)
            log.evaluate(query, np.asarray(states))
            bar.tick(jnp.asarray(j, jnp.int32))
        return log.search(log.fit(key_last, surrogate))


class _Log:
    """The queries of a search, of which `done` are evaluated. Future queries are zeros, so that all
    rounds have the same shapes and share one compiled program.
    """

    def __init__(self, x: np.ndarray, values: np.ndarray, rounds: np.ndarray, done: int):
        self.x, self.values, self.rounds, self.done = x, values, rounds, done

    @classmethod
    def after(cls, earlier: Search, model: Model, rounds: int, queries: int) -> "_Log":
        """The queries of `earlier`, with room for `rounds * queries` more."""
        new, first = rounds * queries, earlier.rounds.max(initial=-1) + 1
        x = np.concatenate([earlier.x, np.zeros((new, *model.shape))]).astype(model.dtype)
        values = np.concatenate([earlier.values, np.zeros(new)]).astype(model.dtype)
        numbers = np.concatenate([earlier.rounds, first + np.repeat(np.arange(rounds), queries)])
        return cls(x, values, numbers, len(earlier.values))

    def search(self, surrogate: Reward | None) -> Search:
        done = self.done
        return Search(self.x[:done], self.values[:done], self.rounds[:done], surrogate)

    def fit(self, key: Array, surrogate: Surrogate) -> Reward:
        known = jnp.arange(len(self.x)) < self.done
        return _fit(key, surrogate, jnp.asarray(self.x), jnp.asarray(self.values), known)

    def evaluate(self, query: Callable[[np.ndarray], Any], states: np.ndarray) -> None:
        """Evaluate the query at these states. The `.search` of an error is the search before it."""
        try:
            values = _checked(query(states.copy()), len(states), self.values.dtype)
        except Exception as error:
            if self.done:
                error.add_note(
                    f"The .search of this error contains the {self.done} queries before it: "
                    "continue with earlier=error.search."
                )
            error.search = self.search(None)  # pyright: ignore[reportAttributeAccessIssue]
            raise
        new = slice(self.done, self.done + len(states))
        self.x[new], self.values[new], self.done = states, values, new.stop


def _check_earlier(earlier: Search | None, model: Model) -> Search:
    if earlier is None:
        return Search(np.zeros((0, *model.shape)), np.zeros(0), np.zeros(0, int), None)
    _checks.instance(earlier, Search, "earlier", "what optimize returned")
    if earlier.x.shape[1:] != model.shape:
        raise ValueError(
            f"earlier queries must be states of shape {model.shape}, got {earlier.x.shape[1:]}"
        )
    return earlier


def _checked(values: Any, num: int, dtype: Any) -> np.ndarray:
    values = np.asarray(values)
    if values.dtype.kind not in "fiub":
        raise ValueError(f"query must return real numbers, got {values.dtype}")
    with np.errstate(over="ignore"):  # the check below finds numbers too large for the dtype
        values = values.astype(dtype)
    if values.shape != (num,):
        raise ValueError(
            f"query must return {num} values for {num} states, got shape {values.shape}"
        )
    if wrong := np.sum(~np.isfinite(values)):
        raise ValueError(
            f"query must return finite values (in {values.dtype}), got {wrong} of {num} that are "
            "not finite"
        )
    return values


@eqx.filter_jit
def _fit(key: Array, surrogate: Surrogate, x: Array, values: Array, known: Array) -> Reward:
    return _pytree.cast(surrogate, x.dtype).fit(key, x, values, known)


@eqx.filter_jit
def _distinct(key: Array, x: Array, log_weights: Array, num: int) -> Array:
    """`num` particles drawn by weight without replacement (the largest of perturbed log-weights).
    Copies of one state count as one state.
    """
    rows = x.reshape(len(x), -1)
    same = jnp.all(rows[:, None] == rows[None], axis=-1)
    first = jnp.argmax(same, axis=1) == jnp.arange(len(x))
    copies = jnp.log(
        jnp.sum(jnp.where(same, jnp.exp(log_weights - jnp.max(log_weights))[None], 0.0), axis=1)
    )
    # Copies come last: they are drawn only if there are too few distinct states.
    scores = copies + _random.gumbel(key, copies.shape, copies.dtype)
    order = jnp.argsort(jnp.where(first, -scores, jnp.inf))
    return x[order[:num]]
