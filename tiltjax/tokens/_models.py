r"""Models for masked diffusion on tokens, where a state is a sequence of integers.

A sequence X_1 of `length` tokens out of `vocab` is masked token by token: at time t each token is
visible with probability `alpha_t = t`, and is the mask, the integer `vocab`, otherwise. A model
gives, at each position, the law of the token given all visible tokens,

    D_t(x)[i, v] = P(X_1[i] = v | visible tokens of x),      (length, vocab).

This is the posterior mean of the one-hot sequence, and thus a denoiser. It does not depend on t.
`Unmask` samples with it; a guidance tilts it.

| | |
|---|---|
| `MarkovChain(initial, transition, length)` | the exact denoiser of a Markov chain |
| `from_logits(fn, length=, vocab=)` | a network |
| `Completions(model, reward, scale, k)` | `log E[exp(scale r(X_1)) \| x]` from k completions |

Feynman-Kac steering of a token model is
`fk_steering(key, model, reward, scale=scale, num=n, guide=Completions)`. The reward takes complete
sequences of integers, without masks. References: Sahoo et al. (arXiv 2406.07524),
masked diffusion; Singhal et al. (arXiv 2501.06848), Feynman-Kac steering.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from tiltjax import _checks, _random, _repr, _sharding
from tiltjax.models import Denoiser, Net, call_network
from tiltjax.solvers import Solver
from tiltjax.tokens._unmask import Masking, Unmask


class Masked(Denoiser):
    """A model of sequences of `length` tokens, the integers below `vocab`. The integer `mask`
    stands for a hidden token.

    Subclasses define `predict(x)`, the laws of the hidden tokens.

    **Fields:** `prompt` `(length,)`: tokens that are visible from the start, and masks elsewhere.
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
        """**Raises:** `TypeError`: a token model has no interpolant."""
        raise TypeError(
            "a token model has no interpolant and no score, because tokens are masked, not noised: "
            "guide it by tokens.Completions(model, reward, scale)"
        )

    @property
    def shape(self) -> tuple[int, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return (self.length,)

    @property
    def steps(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The default number of steps: one token per step."""
        return self.length

    @property
    def state_dtype(self) -> Any:
        return jnp.int32

    @property
    def denoised_shape(self) -> tuple[int, ...]:
        return (self.length, self.vocab)

    @property
    def mask(self) -> int:
        """The integer that stands for a hidden token."""
        return self.vocab

    def predict(self, x: Array) -> Array:
        """Probabilities `(length, vocab)` at all positions given the visible tokens of `x`. The
        rows of visible positions are ignored.
        """
        raise NotImplementedError

    def denoise(self, t: Array, x: Array) -> Array:
        """The law of each token given the visible tokens of `x`, `(length, vocab)`. The law of a
        visible token is its one-hot vector.

        **Raises:** `ValueError` if `x` does not consist of `length` integers.
        """
        if x.shape != self.shape or not jnp.issubdtype(x.dtype, jnp.integer):
            raise ValueError(
                f"a state must hold {self.length} integers, with {self.mask} for a hidden token, "
                f"got {x.dtype} of shape {x.shape}"
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
        """A sequence without masks, whose hidden tokens are drawn independently."""
        drawn = _random.categorical(key, jnp.log(probabilities)).astype(x.dtype)
        return jnp.where(x == self.mask, drawn, x)


class MarkovChain(Masked):
    """The model `P(x) = initial[x_1] transition[x_1, x_2] ... ` with its exact denoiser, by forward
    and backward messages.

    **Arguments:** `initial` `(vocab,)` and the rows of `transition` `(vocab, vocab)`, probabilities
    up to a factor; `length`; `prompt` `(length,)`, integers, with `vocab` for a hidden token.

    **Raises:** `ValueError` for other shapes, negative probabilities, rows with the sum zero, and a
    prompt of probability zero.
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
        dtype = np.promote_types(initial.dtype, transition.dtype)
        initial, transition = initial.astype(dtype), transition.astype(dtype)
        n = len(initial)
        if not n:
            raise ValueError("initial must hold the probability of at least one token, got none")
        if transition.shape != (n, n):
            raise ValueError(
                f"transition must have shape {(n, n)} for {n} tokens, got {transition.shape}"
            )
        if _checks.concrete((initial, transition)):
            rows = np.concatenate([np.asarray(initial)[None], np.asarray(transition)])
            if np.any(rows < 0) or np.any(rows.sum(1) <= 0):
                raise ValueError(
                    "probabilities must be nonnegative, and initial and every row of transition "
                    "must have a positive sum"
                )
        self.log_initial = jnp.log(initial / jnp.sum(initial))
        self.log_transition = jnp.log(transition / jnp.sum(transition, axis=1, keepdims=True))
        self.length = _checks.count(length, "length")
        self.prompt = _prompt(prompt, self.length, n)
        if _checks.concrete((self.log_initial, self.log_transition, self.prompt)):
            with jax.ensure_compile_time_eval():
                if not np.all(np.isfinite(np.asarray(self.predict(self.prompt)))):
                    raise ValueError(
                        f"the prompt {np.asarray(self.prompt).tolist()} has probability zero under "
                        "this chain"
                    )

    def _call(self, **given: Any) -> str:
        return super()._call(vocab=self.vocab, prompt=None, **given)

    @property
    def vocab(self) -> int:
        return len(self.log_initial)

    def check_times(self, times: Array) -> None:
        """Raise a `ValueError` if a step draws several tokens whose combination may have
        probability zero.
        """
        steps = len(times) - 1
        if not 1 < steps < self.length or not _checks.concrete(
            (self.log_initial, self.log_transition)
        ):
            return
        if np.any(np.isneginf(np.asarray(self.log_transition))):
            raise ValueError(
                f"{steps} steps for {self.length} tokens draw several tokens at once and "
                "independently, but this chain has transitions of probability zero, so that a step "
                f"may leave no possible continuation: use steps={self.length}, or give every "
                "transition a positive probability"
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
            # `message` is the law of this position given all earlier positions.
            joint = (message + evidence)[:, None] + self.log_transition
            return jax.nn.logsumexp(joint, axis=0), message

        def backward(message: Array, evidence: Array) -> tuple[Array, Array]:
            joint = (message + evidence)[None] + self.log_transition
            return jax.nn.logsumexp(joint, axis=1), message

        _, before = jax.lax.scan(forward, self.log_initial, allowed)
        _, after = jax.lax.scan(backward, jnp.zeros_like(self.log_initial), allowed, reverse=True)
        return jax.nn.softmax(before + after + allowed, axis=1)


class Logits(Masked):
    """A network as a token model; built by `from_logits`."""

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
        # The network's time is the fraction of visible tokens.
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
    """A token model from a network that predicts the hidden tokens.

    **Arguments:**

    - `fn`: `fn(t, x)`, or `fn(params, t, x)` if `params` is given, from integers `(length,)`, with
      `vocab` for a hidden token, to logits `(length, vocab)`. `t` is the fraction of visible
      tokens.
    - `batched`: `fn` takes `t` `(B,)` and `x` `(B, length)` and returns `(B, length, vocab)`;
      particles become rows of this batch.
    - `prompt`: the visible tokens, and `vocab` elsewhere; by default all tokens are hidden.
    - `dtype`: of the probabilities, by default JAX's default float type.

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
    """States of a token model, int32 of shape `shape`, from integers up to `vocab`, which stands
    for a hidden token.

    **Raises:** `ValueError` for another shape or dtype, and for integers out of range.
    """
    if not isinstance(value, jax.Array):
        value = _checks.native(np.asarray(value)) if _checks.concrete(value) else jnp.asarray(value)
    if value.shape != shape or not jnp.issubdtype(value.dtype, jnp.integer):
        raise ValueError(
            f"{name} must hold {shape[0] if len(shape) == 1 else shape} integers, {vocab} where a "
            f"token is hidden, got shape {value.shape} of {value.dtype}"
        )
    tokens = _sharding.addressable(value) if _checks.concrete(value) else np.zeros(0)
    if np.any(tokens < 0) or np.any(tokens > vocab):
        raise ValueError(
            f"{name} must hold integers from 0 to {vocab - 1}, and {vocab} for a hidden token, got "
            f"{tokens.min()} to {tokens.max()}"
        )
    return jnp.asarray(value).astype(jnp.int32)
