r"""Training of a velocity, noise or denoising network, from data or from a sampler of data.

    X_t = alpha_t X_1 + sigma_t X_0,     L = E |network(t, X_t) - Y|^2 / d,
        t ~ time_sampler,  X_0 ~ N(0, I),  X_1 ~ data

| `target` | Y | the minimizer | for |
|---|---|---|---|
| `from_velocity` | `alpha' X_1 + sigma' X_0` | `b_t(x)` | `Linear` and similar interpolants |
| `from_noise` | `X_0` | `E[X_0 \| X_t = x]` | variance-preserving interpolants |
| `from_v` | `alpha X_0 - sigma X_1` | `v_t(x)` | variance-preserving interpolants |
| `from_denoiser` | `X_1` | `E[X_1 \| X_t = x]` | any interpolant |

The target is the function that makes a model of the network. The minimum of L is not zero but the
mean conditional variance of Y: for Gaussian data of standard deviation s and `Linear(c)` it is
`pi s c / 2` per coordinate. So compare the loss with its later values, not with zero, and judge a
network by its samples.

`tiltjax.training.minimize` minimizes L.

References: Lipman et al. (arXiv 2210.02747), flow matching.
"""

import functools
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from tiltjax import _checks, _pytree, _sharding, models
from tiltjax.interpolants import Interpolant, or_linear
from tiltjax.models import from_denoiser, from_noise, from_v, from_velocity
from tiltjax.training._checkpoints import callable_name, digest
from tiltjax.training._loop import Fit, minimize

if TYPE_CHECKING:
    import optax


def _velocity(interpolant: Interpolant, t: Array, x0: Array, x1: Array) -> Array:
    # Not through the denoiser: (x - alpha x1) / sigma divides rounding errors by sigma.
    return jax.grad(interpolant.alpha)(t) * x1 + jax.grad(interpolant.sigma)(t) * x0


_TARGETS: dict[Callable, Callable] = {
    from_velocity: _velocity,
    from_noise: lambda interpolant, t, x0, x1: x0,
    from_v: lambda interpolant, t, x0, x1: interpolant.alpha(t) * x0 - interpolant.sigma(t) * x1,
    from_denoiser: lambda interpolant, t, x0, x1: x1,
}


def uniform(key: Array) -> Array:
    """The default time of a training step, a scalar that is uniform on [0, 1)."""
    return jax.random.uniform(key)


def loss(
    network: Callable,
    key: Array,
    x1: Array,
    *,
    target: Callable = from_velocity,
    interpolant: Interpolant | None = None,
    time_sampler: Callable = uniform,
    batched: bool = False,
) -> Array:
    """The mean squared error per coordinate of a network on a batch, with one time and one draw of
    noise for each row.

    **Arguments:**

    - `network`: `network(t, x)`, as in `from_velocity`.
    - `x1`: clean states, `(n, *shape)`.
    - `target`: the quantity that the network predicts, as the function that makes a model of the
      network: `from_velocity`, `from_noise` or `from_denoiser`.
    - `interpolant`: `Linear()` by default.
    - `time_sampler`: the law of t, a function of a key. For a network that is defined only at N
      levels: `lambda key: interpolant.clock(jax.random.randint(key, (), 0, N))`.
    - `batched`: whether the network takes `t` of shape `(n,)` and `x` of shape `(n, *shape)`.

    **Raises:** `ValueError` for an output of the wrong shape, for another target, and for the
    velocity of an interpolant on which the velocity is unbounded.
    """
    _check_target(target)
    interpolant = _check_interpolant(interpolant, target, time_sampler)
    interpolant = _pytree.cast(interpolant, x1.dtype)
    key_time, key_noise = jax.random.split(key)
    t = jax.vmap(time_sampler)(jax.random.split(key_time, len(x1)))
    if t.shape != (len(x1),):
        raise ValueError(f"time_sampler must return a scalar for a key, got shape {t.shape[1:]}")
    t, x0 = t.astype(x1.dtype), jax.random.normal(key_noise, x1.shape, x1.dtype)
    state = lambda t, x0, x1: interpolant.alpha(t) * x1 + interpolant.sigma(t) * x0
    x = jax.vmap(state)(t, x0, x1)
    y = jax.vmap(functools.partial(_TARGETS[target], interpolant))(t, x0, x1)
    answer = network(t, x) if batched else jax.vmap(network)(t, x)
    if jnp.shape(answer) != x.shape:
        hint = "" if batched else " (a network that needs a batch axis needs batched=True)"
        raise ValueError(
            f"the network must return the shape of its input: expected {x.shape}, got "
            f"{jnp.shape(answer)}{hint}"
        )
    return jnp.mean((answer.astype(x.dtype) - y) ** 2)


class _Loss(eqx.Module):
    """`loss` on batches of the data, as a function of the network and a key."""

    data: Any
    interpolant: Interpolant
    time_sampler: _pytree.Function
    target: Callable = eqx.field(static=True)
    batch_size: int = eqx.field(static=True)
    batched: bool = eqx.field(static=True)
    sharding: jax.sharding.NamedSharding | None = eqx.field(static=True)

    def draw(self, key: Array) -> Array:
        """A batch of clean states."""
        if isinstance(self.data, _pytree.Function):
            return self.data(key)
        return self.data[jax.random.randint(key, (self.batch_size,), 0, len(self.data))]

    def __call__(self, network: Any, key: Array) -> Array:
        key_data, key_loss = jax.random.split(key)
        x1 = self.draw(key_data)
        if self.sharding is not None:
            x1 = jax.lax.with_sharding_constraint(x1, self.sharding)
        return loss(
            network,
            key_loss,
            x1,
            target=self.target,
            interpolant=self.interpolant,
            time_sampler=self.time_sampler,
            batched=self.batched,
        )


def fit(
    key: Array,
    network: Any,
    data: Any,
    *,
    steps: int,
    batch_size: int | None = None,
    learning_rate: float | None = None,
    optimizer: "optax.GradientTransformation | None" = None,
    ema: float = 0.999,
    target: Callable = from_velocity,
    interpolant: Interpolant | None = None,
    time_sampler: Callable = uniform,
    batched: bool = False,
    sharding: jax.sharding.NamedSharding | None = None,
    checkpoint: str | os.PathLike | None = None,
    checkpoint_every: int | None = None,
    progress: bool = False,
) -> Fit:
    """Train a network on data by `steps` steps of AdamW.

    **Arguments:**

    - `key`: determines the batches, times and noise.
    - `network`: `network(t, x)`, a Flax NNX or an Equinox module, or a function with parameters as
      `jax.tree_util.Partial(fn, params)`. The object itself is not changed. The trained arrays are
      the `nnx.Param`s of Flax modules, and all floating arrays of everything else.
    - `data`: `(n, *shape)`, finite, from which batches are drawn with replacement on the device; or
      a sampler, `key -> (batch_size, *shape)`.
    - `batch_size`: rows of a step, 256 by default for an array. A sampler sets its own batch size.
    - `learning_rate`: the maximum of the schedule in `adamw(learning_rate, steps)`, 1e-3 by
      default. Or pass `optimizer`, an optimizer of Optax, instead.
    - `ema`: the decay d of the average.
    - `target`, `interpolant`, `time_sampler`, `batched`: as in `loss`. Build the model with the
      same target and interpolant.
    - `sharding`: a `NamedSharding` of the batch axis over devices. Each device holds the parameters
      and the data. The number of devices must divide the batch.
    - `checkpoint`, `checkpoint_every`: a file. If it exists, training continues from it. It is
      written every `checkpoint_every` steps (1000 by default) and at the end, each time completely
      or not at all. A file of another run (other settings, data, initial weights or shapes) raises
      an error. Functions, and an `optimizer`, are compared only by name.
    - `progress`: show a bar with the loss.

    **Returns:** `Fit(network, average, curve)`. Use the average:
    `tj.from_velocity(fit.average, shape=...)`.

    **Raises:** `ValueError` for wrong shapes, data that is not finite, modules in training mode
    (dropout and running statistics are not supported), or a checkpoint of another run;
    `FloatingPointError` for a loss or gradient that is not finite, with the first such step.
    """
    key, batched = _checks.key(key), _checks.flag(batched, "batched")
    _check_target(target)
    interpolant = _check_interpolant(interpolant, target, time_sampler)
    _checks.function(network, "network")
    models.Net(network)  # checks the signature, and that no module is hidden in a closure
    source = _pytree.Function(data, "data") if callable(data) else _as_data(data)
    batch = _batch_of(source, key, batch_size)
    _sharding.check_sharding(sharding)
    _sharding.check_divides(sharding, batch.shape, "batch_size")
    of_data = _Loss(
        source,
        interpolant,
        _pytree.Function(time_sampler, "time_sampler"),
        target=target,
        batch_size=batch.shape[0],
        batched=batched,
        sharding=sharding,
    )
    settings = {}
    if checkpoint is not None:
        name = callable_name(data) if callable(data) else f"{len(data)} {digest(source)}"
        names = {"data": name, "time_sampler": callable_name(time_sampler)}
        settings = _settings(of_data, batch, names)
    return minimize(
        key,
        network,
        of_data,
        steps=steps,
        learning_rate=learning_rate,
        optimizer=optimizer,
        ema=ema,
        sharding=sharding,
        checkpoint=checkpoint,
        checkpoint_every=checkpoint_every,
        settings=settings,
        progress=progress,
    )


def _settings(of_data: _Loss, batch: jax.ShapeDtypeStruct, names: dict[str, str]) -> dict[str, Any]:
    """The settings that a checkpoint records about a run."""
    interpolant = of_data.interpolant
    return {
        "target": of_data.target.__name__,
        "time_sampler": names["time_sampler"],
        "batch_size": of_data.batch_size,
        "batched": of_data.batched,
        "interpolant": f"{type(interpolant).__name__} {digest(interpolant)}",
        "state": f"{batch.dtype}{batch.shape[1:]}",
        "data": names["data"],
    }


def _as_data(data: Any) -> Array:
    array = _checks.floating(data, "data")
    if array.ndim < 2 or not len(array):
        raise ValueError(
            f"data must hold states, shape (n, *shape), got {array.shape}: use x[:, None] for "
            "numbers"
        )
    bad = ~np.isfinite(np.asarray(array)).reshape(len(array), -1).all(axis=1)
    if np.any(bad):
        raise ValueError(
            f"data must be finite, but {np.sum(bad)} of {len(array)} rows are not, the first is "
            f"row {int(np.argmax(bad))}"
        )
    return array


def _batch_of(source: Any, key: Array, batch_size: int | None) -> jax.ShapeDtypeStruct:
    """The shape and dtype of a batch of the data, an array or a sampler."""
    if isinstance(source, _pytree.Function):
        batch = jax.eval_shape(source, key)
        shape = getattr(batch, "shape", ())
        if len(shape) < 2 or batch_size not in (None, shape[0]):
            rows = "batch_size" if batch_size is None else batch_size
            raise ValueError(
                f"the sampler must return states of shape ({rows}, *shape), got {batch}"
            )
    else:
        rows = _checks.count(256 if batch_size is None else batch_size, "batch_size")
        batch = jax.ShapeDtypeStruct((rows, *source.shape[1:]), source.dtype)
    _checks.state_dtype(batch.dtype)
    return batch


def _check_target(target: Callable) -> None:
    if not any(target is builder for builder in _TARGETS):
        raise ValueError(
            "target must be the function from_velocity, from_noise, from_v or from_denoiser, "
            f"got {target!r}"
        )


def _check_interpolant(
    interpolant: Interpolant | None, target: Callable, time_sampler: Callable
) -> Interpolant:
    interpolant = or_linear(interpolant)
    if target is from_velocity and time_sampler is uniform and _checks.concrete(interpolant):
        with jax.ensure_compile_time_eval():
            slope = np.asarray(jax.grad(interpolant.sigma)(jnp.ones(())))
        if not np.isfinite(slope):
            raise ValueError(
                f"the velocity of {type(interpolant).__name__} is unbounded at t = 1, so its loss "
                "has no mean: use target=from_noise, from_v or from_denoiser, or a time_sampler= "
                "that ends before 1"
            )
    return interpolant
