r"""Masked diffusion on tokens: the same verbs, where a state is a sequence of integers.

A sequence X_1 of `length` tokens out of `vocab` is hidden token by token: at time t each is known with chance `alpha_t = t`, and shows the
mask, the integer `vocab`, otherwise. What a model knows is, position by position, the law of the token given all that is shown,

    D_t(x)[i, v] = P(X_1[i] = v | what x shows),      (length, vocab):

the posterior mean of the one-hot sequence, and thus a denoiser. It does not depend on t. `Unmask` follows it; a guidance tilts it.

| | |
|---|---|
| `MarkovChain(initial, transition, length)` | the exact denoiser of a Markov chain |
| `from_logits(fn, length=, vocab=)` | a network |
| `Completions(model, reward, scale, k)` | `log E[exp(scale r(X_1)) \| x]` from k completions, drawn position by position; no gradients |

Feynman-Kac steering of a token model is `smc(key, model, Completions(model, reward, scale), num=n, **fk_steering(schedule=Every(1)))`
(the published window is for a hundred steps and more); the reward sees whole sequences of integers, without masks. References: Sahoo et al. (arXiv 2406.07524, masked diffusion); Singhal et al. (arXiv 2501.06848).
"""

import math
from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from tiltjax import inputs, rewards
from tiltjax.guidance import Estimate, Guidance
from tiltjax.interpolants import Interpolant
from tiltjax.models import Model
from tiltjax.nets import Net, ask
from tiltjax.particles import as_tokens


class Hiding(Interpolant):
    """The path of hidden tokens: shown with chance `alpha_t = t`, and no noise."""

    def alpha(self, t: Array) -> Array:
        return t

    def sigma(self, t: Array) -> Array:
        raise TypeError(
            "tokens are hidden, not noised: a model of tokens has no score, no velocity and no gradient. The guidance for it is "
            "Completions(model, reward, scale), the solver Unmask()"
        )

    def time(self, snr: Array) -> Array:
        return self.sigma(snr)


class Masked(Model):
    """A model of sequences of `length` tokens, the integers below `vocab`; `mask` is that which hides one.

    Subclasses define `predict(x)`, the laws of the hidden tokens. **Fields:** `prompt` `(length,)`: tokens that are given from the start,
    and masks elsewhere.
    """

    length: eqx.AbstractVar[int]
    vocab: eqx.AbstractVar[int]
    prompt: eqx.AbstractVar[Array]
    dtype: eqx.AbstractVar[Any]

    tokens: ClassVar[bool] = True

    @property
    def interpolant(self) -> Interpolant:  # pyright: ignore[reportIncompatibleVariableOverride]
        return Hiding()

    @property
    def shape(self) -> tuple[int, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return (self.length,)

    @property
    def steps(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """One at a time."""
        return self.length

    @property
    def denoised_shape(self) -> tuple[int, ...]:
        return (self.length, self.vocab)

    @property
    def mask(self) -> int:
        """The integer that hides a token."""
        return self.vocab

    def predict(self, x: Array) -> Array:
        """Probabilities `(length, vocab)` of all positions given the tokens that `x` shows; what is said of known positions is ignored."""
        raise NotImplementedError

    def denoise(self, t: Array, x: Array) -> Array:
        """The law of each token given what `x` shows, `(length, vocab)`; that of a known one is certain.

        **Raises:** `ValueError` where `x` is not `length` integers.
        """
        if x.shape != self.shape or not jnp.issubdtype(x.dtype, jnp.integer):
            raise ValueError(
                f"a state is {self.length} integers, {self.mask} where one is hidden, got {x.dtype} of shape {x.shape}"
            )
        known = jax.nn.one_hot(x, self.vocab, dtype=self.dtype)
        return jnp.where((x == self.mask)[:, None], self.predict(x).astype(self.dtype), known)

    def initial(self, key: Array, t: Array) -> Array:
        return self.prompt

    def grid(self, steps: int) -> Array:
        """Equal steps on [0, 1]."""
        return jnp.linspace(0.0, 1.0, inputs.count(steps, "steps") + 1)

    def check_start(self, t: Array) -> None:
        """A run may start at any time: hidden tokens are hidden whenever."""

    def check_times(self, times: Array) -> None:
        """A model of tokens does not depend on the time."""

    def complete(self, key: Array, x: Array, probabilities: Array) -> Array:
        """A sequence without masks: the hidden tokens drawn independently of each other."""
        drawn = jax.random.categorical(key, jnp.log(probabilities)).astype(x.dtype)
        return jnp.where(x == self.mask, drawn, x)


class MarkovChain(Masked):
    """`P(x) = initial[x_1] transition[x_1, x_2] ... `, with its exact denoiser, by passing messages forth and back.

    **Arguments:** `initial` `(vocab,)` and the rows of `transition` `(vocab, vocab)`: probabilities, normalised here; `length`; `prompt`
    `(length,)`, integers up to `vocab`, which hides.
    """

    log_initial: Array
    log_transition: Array
    prompt: Array
    length: int = eqx.field(static=True)

    def __init__(self, initial: inputs.Numbers, transition: inputs.Numbers, length: int, *, prompt: Any = None):
        initial, transition = inputs.finite(initial, "initial", 1), inputs.finite(transition, "transition", 2)
        n = len(initial)
        if not n:
            raise ValueError("initial must hold the probability of one token or more, got none")
        if transition.shape != (n, n):
            raise ValueError(f"transition must be square, {(n, n)} for {n} tokens, got {transition.shape}")
        if inputs.concrete((initial, transition)):
            rows = np.concatenate([np.asarray(initial)[None], np.asarray(transition)])
            if np.any(rows < 0) or np.any(rows.sum(1) <= 0):
                raise ValueError(
                    "probabilities must be non-negative, with positive sums in initial and in every row of transition"
                )
        self.log_initial = jnp.log(initial / jnp.sum(initial))
        self.log_transition = jnp.log(transition / jnp.sum(transition, axis=1, keepdims=True))
        self.length = inputs.count(length, "length")
        self.prompt = _prompt(prompt, self.length, n)
        if inputs.concrete((self.log_initial, self.log_transition, self.prompt)):
            with jax.ensure_compile_time_eval():
                if not np.all(np.isfinite(np.asarray(self.predict(self.prompt)))):
                    raise ValueError(
                        f"this chain gives its prompt {np.asarray(self.prompt).tolist()} the probability zero"
                    )

    @property
    def vocab(self) -> int:
        return len(self.log_initial)

    def check_times(self, times: Array) -> None:
        """Refuse, with a `ValueError`, steps of several tokens where these may have the probability zero together."""
        steps = len(times) - 1
        if not 1 < steps < self.length or not inputs.concrete((self.log_initial, self.log_transition)):
            return
        if np.any(np.isneginf(np.asarray(self.log_transition))):
            raise ValueError(
                f"{steps} steps for {self.length} tokens show several at once, drawn independently, and this chain has transitions of "
                f"probability zero, after which it knows nothing: take steps={self.length}, or give all transitions some probability"
            )

    @property
    def dtype(self) -> Any:
        return self.log_initial.dtype

    def predict(self, x: Array) -> Array:
        values = jnp.arange(self.vocab, dtype=x.dtype)[None]
        allowed = jnp.where((x[:, None] == values) | (x[:, None] == self.mask), 0.0, -jnp.inf).astype(self.dtype)

        def forth(message: Array, seen: Array) -> tuple[Array, Array]:
            # `message` is of this position, from all before it.
            return jax.nn.logsumexp((message + seen)[:, None] + self.log_transition, axis=0), message

        def back(message: Array, seen: Array) -> tuple[Array, Array]:
            return jax.nn.logsumexp((message + seen)[None] + self.log_transition, axis=1), message

        _, before = jax.lax.scan(forth, self.log_initial, allowed)
        _, after = jax.lax.scan(back, jnp.zeros_like(self.log_initial), allowed, reverse=True)
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
        self.net, self.prompt, self.length, self.vocab = net, prompt, len(prompt), vocab
        self.batched, self.dtype = batched, dtype

    def predict(self, x: Array) -> Array:
        # How much is shown is the network's only clock.
        t = jnp.mean(x != self.mask, dtype=self.dtype)
        logits = ask(self.net, t, x, self.denoised_shape, self.batched)
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

    - `fn`: `fn(t, x)`, or `fn(params, t, x)` if `params` is given: integers `(length,)`, `vocab` where a token is hidden, to logits
      `(length, vocab)`. `t` is the share of tokens that are shown.
    - `batched`: `fn` takes `t` `(B,)` and `x` `(B, length)` and answers `(B, length, vocab)`; particles become rows of its batch.
    - `prompt`: tokens that are given, and `vocab` elsewhere; all hidden by default.
    - `dtype`: of the probabilities, JAX's default float unless given.

    **Raises:** `ValueError` for an answer of another shape or a module in training mode.
    """
    length, vocab = inputs.count(length, "length"), inputs.count(vocab, "vocab")
    dtype, batched = inputs.float_dtype(dtype, "probabilities"), inputs.flag(batched, "batched")
    return Logits(Net(fn, params), _prompt(prompt, length, vocab), vocab, batched, dtype)


class Completions(Guidance):
    """`log h` as the mean of `exp(scale r)` over `k` completions, each position drawn by itself; gradient-free.

    With `lean` > 0 it also proposes (`Guided()`): the tilted denoiser is the mixture, in shares `1 - lean` and `lean`, of the model's and of the
    completions weighed by `exp(scale r)`, which is the posterior mean of the tilt as far as k draws know it.

    **Arguments:** `model`, of tokens; `reward(x1) -> scalar` of integers `(length,)`; `scale`; `k`; `lean` in [0, 1): at 1 tokens that no
    completion has could never be proposed.

    **Raises:** `ValueError` for a `lean` outside [0, 1); `TypeError` for what is no model of tokens.
    """

    model: Masked
    reward: rewards.Reward
    scale: Array
    lean: Array
    k: int = eqx.field(static=True)

    def __init__(
        self, model: Masked, reward: Callable, scale: float | Array = 1.0, *, k: int = 4, lean: float | Array = 0.0
    ):
        inputs.instance(model, Masked, "model", "a model of tokens: MarkovChain or from_logits")
        self.model = model
        self.reward = rewards.as_reward(reward)
        self.scale = inputs.finite(scale, "scale", 0)
        self.lean = inputs.nonnegative(lean, "lean")
        if inputs.concrete(self.lean) and not np.asarray(self.lean) < 1:
            raise ValueError(f"lean must lie in [0, 1), so that every token may be proposed, got {float(self.lean):g}")
        self.k = inputs.count(k, "k")

    def __call__(self, key: Array, t: Array, x: Array, state: Any) -> tuple[Estimate, Any]:
        denoised = self.model.denoise(t, x)
        drawn = jax.vmap(lambda key: self.model.complete(key, x, denoised))(jax.random.split(key, self.k))
        values = jax.vmap(self.log_tilt)(drawn)
        log_h = jax.nn.logsumexp(values) - math.log(self.k)
        # Where every completion is excluded none is preferred.
        weights = jax.nn.softmax(jnp.where(log_h > -jnp.inf, values, 0.0))
        preferred = jnp.einsum("k,kiv->iv", weights, jax.nn.one_hot(drawn, self.model.vocab, dtype=weights.dtype))
        pull = self.lean.astype(denoised.dtype) * (preferred.astype(denoised.dtype) - denoised)
        return Estimate(denoised + pull, denoised, log_h), state

    def log_tilt(self, x1: Array) -> Array:
        value = rewards.value(self.reward, x1)
        return self.scale.astype(value.dtype) * value


def _prompt(prompt: Any, length: int, vocab: int) -> Array:
    if prompt is None:
        return jnp.full(length, vocab, jnp.int32)
    return as_tokens(prompt, "prompt", (length,), vocab)
