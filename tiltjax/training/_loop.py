r"""Stochastic gradient descent: minimize the mean of a random loss of a network.

One step computes the gradient, clipped to a global norm, takes a step of Adam with decoupled weight
decay, and updates the average

    a_{k+1} = a_k + (1 - d_k) (w_{k+1} - a_k),     d_k = min(d, (1 + k) / (10 + k)),

The average has a short memory at first, so that it forgets the initial weights. The randomness of
step k is a function only of the key and of k, and all steps are one compiled program. Therefore
neither the number of steps in one dispatch nor a restart from a checkpoint changes any bit of the
result, on one device and with one version of the compiler.

`fit` minimizes the loss of a network on data, `finetune` the loss of a model with a reward, and
`minimize` any other loss. References: Loshchilov and Hutter (arXiv 1608.03983, 1711.05101), cosine
schedules and AdamW; Polyak and Juditsky (1992), averages of weights.
"""

import functools
import math
import operator
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from tiltjax import _callbacks, _checks, _progress, _pytree, _repr, _sharding
from tiltjax.training._checkpoints import callable_name, digest, read_checkpoint, write_checkpoint
from tiltjax.training._parameters import Template, split_parameters

if TYPE_CHECKING:
    import optax

_MAX_STEPS = 1024  # of one dispatch
_DISPATCH = 0.25  # target time of one dispatch, in seconds


def schedule(learning_rate: float, steps: int, warmup: int) -> Callable:
    """The learning rate as a function of the step: `warmup` equal increases up to `learning_rate`,
    from a first rate above zero, then a half cosine down to 0 at `steps`.
    """
    import optax

    rise = optax.linear_schedule(learning_rate / max(warmup, 1), learning_rate, warmup - 1)
    fall = optax.cosine_decay_schedule(learning_rate, max(steps - warmup, 1))
    return optax.join_schedules([rise, fall], [warmup])


def adamw(
    learning_rate: float,
    steps: int,
    *,
    warmup: int | None = None,
    clip: float = 1.0,
    weight_decay: float = 0.0,
) -> "optax.GradientTransformation":
    """The optimizer: gradients clipped to the global norm `clip`, then AdamW with the learning
    rates `schedule(learning_rate, steps, warmup)`.

    **Arguments:** `warmup`, a twentieth of `steps` by default; `weight_decay`, of matrices and
    kernels, not of biases and gains.

    **Raises:** `ValueError`, `TypeError` for numbers out of range. Source: Loshchilov and Hutter
    (arXiv 1711.05101).
    """
    import optax

    steps = _checks.count(steps, "steps")
    warmup = steps // 20 if warmup is None else operator.index(warmup)
    _checks.number(warmup, "warmup", 0, steps)
    learning_rate = _checks.number(learning_rate, "learning_rate", 0, math.inf, closed="neither")
    clip = _checks.number(clip, "clip", 0, math.inf, closed="neither")
    weight_decay = _checks.number(weight_decay, "weight_decay", 0, math.inf, closed="left")

    matrices = lambda parameters: jax.tree.map(lambda leaf: leaf.ndim > 1, parameters)
    rates = schedule(learning_rate, steps, warmup)
    step = optax.adamw(rates, weight_decay=weight_decay, mask=matrices)
    return optax.chain(optax.clip_by_global_norm(clip), step)


# Equal arguments give the same object, because the compiled program depends on the optimizer
# object, and a new seed must not compile it again.
_adamw = functools.lru_cache(maxsize=16)(adamw)


class Curve(NamedTuple):
    """The `loss` and the global `norm` of its gradient at each step, before the update and before
    clipping, `(steps,)` each.
    """

    loss: np.ndarray
    norm: np.ndarray

    def plot(self, ax: Any) -> None:
        """Draw the loss on Matplotlib axes: each step, and means over hundredths of the run."""
        window = max(len(self.loss) // 100, 1)
        whole = len(self.loss) // window
        means = self.loss[: whole * window].reshape(whole, window).mean(axis=1)
        ax.plot(np.arange(len(self.loss)) + 1, self.loss, color="#BDBDBD", linewidth=0.5)
        ax.plot((np.arange(whole) + 0.5) * window + 0.5, means, color="#0072B2", linewidth=1.5)
        # A loss on data is positive. Minus an objective may be negative, which a logarithmic axis
        # would hide.
        ax.set(xlabel="step", ylabel="loss", yscale="log" if np.all(self.loss > 0) else "linear")


class Fit(NamedTuple):
    """The result of training, by `minimize`, `fit` or `finetune`: the `network` after the last
    step, the `average` of its weights over the steps (the network to use), and the `curve`.
    """

    network: Any
    average: Any
    curve: Curve

    def __repr__(self) -> str:
        losses = np.asarray(self.curve.loss)
        ends = f", loss {losses[0]:.4g} to {losses[-1]:.4g}" if len(losses) else ""
        name = _repr.network(type(self.network).__name__, self.network)
        return f"Fit: {name}, {len(losses)} steps{ends}"


class _State(eqx.Module):
    """The state between steps: the weights w, their average a, and Adam's moments."""

    parameters: dict[str, Array]
    average: dict[str, Array]
    optimizer: Any


class _Setup(eqx.Module):
    """The data that all steps share. Arrays are arguments of the compiled program; everything else
    is a static part of it.
    """

    key: Array
    template: Template
    loss: Any
    ema: Array
    optimizer: "optax.GradientTransformation" = eqx.field(static=True)
    sharding: jax.sharding.NamedSharding | None = eqx.field(static=True)

    def start(self, parameters: dict[str, Array]) -> _State:
        """The state before the first step."""
        copy = functools.partial(jax.tree.map, jnp.copy)
        return _State(copy(parameters), copy(parameters), self.optimizer.init(parameters))

    def loss_of(self, parameters: dict[str, Array], k: Array) -> Array:
        """The loss of step k, whose randomness is a function only of the key and of k."""
        return self.loss(self.template.merge(parameters), jax.random.fold_in(self.key, k))

    def decay(self, k: Array) -> Array:
        """The decay `d_k`."""
        count = k.astype(jnp.float32)
        return jnp.minimum(self.ema, (1 + count) / (10 + count))

    def replicated(self, tree: Any) -> Any:
        """The tree with its arrays on every device of the mesh."""
        if self.sharding is None:
            return tree
        return _sharding.placed(tree, _sharding.replicated(self.sharding))


class _Checkpoints(NamedTuple):
    """The file and the interval of a run's checkpoints. Without a `file` none are written."""

    file: str | os.PathLike | None
    every: int
    sharding: jax.sharding.NamedSharding | None
    header: dict[str, Any]

    def read(self, start: Any) -> tuple[Any, int]:
        """The state from which the run continues, `start` or that of the file, and the
        steps done.
        """
        if self.file is None:
            return start, 0
        found = Path(self.file).exists()
        tree, done = read_checkpoint(self.file, self.header, start) if found else (start, 0)
        self.synchronize(done)
        return tree, done

    def next_stop(self, done: int) -> float:
        """The next step after `done` at which a checkpoint is due."""
        return math.inf if self.file is None else done - done % self.every + self.every

    def write(self, tree: Any, done: int, steps: int) -> None:
        """Write a checkpoint, if one is due after `done` of `steps` steps."""
        # All hosts hold the same values and share the folder, so one host writes.
        if _over_hosts(self.sharding) and jax.process_index() > 0:
            return
        if self.file is not None and (done % self.every == 0 or done == steps):
            write_checkpoint(self.file, self.header, tree, done)

    def synchronize(self, done: int) -> None:
        """Wait for all hosts. Raise a `RuntimeError` if they would continue from different steps,
        because they would then wait for each other forever.
        """
        if self.file is None or not _over_hosts(self.sharding):
            return
        from jax.experimental import multihost_utils

        found = np.ravel(multihost_utils.process_allgather(np.int32(done)))
        if np.any(found != done):
            raise RuntimeError(
                f"hosts found {self.file} at different steps, {found.tolist()}: use a file in a "
                "folder that all hosts share"
            )


def minimize(
    key: Array,
    network: Any,
    loss: Callable | eqx.Module,
    *,
    steps: int,
    learning_rate: float | None = None,
    optimizer: "optax.GradientTransformation | None" = None,
    ema: float = 0.999,
    sharding: jax.sharding.NamedSharding | None = None,
    checkpoint: str | os.PathLike | None = None,
    checkpoint_every: int | None = None,
    settings: dict[str, Any] | None = None,
    progress: bool = False,
) -> Fit:
    """Minimize the mean of a random loss by `steps` steps of AdamW.

    **Arguments:**

    - `key`: determines all randomness.
    - `network`: a Flax NNX or an Equinox module, a function with parameters as
      `jax.tree_util.Partial(fn, params)`, adapters, or any pytree. The object itself is not
      changed. The trained arrays are the `nnx.Param`s of Flax modules, and all floating arrays of
      everything else.
    - `loss`: `loss(network, key)`, a scalar. The arrays of an Equinox module are arguments of the
      program; those in a closure are constants.
    - `learning_rate`: the maximum of the schedule in `adamw(learning_rate, steps)`, 1e-3 by
      default. Or pass `optimizer`, an optimizer of Optax, instead.
    - `ema`: the decay d of the average.
    - `sharding`: a `NamedSharding`; the parameters and the loss's arrays are replicated on its
      mesh. The loss must divide its batch itself.
    - `checkpoint`, `checkpoint_every`: a file. If it exists, training continues from it. It is
      written every `checkpoint_every` steps (1000 by default) and at the end, each time completely
      or not at all. A file of another run (other initial weights, key, steps or `settings`) raises
      an error. `settings` is a dictionary of anything else that distinguishes runs. Functions, and
      an `optimizer`, are compared only by name.
    - `progress`: show a bar with the loss.

    **Returns:** `Fit(network, average, curve)`.

    **Raises:** `ValueError` for a loss that is not a scalar, or a checkpoint of another run;
    `FloatingPointError` for a loss or gradient that is not finite, with the first such step. The
    last checkpoint is then from before that step.
    """
    key, steps = _checks.key(key), _checks.count(steps, "steps")
    ema = _checks.number(ema, "ema", 0, 1, closed="left")
    progress = _checks.flag(progress, "progress")
    _sharding.check_sharding(sharding)
    every = _check_checkpoint(checkpoint, checkpoint_every)
    rule, described = _optimizer(learning_rate, optimizer, steps)
    parameters, template = split_parameters(network)
    of_network: Any = loss if isinstance(loss, eqx.Module) else _pytree.Function(loss, "loss")
    ema_array = jnp.asarray(ema, jnp.float32)
    setup = _Setup(key, template, of_network, ema_array, optimizer=rule, sharding=sharding)
    _check_scalar(setup, parameters)

    header: dict[str, Any] = {}
    if checkpoint is not None:
        of_run = {"loss": _name(loss), "steps": steps, "ema": ema, "key": digest(key)}
        of_start = {"network at the start": digest((parameters, template))}
        header = of_run | of_start | described | (settings or {})
    checkpoints = _Checkpoints(checkpoint, every, sharding, header)
    curve = Curve(np.zeros(steps, np.float32), np.zeros(steps, np.float32))
    (state, curve), done = checkpoints.read((setup.start(parameters), curve))
    setup, state = setup.replicated((setup, state))
    with _progress.meter("training", steps) if progress else nullcontext() as bar:
        state = _run(setup, state, curve, done, checkpoints, bar)
    checkpoints.synchronize(steps)  # no host continues before the file is written
    return Fit(template.merge(state.parameters), template.merge(state.average), curve)


def _run(
    setup: _Setup, state: _State, curve: Curve, done: int, checkpoints: _Checkpoints, bar: Any
) -> _State:
    """The state after all steps from `done` on. Their losses and norms are written into `curve`."""
    steps, size = len(curve.loss), 1  # the first dispatch includes the compilation
    while done < steps:
        began, stop = time.monotonic(), int(min(done + size, steps, checkpoints.next_stop(done)))
        steps_here = jnp.int32(done), jnp.int32(stop)
        state, losses, norms = _callbacks.run(_advance, setup, state, *steps_here)
        _record(curve, slice(done, stop), losses, norms)
        size = _next_size(stop - done, time.monotonic() - began, setup.sharding)
        done = stop
        checkpoints.write((state, curve), done, steps)
        if bar is not None:
            bar.update(done, f"loss {curve.loss[max(done - 100, 0) : done].mean():.4f}")
    return state


@eqx.filter_jit(donate="all-except-first")
def _advance(
    setup: _Setup, state: _State, start: Array, stop: Array
) -> tuple[_State, Array, Array]:
    """The state after the steps `start <= k < stop`, at most `_MAX_STEPS`, and their losses and
    norms at the beginning of two arrays.

    `start` and `stop` are arguments, so that any number of steps runs the same program, which
    compiles once and rounds alike.
    """

    def record(array: Array, k: Array, number: Array) -> Array:
        return array.at[k - start].set(number.astype(array.dtype))

    def step(k: Array, carry: tuple) -> tuple:
        state, losses, norms = carry
        state, loss, norm = _step(setup, state, k)
        return state, record(losses, k, loss), record(norms, k, norm)

    empty = jnp.zeros(_MAX_STEPS, jnp.float32)
    return jax.lax.fori_loop(start, stop, step, (state, empty, empty))


def _step(setup: _Setup, state: _State, k: Array) -> tuple[_State, Array, Array]:
    """The state after step k, and the loss and the norm of its gradient before."""
    loss, gradient = jax.value_and_grad(setup.loss_of)(state.parameters, k)
    parameters, memory, norm = _descend(setup.optimizer, state, gradient)
    average = _average(state.average, parameters, 1 - setup.decay(k))
    state = _State(parameters, average, memory)
    if setup.sharding is not None:
        state = jax.lax.with_sharding_constraint(state, _sharding.replicated(setup.sharding))
    return state, loss, norm


def _descend(
    optimizer: "optax.GradientTransformation", state: _State, gradient: dict[str, Array]
) -> tuple[Any, Any, Array]:
    """The weights and the moments after a step against the gradient, and its norm."""
    import optax

    # Optax mixes dtypes, as in 0.9 ** count, which strict promotion rules do not allow.
    with jax.numpy_dtype_promotion("standard"):
        norm = optax.tree.norm(gradient)
        updates, memory = optimizer.update(gradient, state.optimizer, state.parameters)
    return optax.apply_updates(state.parameters, updates), memory, norm


def _average(average: Any, parameters: Any, weight: Array) -> Any:
    """The new average, `a + weight (w - a)`."""
    # optax.incremental_update would change an average of equal weights by a rounding error.
    return jax.tree.map(lambda a, w: a + weight.astype(a.dtype) * (w - a), average, parameters)


def _check_checkpoint(checkpoint: Any, every: int | None) -> int:
    """The number of steps between two checkpoints, after a check that the file can be written."""
    if checkpoint is not None:
        folder = Path(_checks.file_name(checkpoint, "checkpoint")).absolute().parent
        if not folder.is_dir():
            raise ValueError(f"the folder {folder} of the checkpoint does not exist: create it")
    elif every is not None:
        raise ValueError("checkpoint_every needs a file: pass checkpoint=")
    return 1000 if every is None else _checks.count(every, "checkpoint_every")


def _optimizer(
    learning_rate: float | None, optimizer: Any, steps: int
) -> tuple["optax.GradientTransformation", dict[str, Any]]:
    """The optimizer, and the settings that a checkpoint records about it."""
    if optimizer is None:
        learning_rate = 1e-3 if learning_rate is None else learning_rate
        learning_rate = _checks.number(learning_rate, "learning_rate")
        return _adamw(learning_rate, steps), {"optimizer": "adamw", "learning_rate": learning_rate}
    if learning_rate is not None:
        raise ValueError(
            "pass learning_rate or optimizer, not both: the optimizer has its own learning rate"
        )
    import optax

    how = "such as optax.adam(1e-3)"
    _checks.instance(optimizer, optax.GradientTransformation, "optimizer", how)
    return optimizer, {"optimizer": callable_name(optimizer.update), "learning_rate": None}


def _name(loss: Callable | eqx.Module) -> str:
    """The name of a loss in a checkpoint."""
    return type(loss).__name__ if isinstance(loss, eqx.Module) else callable_name(loss)


def _check_scalar(setup: _Setup, parameters: Any) -> None:
    """Raise a `ValueError`, before compilation, if the loss is not a scalar."""
    value = jax.eval_shape(lambda parameters: setup.loss_of(parameters, jnp.int32(0)), parameters)
    if getattr(value, "shape", None) != () or not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(f"the loss must return one floating number, got {value}")


def _record(curve: Curve, done: slice, losses: Array, norms: Array) -> None:
    """Write the steps `done` into the curve.

    **Raises:** `FloatingPointError` for the first step that is not finite.
    """
    num = done.stop - done.start
    curve.loss[done], curve.norm[done] = np.asarray(losses)[:num], np.asarray(norms)[:num]
    bad = ~np.isfinite(curve.loss[done]) | ~np.isfinite(curve.norm[done])
    if np.any(bad):
        step = done.start + int(np.argmax(bad))
        raise FloatingPointError(
            f"training failed in step {step} of {len(curve.loss)}: the loss is "
            f"{curve.loss[step]:g} and the norm of its gradient is {curve.norm[step]:g}. If the "
            "first step fails, check the data, the sampler or the reward, and the network. If a "
            "later step fails, use a lower learning rate or clipping"
        )


def _next_size(num: int, seconds: float, sharding: jax.sharding.NamedSharding | None) -> int:
    """The number of steps of the next dispatch, after one of `num` steps that took `seconds`."""
    size = max(1, min(_MAX_STEPS, int(num * _DISPATCH / max(seconds, 1e-9))))
    if not _over_hosts(sharding):
        return size
    from jax.experimental import multihost_utils

    # Use the first host's number: clocks differ, and hosts with different numbers of steps would
    # wait for each other forever.
    return int(multihost_utils.broadcast_one_to_all(np.int32(size)))


def _over_hosts(sharding: jax.sharding.NamedSharding | None) -> bool:
    return sharding is not None and not sharding.is_fully_addressable
