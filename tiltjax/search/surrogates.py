r"""Surrogates: a reward learned from few queries, optimistic where it is uncertain.

A surrogate maps states `(n, *shape)` and values `(n,)`, of which only the `known` rows count, to a
`Reward`:

| surrogate | reward |
|---|---|
| `GaussianProcess(bonus)` | `mean + bonus * deviation` of a Gaussian process |
| `Bootstrap(heads)` | the largest of small networks, each fitted to a resample |

Both standardize the values. Both work on a fixed number of rows with a mask, so that a loop that
adds queries compiles once. References: Srinivas et al. (arXiv 0912.3995, GP-UCB); Osband et al.
(arXiv 1602.04621, bootstrapped heads).
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from tiltjax import _checks, _random
from tiltjax.rewards import Reward

# Candidates for the length of the kernel, in units of the root mean square distance of the queries,
# and for the noise, in standard deviations of the values.
_LENGTHS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0)
_NOISES = (0.03, 0.1, 0.3, 1.0)


class Surrogate(eqx.Module):
    """A method to learn a reward. Subclasses define `fit`."""

    def fit(self, key: Array, x: Array, values: Array, known: Array) -> Reward:
        """The optimistic reward after queries: states `(n, *shape)`, `values` `(n,)`, and the mask
        `known` `(n,)` of the rows that count.
        """
        raise NotImplementedError


class GaussianProcess(Surrogate):
    """`mean + bonus * deviation` under a Gaussian process, whose length and noise maximize the
    marginal likelihood over a grid.

    It is exact, at a cost of n^2 per evaluation, for a few hundred queries of states of a few
    dimensions. **Arguments:** `bonus >= 0`.
    """

    bonus: Array

    def __init__(self, bonus: float | Array = 2.0):
        self.bonus = _checks.nonnegative(bonus, "bonus")

    def fit(self, key, x, values, known):
        center, spread, y = _standardized(values, known)
        rows = x.reshape(len(x), -1)
        squares = _squares(rows, rows)
        pairs = known[:, None] & known[None]
        unit = _or_one(
            jnp.sum(jnp.where(pairs, squares, 0)) / jnp.maximum(jnp.sum(pairs, dtype=y.dtype), 1)
        )

        def factor(length: Array, noise: Array) -> Array:
            # Rows that are not known are independent of all other rows and have the value zero.
            prior = jnp.where(pairs, jnp.exp(-squares / (2 * length**2 * unit)), 0)
            return jnp.linalg.cholesky(prior + jnp.diag(jnp.where(known, noise**2, 1)))

        def log_likelihood(length: Array, noise: Array) -> Array:
            lower = factor(length, noise)
            half = jax.scipy.linalg.solve_triangular(lower, y, lower=True)
            return -jnp.sum(half**2) / 2 - jnp.sum(jnp.log(jnp.diag(lower)))

        candidates = jnp.meshgrid(jnp.asarray(_LENGTHS, y.dtype), jnp.asarray(_NOISES, y.dtype))
        lengths, noises = (grid.reshape(-1) for grid in candidates)
        # One at a time: several matrices at once would cost memory and save little time.
        scores = jax.lax.map(lambda pair: log_likelihood(*pair), (lengths, noises))
        best = jnp.argmax(jnp.where(jnp.isnan(scores), -jnp.inf, scores))
        lower = factor(lengths[best], noises[best])
        whiten = jax.scipy.linalg.solve_triangular(
            lower, jnp.eye(len(y), dtype=y.dtype), lower=True
        )
        weights = jax.scipy.linalg.cho_solve((lower, True), y)
        return UpperConfidenceBound(
            rows,
            known,
            whiten,
            weights,
            lengths[best] ** 2 * unit,
            noises[best],
            center,
            spread,
            self.bonus,
        )


class UpperConfidenceBound(Reward):
    """The reward that `GaussianProcess` learns, `mean + bonus * deviation`."""

    rows: Array
    known: Array
    whiten: Array
    weights: Array
    square: Array
    noise: Array
    center: Array
    spread: Array
    bonus: Array

    def posterior(self, x: Array) -> tuple[Array, Array]:
        """The mean and the standard deviation of the noisy value of one query."""
        near = jnp.where(
            self.known, jnp.exp(-_squares(x.reshape(1, -1), self.rows)[0] / (2 * self.square)), 0
        )
        # Near a query, rounding may make the remaining variance of the process negative.
        variance = self.noise**2 + jnp.maximum(1 - jnp.sum((self.whiten @ near) ** 2), 0.0)
        return self.center + self.spread * (near @ self.weights), self.spread * jnp.sqrt(variance)

    def __call__(self, x: Array) -> Array:
        mean, deviation = self.posterior(x)
        return mean + self.bonus * deviation


class Bootstrap(Surrogate):
    """The largest value of `heads` networks, each with two layers of `width` units and trained from
    scratch on a resample of the queries.

    For states of many dimensions, or features. **Arguments:** `heads`; `width`; `steps` of Adam on
    the whole set; `learning_rate`.
    """

    learning_rate: Array
    heads: int = eqx.field(static=True)
    width: int = eqx.field(static=True)
    steps: int = eqx.field(static=True)

    def __init__(
        self,
        heads: int = 8,
        *,
        width: int = 64,
        steps: int = 200,
        learning_rate: float | Array = 5e-3,
    ):
        self.heads = _checks.count(heads, "heads")
        self.width = _checks.count(width, "width")
        self.steps = _checks.count(steps, "steps")
        self.learning_rate = _checks.positive(learning_rate, "learning_rate")

    def fit(self, key, x, values, known):
        import optax

        center, spread, y = _standardized(values, known)
        rows = x.reshape(len(x), -1)
        count = jnp.maximum(jnp.sum(known, dtype=rows.dtype), 1)
        middle = jnp.sum(jnp.where(known[:, None], rows, 0), axis=0) / count
        square = jnp.sum(jnp.where(known[:, None], (rows - middle[None]) ** 2, 0)) / (
            count * rows.shape[1]
        )
        scale = jnp.sqrt(_or_one(square))
        scaled = (rows - middle[None]) / scale
        optimizer = optax.adam(self.learning_rate)

        def train(key: Array) -> list[tuple[Array, Array]]:
            key_start, key_choice = jax.random.split(key)
            chosen = _random.categorical(
                key_choice, jnp.where(known, 0.0, -jnp.inf), shape=(len(y),)
            )
            counts = jnp.where(known, jnp.zeros_like(y).at[chosen].add(1), 0)

            def loss(layers: list) -> Array:
                return jnp.sum(
                    counts * (jax.vmap(lambda row: _evaluate(layers, row))(scaled) - y) ** 2
                ) / jnp.sum(counts)

            def step(carry: tuple, _: None) -> tuple[tuple, None]:
                layers, state = carry
                gradients = jax.grad(loss)(layers)
                # Strict promotion forbids Adam's powers of a float to an integer.
                with jax.numpy_dtype_promotion("standard"):
                    updates, state = optimizer.update(gradients, state)
                    return (optax.apply_updates(layers, updates), state), None

            layers = _layers(key_start, (rows.shape[1], self.width, self.width, 1), y.dtype)
            (layers, _), _ = jax.lax.scan(
                step, (layers, optimizer.init(layers)), None, length=self.steps
            )
            return layers

        return Heads(
            jax.vmap(train)(jax.random.split(key, self.heads)), middle, scale, center, spread
        )


class Heads(Reward):
    """The reward that `Bootstrap` learns: the largest value among its networks."""

    layers: list[tuple[Array, Array]]
    middle: Array
    scale: Array
    center: Array
    spread: Array

    def values(self, x: Array) -> Array:
        """The values of all networks, `(heads,)`."""
        row = (x.reshape(-1) - self.middle) / self.scale
        return self.center + self.spread * jax.vmap(lambda layers: _evaluate(layers, row))(
            self.layers
        )

    def __call__(self, x: Array) -> Array:
        # By index, because the gradient of `max` compares two floats, and a compiler may compute
        # them twice with different rounding.
        values = self.values(x)
        return values[jnp.argmax(values)]


def _standardized(values: Array, known: Array) -> tuple[Array, Array, Array]:
    """The mean and deviation of the known values, and all values in these units, with zeros for
    unknown values.
    """
    count = jnp.maximum(jnp.sum(known, dtype=values.dtype), 1)
    center = jnp.sum(jnp.where(known, values, 0)) / count
    square = jnp.sum(jnp.where(known, (values - center) ** 2, 0)) / count
    # Equal values differ from their mean by rounding.
    rounding = 8 * jnp.finfo(values.dtype).eps * jnp.max(jnp.where(known, jnp.abs(values), 0))
    spread = jnp.sqrt(_or_one(jnp.where(square > rounding**2, square, 0)))
    return center, spread, jnp.where(known, (values - center) / spread, 0)


def _or_one(square: Array) -> Array:
    """The mean square if it is positive, else 1: one query, or equal queries, have no scale."""
    return jnp.where(square > 0, square, 1)


def _squares(a: Array, b: Array) -> Array:
    return jnp.sum((a[:, None] - b[None]) ** 2, axis=-1)


def _layers(key: Array, widths: tuple[int, ...], dtype) -> list[tuple[Array, Array]]:
    keys = jax.random.split(key, len(widths) - 1)
    return [
        (
            jax.random.normal(key, (n, m), dtype) / jnp.sqrt(jnp.asarray(m, dtype)),
            jnp.zeros(n, dtype),
        )
        for key, m, n in zip(keys, widths[:-1], widths[1:], strict=True)
    ]


def _evaluate(layers: list[tuple[Array, Array]], row: Array) -> Array:
    for weight, bias in layers[:-1]:
        row = jnp.tanh(weight @ row + bias)
    weight, bias = layers[-1]
    return (weight @ row + bias)[0]
