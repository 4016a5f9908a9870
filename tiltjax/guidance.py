r"""Guidance: estimates of `log h_t(x) = log E[exp(scale * r(X_1)) | X_t = x]` and of its gradient.

Adding `∇ log h` to the score turns a sampler of `rho` into one of the tilt `rho exp(scale * r)` (Doob's h-transform). Every
method here is a choice along four axes:

| guidance | posterior | draws | scale | gain |
|---|---|---|---|---|
| `Doob(model, log_h)` | all of it, in closed form | | | 1 |
| `PlugIn(posterior, reward, scale, k)` | any | k | any law | 1 |
| `dps(model, reward, scale)` | `Tweedie` | 1 | any law | 1 |
| `fmrg(model, reward, scale)` | `FlowMap` | 1 | any law | `2 / g_t^2` |
| `Laplace(model, reward, scale)` | a Gaussian at the denoiser | | constant | 1 |
| `Conjugate(model, reward, scale)` | see `tiltjax.conjugate` | | constant | 1 |
| `Tuned(base, tuned, weight)` | a model that was fine-tuned: see `tiltjax.annealed` | | | 1 |

and `Clipped`, `Normalized` and `Unscaled` wrap any of them, as do those of `tiltjax.wrappers`. What they sample is not the tilt, in general: `theory` says by how much.

A guidance is called as `guidance(key, t, x, state) -> (Estimate, state)` for one sample. One call returns everything
that shares network evaluations and draws; what moves a sampler is the tilted denoiser

    D~_t(x) = E[X_1 | X_t = x] under the tilt = D_t(x) + (sigma_t^2 / alpha_t) ∇ log h_t(x).

`log_tilt(x1)` is the exact `scale * r(x1)` at the data end; `final(x1, state)` is what weighted paths are completed to, the same unless the target
is not a reward's tilt.

References: Dandapanthula and Boffi (arXiv 2606.02884); Chung et al. (arXiv 2209.14687, DPS); FMRG is the unscaled
flow-map guidance analysed in the first.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from tiltjax import inputs, linalg, rewards, scales
from tiltjax.interpolants import Interpolant, seen
from tiltjax.models import Model
from tiltjax.posteriors import FlowMap, Posterior, Tweedie
from tiltjax.solvers import Solver


class Estimate(NamedTuple):
    """What one call of a guidance knows of a state `x` at time `t`.

    - `tilted`: the estimate of the tilted denoiser `D~_t(x)`, of the shape of `x`.
    - `denoised`: the unguided `D_t(x)`, or `None` if the guidance has no need of it (it would cost one more network call).
    - `log_h`: the estimate of `log h_t(x)`, a scalar, or `None` if the guidance only proposes.

    **Raises:** `ValueError` where a score is asked of an estimate without `denoised`.
    """

    tilted: Array
    denoised: Array | None = None
    log_h: Array | None = None

    @classmethod
    def from_score(
        cls, interpolant: Interpolant, t: Array, denoised: Array, log_h: Array | None, score: Array
    ) -> "Estimate":
        """An estimate from `score`, that of `∇ log h_t(x)`; `t > 0`."""
        return cls(denoised + interpolant.tweedie(t) * score, denoised, log_h)

    def score(self, interpolant: Interpolant, t: Array) -> Array:
        """`∇ log h_t(x)`. **Raises:** as `pull`."""
        return self.pull() / interpolant.tweedie(t)

    def pull(self) -> Array:
        """`D~ - D`. **Raises:** `ValueError` where the unguided denoiser is not known."""
        if self.denoised is None:
            raise ValueError("this guidance gives the tilted denoiser alone: the unguided one is needed for a score")
        return self.tilted - self.denoised


class Guidance(eqx.Module):
    """An estimator of the tilt's h-function.

    Subclasses define `__call__`, `log_tilt` and `model`, the one they guide; `init` if they have memory; and, if the memory is the path's own
    history rather than a warm start, `follows`, `final` and `check_run`.
    """

    model: eqx.AbstractVar[Model]

    @property
    def follows(self) -> bool:
        """Whether the memory has to see every state of a path: `smc` then asks at each, also where nothing is weighed."""
        return False

    def init(self, x: Array) -> Any:
        """The memory carried along one trajectory, `()` for most."""
        return ()

    def __call__(self, key: Array, t: Array, x: Array, state: Any) -> tuple[Estimate, Any]:
        raise NotImplementedError

    def log_tilt(self, x1: Array) -> Array:
        """`scale * r(x1)`, exactly: what `log h` is at t = 1."""
        raise NotImplementedError

    def final(self, x1: Array, state: Any) -> Array:
        """What all log-potentials of a path add up to that ends at `x1`, `state` being the memory of its last look: `log_tilt(x1)`."""
        return self.log_tilt(x1)

    def check_run(self, times: Array, weighs: Solver | None = None) -> None:
        """Refuse, with a `ValueError`, times or a noise that do not suit; `weighs` is the solver of a weighted run, `None` in `sample`."""


def check(guidance: Guidance, model: Model, name: str = "guidance") -> None:
    """Refuse what is no guidance of this model."""
    inputs.instance(guidance, Guidance, name, "use PlugIn, Conjugate, Laplace, Doob, dps or fmrg")
    if not inputs.same(guidance.model, model):
        raise ValueError(
            f"the {name} is built on another model ({type(guidance.model).__name__}) than the one to sample "
            f"({type(model).__name__}): build it on the same model object"
        )


def check_start(model: Model, times: Array) -> None:
    """Refuse to guide from where nothing of the data is seen: a pull is `sigma^2 / alpha` times a score."""
    if model.tokens or not inputs.concrete((times, model.interpolant)):
        return
    if seen(model.interpolant, np.asarray(times)[0], model.dtype)[0] == 0:
        raise ValueError("a guided run must start at t > 0 (its gain sigma^2 / alpha is infinite at t = 0): try 1e-3")


def failures(x: Array, estimate: Estimate) -> Array:
    """Which of `particles.CULPRITS` an estimate at a state shows, `(5,)`: a state that is not finite explains everything after it."""
    unguided = estimate.tilted if estimate.denoised is None else estimate.denoised
    finite = lambda value: jnp.all(jnp.isfinite(value))
    # -inf is a value like any other: a constraint that is violated.
    log_h = jnp.ones((), bool) if estimate.log_h is None else estimate.log_h < jnp.inf
    return jnp.stack([
        finite(x) & ~finite(unguided), finite(x) & ~log_h, finite(x) & ~finite(estimate.tilted), ~finite(x), jnp.zeros((), bool)
    ])  # fmt: skip


class Doob(Guidance):
    """The exact h-function, where it is known: the guided flow samples the tilt itself.

    **Arguments:** `model`; `log_h(t, x) -> scalar`, differentiable in x and valid up to t = 1, such as
    `theory.log_h(prior, reward, scale)`.

    **Raises:** `ValueError` for a `log_h` of another path. Source: Doob (1957).
    """

    model: Model
    log_h: inputs.Function

    def __init__(self, model: Model, log_h: Callable):
        inputs.instance(model, Model, "model", "Doob(model, log_h)")
        path = getattr(log_h, "interpolant", model.interpolant)
        if inputs.concrete((path, model.interpolant)) and not inputs.same(path, model.interpolant):
            raise ValueError(
                f"log_h belongs to the path {path}, the model to {model.interpolant}: give both the same one"
            )
        self.model = model
        self.log_h = inputs.Function(log_h, "log_h")

    def __call__(self, key: Array, t: Array, x: Array, state: Any) -> tuple[Estimate, Any]:
        log_h, score = jax.value_and_grad(self.log_h, argnums=1)(t, x)
        return Estimate.from_score(self.model.interpolant, t, self.model.denoise(t, x), log_h, score), state

    def log_tilt(self, x1: Array) -> Array:
        return self.log_h(jnp.ones((), x1.dtype), x1)


class PlugIn(Guidance):
    """`h^(x) = (1/k) sum_i exp(lambda_t r(X_1^(i)(x)))` with k fresh posterior draws, differentiated through the draws.

    The estimator in common use. Its gradient is that of a softmax over draws, so for small k it follows the reward of
    typical draws instead of the tilt: it overshoots the reward's maximiser and loses spread (`theory.plug_in_law`), and
    it cannot choose between modes. Bias of order 1/k; the damped scale removes it at k = 1 for one Gaussian.

    **Arguments:** `posterior`; `reward`, any function of one sample; `scale`, a number or a law; `k >= 1` draws, where one is enough of
    a point like `Tweedie`.

    **Raises:** `TypeError` for what is no posterior, `ValueError` for `k < 1`. Source: Dandapanthula and Boffi (arXiv 2606.02884).
    """

    posterior: Posterior
    reward: rewards.Reward
    scale: scales.Scale
    k: int = eqx.field(static=True)

    def __init__(
        self, posterior: Posterior, reward: Callable, scale: float | Array | scales.Scale = 1.0, *, k: int = 1
    ):
        inputs.instance(posterior, Posterior, "posterior", "use Glass(model), Exact(model) or Tweedie(model)")
        self.posterior = posterior
        self.reward = rewards.as_reward(reward)
        self.scale = scales.as_scale(scale)
        self.k = inputs.count(k, "k")

    @property
    def model(self) -> Model:
        return self.posterior.model

    def __call__(self, key: Array, t: Array, x: Array, state: Any) -> tuple[Estimate, Any]:
        path = self.model.interpolant
        # Apart, not split: a law that draws nothing has its key never hashed.
        key_scale, key_draws = jax.random.fold_in(key, 0), jax.random.fold_in(key, 1)
        scale = self.scale(key_scale, path.snr(t), t, jax.lax.stop_gradient(x))

        def log_h(x: Array) -> tuple[Array, Array]:
            # Of the network, the step needs D(x) and a draw may: one call serves both, and the gradient of the draw.
            denoised = self.model.denoise(t, x)
            draws = self.posterior.draws(key_draws, t, x, self.k, denoised)
            tilts = jax.vmap(lambda x1: scale * rewards.value(self.reward, x1))(draws)
            return jax.nn.logsumexp(tilts) - jnp.log(self.k), denoised

        (value, denoised), score = jax.value_and_grad(log_h, has_aux=True)(x)
        return Estimate.from_score(path, t, denoised, value, score), state

    def log_tilt(self, x1: Array) -> Array:
        return self.scale.final * self.reward(x1)


class Laplace(Guidance):
    r"""Laplace's approximation of h at the denoiser, from the model's own posterior covariance.

    With `m = D_t(x)`, `J = ∂D/∂x`, `P = (sigma^2 / alpha) J` (Tweedie's second identity; symmetrised, as a learned Jacobian is
    not) and the curvature `H = -∇^2 r(m)`,

        log h = scale r(m) - logdet(I + scale P H) / 2 + scale^2 g^T (I + scale P H)^-1 P g / 2,    g = ∇r(m)
        score = J^T (I + scale H P)^-1 scale g,

    the score with J and H held fixed: differentiating through them is worse. Exact for a Gaussian prior and a concave
    quadratic reward, whatever their matrices; on mixtures it beats any scalar damping. Convex directions of the reward
    are taken as flat (H is projected onto the positive semi-definite cone), without which the integral may diverge; directions
    in which a learned Jacobian says that P is negative are taken as known (`linalg.square_root`).

    Costs one denoiser call and d pullbacks through it for states of size d: for low-dimensional states.

    **Arguments:** `model`; `reward`, twice differentiable; `scale >= 0`.
    """

    model: Model
    reward: rewards.Reward
    scale: Array

    def __init__(self, model: Model, reward: Callable, scale: float | Array = 1.0):
        inputs.instance(model, Model, "model", "Laplace(model, reward, scale)")
        self.model = model
        self.reward = rewards.as_reward(reward)
        self.scale = inputs.nonnegative(scale, "scale")

    def __call__(self, key: Array, t: Array, x: Array, state: Any) -> tuple[Estimate, Any]:
        shape, size = x.shape, x.size
        denoise = lambda x: self.model.denoise(t, x.reshape(shape)).reshape(size)
        reward = lambda m: rewards.value(self.reward, m.reshape(shape))

        mean, pullback = jax.vjp(denoise, x.reshape(size))
        jacobian = jax.vmap(lambda row: pullback(row)[0])(jnp.eye(size, dtype=x.dtype))
        tweedie = self.model.interpolant.tweedie(t)
        root_cov = linalg.square_root(tweedie * (jacobian + jacobian.T) / 2)
        cov = root_cov @ root_cov.T

        value, gradient = jax.value_and_grad(reward)(mean)
        # root root^T = H: then I + root^T P root is symmetric, which I + H P is not.
        root = linalg.square_root(linalg.spectral(jax.nn.relu, -jax.hessian(reward)(mean)))
        factor = linalg.cholesky(jnp.eye(size, dtype=x.dtype) + self.scale * root.T @ cov @ root)
        solved = jnp.asarray(linalg.back_solve(factor, linalg.half_solve(factor, root.T @ cov @ gradient)))
        damped = self.scale * (gradient - self.scale * root @ solved)
        log_h = self.scale * value - linalg.half_logdet(factor) + self.scale * damped @ cov @ gradient / 2
        # tweedie * J^T damped, with the symmetrised Jacobian already in cov.
        return Estimate((mean + tweedie * jacobian.T @ damped).reshape(shape), mean.reshape(shape), log_h), state

    def log_tilt(self, x1: Array) -> Array:
        return self.scale * self.reward(x1)


class Wrapper(Guidance):
    """A guidance whose score is multiplied by a factor and everything else kept."""

    guidance: eqx.AbstractVar[Guidance]

    def __check_init__(self) -> None:
        inputs.instance(self.guidance, Guidance, "guidance", f"{type(self).__name__} wraps one, such as PlugIn")

    @property
    def model(self) -> Model:
        return self.guidance.model

    def init(self, x: Array) -> Any:
        return self.guidance.init(x)

    @property
    def follows(self) -> bool:
        return self.guidance.follows

    def log_tilt(self, x1: Array) -> Array:
        return self.guidance.log_tilt(x1)

    def final(self, x1: Array, state: Any) -> Array:
        return self.guidance.final(x1, state)

    def check_run(self, times: Array, weighs: Solver | None = None) -> None:
        self.guidance.check_run(times, weighs)

    def factor(self, t: Array, estimate: Estimate) -> Array:
        raise NotImplementedError

    def to_length(self, t: Array, estimate: Estimate, length: Array) -> Array:
        """The factor that brings the score to a length; 1 where it is zero, with a finite derivative there."""
        score = estimate.score(self.model.interpolant, t)
        square = linalg.inner(score, score)
        return jnp.where(square > 0, length * jax.lax.rsqrt(jnp.where(square > 0, square, 1.0)), 1.0)

    def __call__(self, key: Array, t: Array, x: Array, state: Any) -> tuple[Estimate, Any]:
        estimate, state = self.guidance(key, t, x, state)
        extra = (self.factor(t, estimate) - 1) * estimate.pull()
        return estimate._replace(tilted=estimate.tilted + extra), state


class Clipped(Wrapper):
    """`guidance` with its score shortened to the length `limit` where it is longer. A deviation from the mathematics."""

    guidance: Guidance
    limit: Array

    def __init__(self, guidance: Guidance, limit: float | Array):
        self.guidance = guidance
        self.limit = inputs.positive(limit, "limit")

    def factor(self, t: Array, estimate: Estimate) -> Array:
        return jnp.minimum(self.to_length(t, estimate, self.limit), 1.0)


class Normalized(Wrapper):
    """`guidance` with its score brought to the length `length`, whatever it was. A deviation from the mathematics.

    What published pipelines do to make a reward's scale inert: the estimate of `∇ log h` keeps its direction only. A zero stays zero.
    """

    guidance: Guidance
    length: Array

    def __init__(self, guidance: Guidance, length: float | Array):
        self.guidance = guidance
        self.length = inputs.positive(length, "length")

    def factor(self, t: Array, estimate: Estimate) -> Array:
        return self.to_length(t, estimate, self.length)


class Unscaled(Wrapper):
    """`guidance` whose `∇ log h` enters the flow's drift as it is, without the factor `g_t^2 / 2` that tilting requires.

    **Arguments:** `guidance`, any that knows its unguided denoiser.
    """

    guidance: Guidance

    def __init__(self, guidance: Guidance):
        self.guidance = guidance

    def factor(self, t: Array, estimate: Estimate) -> Array:
        return 2 / self.model.interpolant.diffusion(t)


def dps(model: Model, reward: Callable, scale: float | Array | scales.Scale = 1.0) -> PlugIn:
    """Diffusion posterior sampling: `log h = scale * r(D_t(x))`, the plug-in at the posterior's mean.

    In the drift form `(g_t^2 / 2) scale ∇ r(D_t(x))`. For one Gaussian and a quadratic reward it has the law of `PlugIn`
    with k = 1, for anything else it has not.

    Source: Chung et al. (arXiv 2209.14687).
    """
    return PlugIn(Tweedie(model), reward, scale)


def fmrg(model: Model, reward: Callable, scale: float | Array | scales.Scale = 1.0, *, steps: int = 20) -> Unscaled:
    """Flow-map reward guidance: the drift `b_t + scale ∇ r(X_{t,1}(x))`, `X_{t,1}` the flow's own end-point.

    The gradient is not multiplied by `g_t^2 / 2`, so it is no h-transform; what it samples for one Gaussian is
    `theory.fmrg_law`. **Arguments:** as in `PlugIn`; `steps` of the inner `FlowMap`.

    Source: Dandapanthula and Boffi (arXiv 2606.02884).
    """
    return Unscaled(PlugIn(FlowMap(model, steps), reward, scale))
