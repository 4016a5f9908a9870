r"""`optimise`: a reward that may be asked a few hundred times only, by steering with what was learned of it so far.

    round 0:        x_1, ..., x_b ~ the model                                       (or wherever the caller starts)
    round j:        fit an optimistic surrogate to all queries --> smc tilts the model by it --> b of the particles are the next queries

The model keeps queries where data is plausible, optimism sends them where little is known. Reference: Kim et al. (arXiv 2501.05803, online
black-box optimisation).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from tiltjax import inputs
from tiltjax import progress as progress_bar
from tiltjax.guidance import Guidance, dps
from tiltjax.models import Model
from tiltjax.rewards import Reward
from tiltjax.sampling import sample
from tiltjax.smc import smc
from tiltjax.surrogates import GaussianProcess, Surrogate


class Search(NamedTuple):
    """All queries in order: states `x` `(n, *shape)`, `values` `(n,)`, the round of each `(n,)`, and the last surrogate."""

    x: np.ndarray
    values: np.ndarray
    rounds: np.ndarray
    surrogate: Reward

    @property
    def best(self) -> np.ndarray:
        """The state of the largest value."""
        return self.x[np.argmax(self.values)]

    def regret(self, optimum: float) -> np.ndarray:
        """How far the best value so far is below the optimum, after each query, `(n,)`."""
        return optimum - np.maximum.accumulate(self.values)


def optimise(
    key: Array,
    model: Model,
    query: Callable[[np.ndarray], Any],
    surrogate: Surrogate | None = None,
    *,
    scale: float | Array,
    rounds: int = 16,
    batch: int = 16,
    num: int = 256,
    guide: Callable[[Model, Reward, Any], Guidance] = dps,
    progress: bool = False,
    **settings: Any,
) -> Search:
    """Up to `rounds * batch` queries in search of states of large reward.

    **Arguments:**

    - `query`: from states `(batch, *shape)`, a NumPy array, to `batch` values: a host function, asked once a round.
    - `surrogate`: `GaussianProcess()` by default; `Bootstrap()`.
    - `scale`: how strongly the surrogate tilts the model. Large ones exploit; the model holds against them.
    - `num`: particles of each round, of which `batch` are drawn by weight; no state is asked twice in a round if it can be helped.
    - `guide`: makes a guidance of a model, a reward and a scale: `dps`, `Laplace`, `Conjugate`.
    - `settings`: of `smc`: `steps`, `proposal`, `tempering` and so on.

    **Raises:** `ValueError` for answers of another number or that are not finite.
    """
    key = inputs.typed_key(key)
    rounds, batch, num = inputs.count(rounds, "rounds"), inputs.count(batch, "batch"), inputs.count(num, "num")
    if num < batch:
        raise ValueError(f"a round asks for {batch} of the particles: num must be as many at least, got {num}")
    surrogate = GaussianProcess() if surrogate is None else surrogate
    inputs.instance(surrogate, Surrogate, "surrogate", "use GaussianProcess() or Bootstrap()")
    key_start, *keys = jax.random.split(key, rounds + 1)
    x = np.zeros((rounds * batch, *model.shape), model.dtype)
    values, known = np.zeros(rounds * batch, model.dtype), np.zeros(rounds * batch, bool)

    def ask(j: int, states: np.ndarray) -> None:
        answer = np.asarray(query(states))
        if answer.shape != (batch,) or not np.all(np.isfinite(answer)):
            raise ValueError(
                f"query must return {batch} finite values for {batch} states, in round {j} it gave shape {answer.shape}"
                + ("" if answer.shape != (batch,) else f" with {np.sum(~np.isfinite(answer))} that are not finite")
            )
        rows = slice(j * batch, (j + 1) * batch)
        x[rows], values[rows], known[rows] = states, answer, True

    with progress_bar.bar("asking", rounds, enabled=progress) as bar:
        ask(0, np.asarray(sample(key_start, model, num=batch).x))
        bar.tick(jnp.zeros((), jnp.int32))
        for j in range(1, rounds):
            key_fit, key_run, key_choice = jax.random.split(keys[j], 3)
            learned = _fit(key_fit, surrogate, *map(jnp.asarray, (x, values, known)))
            particles = smc(key_run, model, guide(model, learned, scale), num=num, **settings)
            ask(j, np.asarray(_distinct(key_choice, particles.x, particles.log_weights, batch)))
            bar.tick(jnp.asarray(j, jnp.int32))
        learned = _fit(keys[0], surrogate, *map(jnp.asarray, (x, values, known)))
    return Search(x, values, np.repeat(np.arange(rounds), batch), learned)


@eqx.filter_jit
def _fit(key: Array, surrogate: Surrogate, x: Array, values: Array, known: Array) -> Reward:
    return inputs.cast(surrogate, x.dtype).fit(key, x, values, known)


@eqx.filter_jit
def _distinct(key: Array, x: Array, log_weights: Array, number: int) -> Array:
    """`number` particles by weight, without replacement (the largest of perturbed log-weights); copies of one state count once."""
    rows = x.reshape(len(x), -1)
    same = jnp.all(rows[:, None] == rows[None], axis=-1)
    first = jnp.argmax(same, axis=1) == jnp.arange(len(x))
    copies = jnp.log(jnp.sum(jnp.where(same, jnp.exp(log_weights - jnp.max(log_weights))[None], 0.0), axis=1))
    # The copies come last, for when there are too few others.
    scores = copies + jax.random.gumbel(key, copies.shape, copies.dtype)
    order = jnp.argsort(jnp.where(first, -scores, jnp.inf))
    return x[order[:number]]
