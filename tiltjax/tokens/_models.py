r"""Masked diffusion on tokens: the same verbs, where a state is a sequence of integers.

A sequence X_1 of `length` tokens out of `vocab` is hidden token by token: at time t each is known
with probability `alpha_t = t`, and is the mask, the integer `vocab`, otherwise. What a model knows
is, position by position, the law of the token given all tokens that are shown,

    D_t(x)[i, v] = P(X_1[i] = v | what x shows),      (length, vocab):

the posterior mean of the one-hot sequence, and thus a denoiser. It does not depend on t. `Unmask`
follows it; a guidance tilts it.

| | |
|---|---|
| `MarkovChain(initial, transition, length)` | the exact denoiser of a Markov chain |
| `from_logits(fn, length=, vocab=)` | a network |
| `Completions(model, reward, scale, k)` | `log E[exp(scale r(X_1)) \| x]` from k completions |

Feynman-Kac steering of a token model is
`fk_steering(key, model, reward, scale=scale, num=n, guide=Completions, schedule=every)` with
`every = ResampleSchedule(1)` (the published window is for a hundred steps and more); the reward
sees whole sequences of integers, without masks. References: Sahoo et al. (arXiv 2406.07524, masked
diffusion); Singhal et al. (arXiv 2501.06848).
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from tiltjax import _checks, _repr, _sharding
from tiltjax.models import Denoiser, Net, call_network
from tiltjax.solvers import Solver
from tiltjax.tokens._unmask import Masking, Unmask


class Masked(Denoiser):
    """A model of sequences of `length` tokens, the integers below `vocab`; `mask` is that which
    hides one.

    Subclasses define `predict(x)`, the laws of the hidden tokens. **Fields:** `prompt` `(length,)`:
    tokens that are known from the start, and masks elsewhere.
    """

    length: eqx.AbstractVar[int]
    vocab: eqx.AbstractVar[int]
    prompt: eqx.AbstractVar[Array]
    dtype: eqx.AbstractVar[Any]

    @property
    def corruption(self) -> Masking:
        return Masking()

    @property
    def interpolant(self) -> Any:
        """**Raises:** `TypeError`: there is none."""
        raise TypeError(
            "tokens are hidden, not noised: a model of tokens has no score, and is guided by "
            "tokens.Completions(model, reward, scale)"
        )

    @property
    def shape(self) -> tuple[int, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return (self.length,)

    @property
    def steps(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """One token a step."""
        return self.length

    @property
    def state_dtype(self) -> Any:
        return jnp.int32

    @property
    def denoised_shape(self) -> tuple[int, ...]:
        return (self.length, self.vocab)

    @property
    def mask(self) -> int:
        """The integer that hides a token."""
        return self.vocab

    def predict(self, x: Array) -> Array:
        """Probabilities `(length, vocab)` of all positions given the tokens that `x` shows; those
        of known positions are ignored.
        """
        raise NotImplementedError

    def denoise(self, t: Array, x: Array) -> Array:
        """The law of each token given what `x` shows, `(length, vocab)`; that of a known one is
        certain.

        **Raises:** `ValueError` where `x` is not `length` integers.
        """
        if x.shape != self.shape or not jnp.issubdtype(x.dtype, jnp.integer):
            raise ValueError(
                f"a state is {self.length} integers, {self.mask} where one is hidden, got "
                f"{x.dtype} of shape {x.shape}"
            )
        known = jax.nn.one_hot(x, self.vocab, dtype=self.dtype)
        return jnp.where((x == self.mask)[:, None], self.predict(x).astype(self.dtype), known)

    def initial(self, key: Array, t: Array) -> Array:
        return self.prompt

    def grid(self, steps: int) -> Array:
        """Equal steps on [0, 1]."""
        return jnp.linspace(0.0, 1.0, _checks.count(steps, "steps") + 1)

    def default_solver(self, usual: Solver) -> Solver:
        return Unmask()

    def as_states(self, value: Any, name: str, leading: tuple[int, ...]) -> Array:
        return as_tokens(value, name, (*leading, *self.shape), self.vocab)

    def complete(self, key: Array, x: Array, probabilities: Array) -> Array:
        """A sequence without masks: the hidden tokens drawn independently of each other."""
        drawn = jax.random.categorical(key, jnp.log(probabilities)).astype(x.dtype)
        return jnp.where(x == self.mask, drawn, x)


class MarkovChain(Masked):
    """`P(x) = initial[x_1] transition[x_1, x_2] ... `, with its exact denoiser, by passing messages
    forwards and backwards.

    **Arguments:** `initial` `(vocab,)` and the rows of `transition` `(vocab, vocab)`:
    probabilities, normalized here; `length`; `prompt` `(length,)`, integers up to `vocab`, which
    hides.
    """

    log_initial: Array
    log_transition: Array
    prompt: Array
    length: int = eqx.field(static=True)

    def __init__(
        self,
        initial: _checks.Numbers,
        transition: _checks.Numbers,
        length: int,
        *,
        prompt: Any = None,
    ):
        initial = _checks.finite(initial, "initial", 1)
        transition = _checks.finite(transition, "transition", 2)
        n = len(initial)
        if not n:
            raise ValueError("initial must hold the probability of one token or more, got none")
        if transition.shape != (n, n):
            raise ValueError(
                f"transition must be square, {(n, n)} for {n} tokens, got {transition.shape}"
            )
        if _checks.concrete((initial, transition)):
            rows = np.concatenate([np.asarray(initial)[None], np.asarray(transition)])
            if np.any(rows < 0) or np.any(rows.sum(1) <= 0):
                raise ValueError(
                    "probabilities must be non-negative, with positive sums in initial and in "
                    "every row of transition"
                )
        self.log_initial = jnp.log(initial / jnp.sum(initial))
        self.log_transition = jnp.log(transition / jnp.sum(transition, axis=1, keepdims=True))
        self.length = _checks.count(length, "length")
        self.prompt = _prompt(prompt, self.length, n)
        if _checks.concrete((self.log_initial, self.log_transition, self.prompt)):
            with jax.ensure_compile_time_eval():
                if not np.all(np.isfinite(np.asarray(self.predict(self.prompt)))):
                    raise ValueError(
                        f"the prompt {np.asarray(self.prompt).tolist()} has the probability zero "
                        "under this chain"
                    )

    def _call(self, **given: Any) -> str:
        return super()._call(vocab=self.vocab, prompt=None, **given)

    @property
    def vocab(self) -> int:
        return len(self.log_initial)

    def check_times(self, times: Array) -> None:
        """Refuse, with a `ValueError`, steps of several tokens where these may have the probability
        zero together.
        """
        steps = len(times) - 1
        if not 1 < steps < self.length or not _checks.concrete(
            (self.log_initial, self.log_transition)
        ):
            return
        if np.any(np.isneginf(np.asarray(self.log_transition))):
            raise ValueError(
                f"{steps} steps for {self.length} tokens show several at once, drawn "
                "independently, and this chain has transitions of probability zero, after which no "
                f"continuation is possible: take steps={self.length}, or give all transitions some "
                "probability"
            )

    @property
    def dtype(self) -> Any:
        return self.log_initial.dtype

    def predict(self, x: Array) -> Array:
        values = jnp.arange(self.vocab, dtype=x.dtype)[None]
        allowed = jnp.where(
            (x[:, None] == values) | (x[:, None] == self.mask), 0.0, -jnp.inf
        ).astype(self.dtype)

        def forward(message: Array, evidence: Array) -> tuple[Array, Array]:
            # `message` is of this position, from all before it.
            joint = (message + evidence)[:, None] + self.log_transition
            return jax.nn.logsumexp(joint, axis=0), message

        def backward(message: Array, evidence: Array) -> tuple[Array, Array]:
            joint = (message + evidence)[None] + self.log_transition
            return jax.nn.logsumexp(joint, axis=1), message

        _, before = jax.lax.scan(forward, self.log_initial, allowed)
        _, after = jax.lax.scan(backward, jnp.zeros_like(self.log_initial), allowed, reverse=True)
        return jax.nn.softmax(before + after + allowed, axis=1)


class Logits(Masked):
    """A network as a model of tokens; built by `from_logits`."""

    net: Net
    prompt: Array
    length: int = eqx.field(static=True)
    vocab: int = eqx.field(static=True)
    batched: bool = eqx.field(static=True)
    dtype: Any = eqx.field(static=True)

    def __init__(self, net: Net, prompt: Array, vocab: int, batched: bool, dtype: Any):
        self.net, self.batched, self.dtype = net, batched, dtype
        self.prompt, self.length, self.vocab = prompt, len(prompt), vocab

    def _call(self, **given: Any) -> str:
        hidden = {"fn": self.net, "prompt": None, "dtype": None}
        return _repr.call(self, from_logits, **hidden | given)

    def predict(self, x: Array) -> Array:
        # The fraction that is shown is the network's only time.
        t = jnp.mean(x != self.mask, dtype=self.dtype)
        logits = call_network(self.net, t, x, self.denoised_shape, self.batched)
        return jax.nn.softmax(logits.astype(self.dtype), axis=-1)


def from_logits(
    fn: Callable,
    params: PyTree = None,
    *,
    length: int,
    vocab: int,
    batched: bool = False,
    prompt: Any = None,
    dtype: Any = None,
) -> Logits:
    """A model of tokens from a network that predicts the hidden ones.

    **Arguments:**

    - `fn`: `fn(t, x)`, or `fn(params, t, x)` if `params` is given: integers `(length,)`, `vocab`
      where a token is hidden, to logits `(length, vocab)`. `t` is the fraction of tokens that are
      shown.
    - `batched`: `fn` takes `t` `(B,)` and `x` `(B, length)` and returns `(B, length, vocab)`;
      particles become rows of its batch.
    - `prompt`: tokens that are known, and `vocab` elsewhere; all hidden by default.
    - `dtype`: of the probabilities, JAX's default float unless given.

    **Raises:** `ValueError` for logits of another shape or a module in training mode.
    """
    length, vocab = _checks.count(length, "length"), _checks.count(vocab, "vocab")
    dtype, batched = _checks.float_dtype(dtype, "probabilities"), _checks.flag(batched, "batched")
    return Logits(Net(fn, params), _prompt(prompt, length, vocab), vocab, batched, dtype)


def _prompt(prompt: Any, length: int, vocab: int) -> Array:
    if prompt is None:
        return jnp.full(length, vocab, jnp.int32)
    return as_tokens(prompt, "prompt", (length,), vocab)


def as_tokens(value: Any, name: str, shape: tuple[int, ...], vocab: int) -> Array:
    """States of a model of tokens, int32 of this shape: integers up to `vocab`, which hides one.
    **Raises:** `ValueError` for others.
    """
    if not isinstance(value, jax.Array):
        value = np.asarray(value) if _checks.concrete(value) else jnp.asarray(value)
    if value.shape != shape or not jnp.issubdtype(value.dtype, jnp.integer):
        raise ValueError(
            f"{name} must hold {shape[0] if len(shape) == 1 else shape} integers, {vocab} where a "
            f"token is hidden, got shape {value.shape} of {value.dtype}"
        )
    tokens = _sharding.addressable(value) if _checks.concrete(value) else np.zeros(0)
    if np.any(tokens < 0) or np.any(tokens > vocab):
        raise ValueError(
            f"tokens are integers from 0 to {vocab - 1}, {vocab} hides one, got {tokens.min()} to "
            f"{tokens.max()} in {name}"
        )
    return jnp.asarray(value).astype(jnp.int32)
