r"""Exact tilts of laws of token sequences, by enumeration.

For a Markov chain `P(x) = p(x_1) P(x_1, x_2) ...` over `vocab` tokens, every expectation is a
finite sum over `vocab^length` sequences:

    tilt         P(x) exp(scale r(x)) / Z,          Z = sum_x P(x) exp(scale r(x)),
    h-function   log h(x) = log E[exp(scale r(X)) | X agrees with the visible tokens of x],

A prompt, tokens that are visible from the start, makes all of this conditional on the prompt. By
default it is the chain's own prompt, so that the law is that of the runs of the chain.
`independent` is the product of a law's marginals, the law of a step that draws all tokens at once
and independently; `Unmask` with few steps is close to it. For rewards that are sums over positions
and neighbors, `pair_log_norm` computes Z at any length, by transfer matrices.

A chain is any object with `log_initial` `(vocab,)`, `log_transition` `(vocab, vocab)` and `length`,
such as `tiltjax.tokens.MarkovChain`, with or without a `prompt` `(length,)`. A hidden token is the
integer `vocab`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from tiltjax import _checks, _linalg, _repr, rewards

MAX_STATES = 2_000_000


class Chain(Protocol):
    """The attributes that this module needs of a Markov chain."""

    length: int

    @property
    def log_initial(self) -> Array: ...

    @property
    def log_transition(self) -> Array: ...


class TokenLaw(NamedTuple):
    """A law on sequences.

    **Fields:** `states` `(n, length)`, integers in lexicographic order; `probs` `(n,)`; `log_norm`,
    scalar, log Z of the tilt.
    """

    states: Array
    probs: Array
    log_norm: Array

    def __repr__(self) -> str:
        num, length = self.states.shape
        return f"TokenLaw: {num} sequences of length {length}, log Z = {_repr.form(self.log_norm)}"

    def expect(self, fn: Callable) -> Array:
        """`E[fn(X)]` for a function of one sequence."""
        values = jax.vmap(fn)(self.states)
        return _linalg.weighted_sum(self.probs, values.astype(self.probs.dtype))

    def index(self, x: Array) -> Array:
        """The row of `states` that holds the sequence x."""
        vocab = self.states[-1, 0] + 1
        return jnp.polyval(x.astype(vocab.dtype), vocab)


def _check_chain(chain: Any) -> None:
    if not all(hasattr(chain, name) for name in ("length", "log_initial", "log_transition")):
        raise TypeError(
            "chain must be a Markov chain, such as tiltjax.tokens.MarkovChain, got "
            f"{type(chain).__name__}"
        )


def token_states(vocab: int, length: int) -> Array:
    """All sequences, `(vocab^length, length)`.

    **Raises:** `ValueError` for more than two million sequences.
    """
    vocab, length = _checks.count(vocab, "vocab"), _checks.count(length, "length")
    if vocab**length > MAX_STATES:
        raise ValueError(
            f"{vocab} tokens at {length} positions make {vocab}^{length} sequences, more than "
            f"{MAX_STATES:,}. Use fewer, or pair_log_norm for rewards of neighbors."
        )
    return jnp.asarray(np.indices((vocab,) * length).reshape(length, -1).T, jnp.int32)


def token_log_prob(chain: Chain, x: Array) -> Array:
    """`log P(x)` of one sequence without hidden tokens. `x` is `(length,)`."""
    return _log_prob(chain.log_initial, chain.log_transition, x)


@jax.jit
def _log_prob(log_initial: Array, log_transition: Array, x: Array) -> Array:
    return log_initial[x[0]] + jnp.sum(log_transition[x[:-1], x[1:]])


def token_tilt(
    chain: Chain, reward: Callable, scale: float | Array = 1.0, *, prompt: Any = None
) -> TokenLaw:
    """The tilt of a chain by `exp(scale * r)`, given its prompt, by enumeration.

    **Arguments:** `chain`; `reward(x) -> scalar` of integers `(length,)`, which may be `-inf`;
    `scale`; `prompt` `(length,)`, the visible tokens, and `vocab` at hidden positions, by default
    that of the chain. The law is conditional on the prompt, and `log_norm` is `log h` at the
    prompt.

    **Raises:** `ValueError` for too many sequences, for visible tokens of probability zero, and for
    a reward that is `-inf` everywhere.
    """
    states, law, values = _tilted(chain, reward, scale, _prompt(chain, prompt), "prompt")
    log_norm = _log_norm(law, values)
    return TokenLaw(states, jnp.exp(law + values - log_norm), log_norm)


def _prompt(chain: Chain, prompt: Any) -> Any:
    """The prompt, by default that of the chain, and None if the chain has none."""
    return getattr(chain, "prompt", None) if prompt is None else prompt


def _log_norm(law: Array, values: Array) -> Array:
    log_norm = jax.nn.logsumexp(law + values)
    if _checks.concrete(log_norm) and not np.isfinite(log_norm):
        raise ValueError(
            f"the tilt has no finite mass, log Z = {float(log_norm):g}: check where the reward is "
            "infinite"
        )
    return log_norm


def token_log_h(chain: Chain, reward: Callable, scale: float | Array, x: Array) -> Array:
    """`log E[exp(scale r(X)) | the visible tokens of x]`, by enumeration. For a complete sequence
    this is `scale * r(x)`.

    **Arguments:** `chain`, `reward` and `scale` as in `token_tilt`; `x` `(length,)`, integers,
    `vocab` where a token is hidden.

    **Raises:** `TypeError` if `x` is None; `ValueError` if `x` has another shape or dtype, and as
    `token_tilt`.
    """
    if x is None:
        raise TypeError(
            "x must be a sequence of integers, got None. For log Z use token_tilt(chain, reward, "
            "scale).log_norm."
        )
    _, law, values = _tilted(chain, reward, scale, x, "x")
    return _log_norm(law, values)


def token_marginals(law: TokenLaw, vocab: int) -> Array:
    """The marginals `P(X_i = v)`, `(length, vocab)`."""
    _checks.instance(law, TokenLaw, "law", "such as token_tilt(chain, reward, scale)")
    vocab = _checks.count(vocab, "vocab")
    return _linalg.weighted_sum(law.probs, jax.nn.one_hot(law.states, vocab, dtype=law.probs.dtype))


def independent(law: TokenLaw, vocab: int) -> TokenLaw:
    """The product of a law's marginals: the law of drawing all tokens in one step."""
    log_marginals = jnp.log(token_marginals(law, vocab))
    places = jnp.arange(law.states.shape[1], dtype=law.states.dtype)
    log_probs = jnp.sum(log_marginals[places[None], law.states], axis=1)
    return law._replace(probs=jnp.exp(log_probs), log_norm=jnp.zeros_like(law.log_norm))


def pair_log_norm(
    chain: Chain,
    single: Array,
    pair: Array | None = None,
    scale: float | Array = 1.0,
    *,
    prompt: Any = None,
) -> Array:
    """`log E[exp(scale r) | prompt]` for `r(x) = sum_i single[i, x_i] + sum_i pair[x_i, x_{i+1}]`,
    at any length.

    **Arguments:** `chain`; `single` `(length, vocab)`; `pair` `(vocab, vocab)`, zero by default;
    `scale`; `prompt` as in `token_tilt`.

    **Raises:** `ValueError` for other shapes, and for a prompt of probability zero.
    """
    _check_chain(chain)
    dtype, vocab = chain.log_initial.dtype, len(chain.log_initial)
    scale = _checks.finite(scale, "scale", 0).astype(dtype)
    single = _checks.floating(single, "single", 2).astype(dtype)
    pair = (
        jnp.zeros((vocab, vocab), dtype)
        if pair is None
        else _checks.floating(pair, "pair", 2).astype(dtype)
    )
    _checks.shape(single, (chain.length, vocab), "single")
    _checks.shape(pair, (vocab, vocab), "pair")
    allowed = jnp.zeros_like(single)
    if (prompt := _prompt(chain, prompt)) is not None:
        prompt = _as_visible(prompt, chain, "prompt")[:, None]
        agrees = (prompt == vocab) | (prompt == jnp.arange(vocab, dtype=prompt.dtype)[None])
        allowed = jnp.where(agrees, 0.0, -jnp.inf).astype(dtype)
    mass = _log_total(chain, allowed, jnp.zeros_like(pair))
    _check_possible(mass, prompt, "prompt")
    return _log_total(chain, allowed + scale * single, scale * pair) - mass


def _log_total(chain: Chain, single: Array, pair: Array) -> Array:
    """`log sum_x P(x) exp(sum_i single[i, x_i] + sum_i pair[x_i, x_{i+1}])`, by messages."""
    step = chain.log_transition + pair

    def advance(message: Array, values: Array) -> tuple[Array, None]:
        return jax.nn.logsumexp(message[:, None] + step, axis=0) + values, None

    message, _ = jax.lax.scan(advance, chain.log_initial + single[0], single[1:])
    return jax.nn.logsumexp(message)


def _as_visible(tokens: Any, chain: Chain, name: str) -> Array:
    """Visible tokens, `(length,)`. **Raises:** `ValueError` for another shape or dtype."""
    vocab = len(chain.log_initial)
    tokens = tokens if isinstance(tokens, jax.Array) else np.asarray(tokens)
    if tokens.shape != (chain.length,) or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(
            f"{name} must hold {chain.length} integers, {vocab} where a token is hidden, got "
            f"shape {tokens.shape} of {tokens.dtype}"
        )
    return jnp.asarray(tokens).astype(jnp.int32)


def _check_possible(log_mass: Array, tokens: Any, name: str) -> None:
    if _checks.concrete(log_mass) and not np.isfinite(log_mass):
        raise ValueError(
            f"{name} has probability zero under the chain: {np.ravel(tokens).tolist()}"
        )


def _tilted(
    chain: Chain, reward: Callable, scale: float | Array, visible: Any, name: str
) -> tuple[Array, Array, Array]:
    """All states, the log-probabilities before the tilt, and `scale * r`."""
    _check_chain(chain)
    vocab = len(chain.log_initial)
    states, dtype = token_states(vocab, chain.length), chain.log_initial.dtype
    scale, fn = _checks.finite(scale, "scale", 0).astype(dtype), rewards.as_reward(reward)
    log_law = jax.vmap(lambda x: token_log_prob(chain, x))(states)
    if visible is not None:
        visible = _as_visible(visible, chain, name)
        agrees = jnp.all((states == visible[None]) | (visible[None] == vocab), axis=1)
        log_law = jnp.where(agrees, log_law, -jnp.inf)
        mass = jax.nn.logsumexp(log_law)
        _check_possible(mass, visible, name)
        log_law = log_law - mass
    values = rewards.values(fn, states).astype(dtype)
    # At scale 0 a reward of -inf excludes nothing.
    return states, log_law, jnp.where(scale == 0, 0.0, scale * values)
