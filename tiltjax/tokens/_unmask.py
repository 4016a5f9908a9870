"""The solver of masked diffusion, which reveals hidden tokens step by step."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from tiltjax import _checks, _random, _repr
from tiltjax.solvers import Stochastic


class Masking(_repr.Printable):
    """The corruption of masked diffusion: at time t a token is visible with probability
    `alpha_t = t`, and there is no noise.
    """

    def alpha(self, t: Array) -> Array:
        """The probability that a token is visible."""
        return t


class Reveal(NamedTuple):
    """One step of `Unmask`: the fraction `probability` of the hidden tokens is revealed, each drawn
    independently from its law in D, `(length, vocab)`.
    """

    probability: Array
    even: bool

    @property
    def response(self) -> float:
        return 1.0

    @property
    def eta(self) -> Array:
        raise ValueError(
            "a token model has no score, so tokens cannot be shifted: use the proposal Guided(), "
            "Base() or Children(m)"
        )

    def propose(
        self, key: Array, x: Array, denoised: Array, shift: Array | None
    ) -> tuple[Array, Array]:
        """A draw from q, the step with the shifted D, and the value of `log p - log q` at the draw,
        where p is the step without the shift. A hidden token is the integer `vocab`.
        """
        key_which, key_what = jax.random.split(key)
        hidden = x == denoised.shape[-1]
        chosen = jax.random.uniform(key_which, (len(x) + 1,), denoised.dtype)
        if self.even:
            # The expected number, rounded up or down at random so that its mean is right.
            expected = self.probability * jnp.sum(hidden, dtype=denoised.dtype)
            number = jnp.floor(expected + chosen[-1])
            rank = jnp.argsort(jnp.argsort(jnp.where(hidden, chosen[:-1], 2.0)))
            shown = hidden & (rank.astype(number.dtype) < number)
        else:
            shown = hidden & (chosen[:-1] < self.probability)
        tilted = denoised if shift is None else denoised + shift
        drawn = _random.categorical(key_what, jnp.log(tilted)).astype(x.dtype)
        moved = jnp.where(shown, drawn, x)
        if shift is None:
            return moved, jnp.zeros((), denoised.dtype)
        log_prob = lambda law: jnp.log(jnp.take_along_axis(law, drawn[:, None], axis=1)[:, 0])
        return moved, jnp.sum(jnp.where(shown, log_prob(denoised) - log_prob(tilted), 0.0))


class Unmask(Stochastic):
    """The solver of masked diffusion: each hidden token is revealed with probability
    `(alpha_u - alpha_t) / (1 - alpha_t)`, and drawn from its law given the visible tokens.

    Tokens of one step are drawn independently of each other. Fewer tokens per step follow the model
    more closely, and one token per step follows it exactly.

    **Arguments:** `even`: reveal the expected number of tokens at each step, rounded up or down,
    instead of a random number. With as many steps as tokens, each step then reveals one token, in
    random order.
    """

    even: bool = eqx.field(static=True, default=True)

    corruption = Masking

    def __check_init__(self) -> None:
        _checks.flag(self.even, "even")

    def kernel(self, corruption: Masking, t: Array, u: Array) -> Reveal:
        """The step from t to u."""
        alpha_t, alpha_u = corruption.alpha(t), corruption.alpha(u)
        return Reveal((alpha_u - alpha_t) / (1 - alpha_t), self.even)

    def finish(self, key: Array, x: Array, denoised: Array) -> Array:
        """The last step, which reveals all hidden tokens."""
        return Reveal(jnp.ones((), denoised.dtype), even=False).propose(key, x, denoised, None)[0]
