r"""Stochastic gradient descent: from a random loss of a network to the network that makes its mean
small.

One step: the gradient, clipped to a global norm; Adam with decoupled weight decay; and the average

    a_{k+1} = a_k + (1 - d_k) (w_{k+1} - a_k),     d_k = min(d, (1 + k) / (10 + k)),

whose memory is short at first, so that the initial weights are forgotten. What is random in step k
is a function of the key and of k alone, and all steps are one compiled program: neither how many of
them the host asks for at once nor a run that was killed and taken up again from its checkpoint
changes a bit, on one device and with one version of the compiler.

`fit` gives it the loss of a network on data, `finetune` that of a model on a
reward; `minimize` takes any other. References: Loshchilov and Hutter (arXiv 1608.03983,
1711.05101), cosine schedules and AdamW; Polyak and Juditsky (1992), averages of weights.
"""

import functools
import math
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

from tiltjax import _checks, _progress, _pytree, _sharding
from tiltjax._sharding import check_sharding, placed
from tiltjax.training._checkpoints import callable_name, digest, read_checkpoint, write_checkpoint
from tiltjax.training._parameters import Frame, split_parameters

if TYPE_CHECKING:
    import optax
_LONGEST = 1024  # steps of one dispatch
_DISPATCH = 0.25  # seconds it should take


def schedule(learning_rate: float, steps: int, warmup: int) -> Callable:
    """The learning rate of step k: up to `learning_rate` in `warmup` equal steps, the first of them
    not zero, then a half cosine to 0 at `steps`.
    """

    def value(k: Array) -> Array:
        k = jnp.asarray(k, jnp.float32)
        fraction = jnp.clip((k - warmup) / max(steps - warmup, 1), 0, 1)
        return learning_rate * jnp.minimum(
            (k + 1) / max(warmup, 1), (1 + jnp.cos(math.pi * fraction)) / 2
        )

    return value


def adamw(
    learning_rate: float,
    steps: int,
    *,
    warmup: int | None = None,
    clip: float = 1.0,
    weight_decay: float = 0.0,
) -> "optax.GradientTransformation":
    """Gradients clipped to the global norm `clip`, then AdamW at the rate
    `schedule(rate, steps, warmup)`.

    **Arguments:** `warmup`, a twentieth of `steps` by default; `weight_decay`, of matrices and
    kernels, not of biases and gains.

    **Raises:** `ValueError`, `TypeError` for numbers out of range. Source: Loshchilov and Hutter
    (arXiv 1711.05101).
    """
    steps = _checks.count(steps, "steps")
    warmup = steps // 20 if warmup is None else warmup
    if isinstance(warmup, bool) or not isinstance(warmup, int | np.integer):
        raise TypeError(f"warmup must be a whole number of steps, got {warmup!r}")
    learning_rate, clip = (
        _checks.number(learning_rate, "learning_rate"),
        _checks.number(clip, "clip"),
    )
    weight_decay = _checks.number(weight_decay, "weight_decay")
    if not 0 <= warmup <= steps:
        raise ValueError(f"warmup must lie between 0 and steps = {steps}, got {warmup}")
    for name, number in (("learning_rate", learning_rate), ("clip", clip)):
        if not 0 < number < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {number}")
    if not 0 <= weight_decay < math.inf:
        raise ValueError(f"weight_decay must be finite and not negative, got {weight_decay}")
    # where it is needed, as with all that only some runs need: importing takes longer than most of
    # them
    import optax

    matrices = lambda parameters: jax.tree.map(lambda leaf: leaf.ndim > 1, parameters)
    step = optax.adamw(
        schedule(learning_rate, steps, warmup), weight_decay=weight_decay, mask=matrices
    )
    return optax.chain(optax.clip_by_global_norm(clip), step)


# One object for equal arguments: a program is kept for an optimizer, and another seed must not
# compile it again.
_usual = functools.lru_cache(maxsize=16)(adamw)


class Curve(NamedTuple):
    """What every step saw before it moved: the `loss` and the global `norm` of its gradient before
    clipping, each `(steps,)`.
    """

    loss: np.ndarray
    norm: np.ndarray

    def plot(self, ax: Any) -> None:
        """Draw the loss on Matplotlib axes: each step, and means over a hundredth of the run."""
        window = max(len(self.loss) // 100, 1)
        whole = len(self.loss) // window
        means = self.loss[: whole * window].reshape(whole, window).mean(axis=1)
        ax.plot(np.arange(len(self.loss)) + 1, self.loss, color="#BDBDBD", linewidth=0.5)
        ax.plot((np.arange(whole) + 0.5) * window + 0.5, means, color="#0072B2", linewidth=1.5)
        # A loss of samples is positive; minus an objective need not be, and a logarithm would hide
        # it.
        ax.set(xlabel="step", ylabel="loss", yscale="log" if np.all(self.loss > 0) else "linear")


class Fit(NamedTuple):
    """A network after training, by `minimize`, `fit` or `finetune`: the `network` after the last
    step, the `average` of its weights along the way (the one to use), and the `curve`.
    """

    network: Any
    average: Any
    curve: Curve


class _State(eqx.Module):
    """What one step leaves to the next."""

    parameters: dict[str, Array]
    average: dict[str, Array]
    optimizer: Any


class _Task(eqx.Module):
    """What all steps share. Arrays are arguments of the compiled program, everything else decides
    which program it is.
    """

    key: Array
    frame: Frame
    loss: Any
    ema: Array
    optimizer: "optax.GradientTransformation" = eqx.field(static=True)
    sharding: jax.sharding.NamedSharding | None = eqx.field(static=True)


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

    - `key`: decides all that is random.
    - `network`: a Flax NNX or an Equinox module, a function with parameters as
      `jax.tree_util.Partial(fn, params)`, adapters, any pytree. It is left as it is. Trained are
      the `nnx.Param`s of Flax modules, and all floating arrays of everything else.
    - `loss`: `loss(network, key)`, a scalar. The arrays of an Equinox module are arguments of the
      program, those in a closure constants.
    - `learning_rate`: the highest one of `adamw(rate, steps)`, by default 1e-3; or another
      `optimizer`, from Optax, in its place.
    - `ema`: d of the average.
    - `sharding`: a `NamedSharding`, on whose mesh the parameters and the loss's arrays are
      replicated. The loss divides its batch itself.
    - `checkpoint`, `checkpoint_every`: a file to continue from if it exists, and written after
      every so many steps (1000 by default) and at the end. It is replaced at once or not at all,
      and refused if it is of another run: of other weights to start from, key, steps or `settings`,
      a dictionary of whatever else tells runs apart. Functions, and an `optimizer`, are told apart
      by name only.
    - `progress`: show a bar with the loss.

    **Returns:** `Fit(network, average, curve)`.

    **Raises:** `ValueError` for a loss that is no scalar, or a checkpoint of another run;
    `FloatingPointError` naming the first step whose loss or gradient is not finite: the last
    checkpoint is then the one before it.
    """
    key, steps = _checks.key(key), _checks.count(steps, "steps")
    ema, progress = _checks.number(ema, "ema"), _checks.flag(progress, "progress")
    if not 0 <= ema < 1:
        raise ValueError(
            f"ema must lie in [0, 1), got {ema}: 0.999 remembers about a thousand steps"
        )
    if learning_rate is not None and optimizer is not None:
        raise ValueError("give rate or optimizer, not both: the optimizer has a rate of its own")
    if checkpoint_every is not None and checkpoint is None:
        raise ValueError(
            "checkpoint_every= says how often to write a checkpoint: say where, checkpoint="
        )
    checkpoint = None if checkpoint is None else _checks.file_name(checkpoint, "checkpoint")
    if checkpoint is not None and not (folder := Path(checkpoint).absolute().parent).is_dir():
        raise ValueError(f"there is no folder {folder} to write the checkpoint to: make it first")
    checkpoint_every = (
        1000 if checkpoint_every is None else _checks.count(checkpoint_every, "checkpoint_every")
    )
    if optimizer is None:
        learning_rate = (
            1e-3 if learning_rate is None else _checks.number(learning_rate, "learning_rate")
        )
        rule, law = _usual(learning_rate, steps), "adamw"
    else:
        import optax

        _checks.instance(
            optimizer, optax.GradientTransformation, "optimizer", "such as optax.adam(1e-3)"
        )
        rule, law = optimizer, callable_name(optimizer.update)
    check_sharding(sharding)
    parameters, frame = split_parameters(network)
    of_network: Any = loss if isinstance(loss, eqx.Module) else _pytree.Function(loss, "loss")
    everywhere = lambda tree: (
        tree if sharding is None else placed(tree, _sharding.replicated(sharding))
    )
    start = _State(
        jax.tree.map(jnp.copy, parameters),
        jax.tree.map(jnp.copy, parameters),
        rule.init(parameters),
    )
    task = _Task(
        *everywhere((key, frame, of_network, jnp.asarray(ema, jnp.float32))),
        optimizer=rule,
        sharding=sharding,
    )
    # Finds shapes that do not fit before anything is compiled.
    value = jax.eval_shape(
        lambda parameters: of_network(frame.network(parameters), key), parameters
    )
    if getattr(value, "shape", None) != () or not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(f"a loss is one floating number, got {value}")

    # Hosts see one folder, in which one of them writes: whatever it writes all of them hold.
    writes = not _of_several_hosts(sharding) or jax.process_index() == 0
    state, done, curve = start, 0, Curve(np.zeros(steps, np.float32), np.zeros(steps, np.float32))
    header: dict[str, Any] = {}
    if checkpoint is not None:
        header = {
            "loss": type(loss).__name__ if isinstance(loss, eqx.Module) else callable_name(loss),
            "optimizer": law,
            "steps": steps,
            "learning_rate": learning_rate,
            "ema": ema,
        }
        header |= {"key": digest(key), "network at the start": digest((parameters, frame))}
        header |= settings or {}
        if Path(checkpoint).exists():
            (state, curve), done = read_checkpoint(checkpoint, header, (start, curve))
        _check_same(done, sharding, checkpoint)
    state, size = everywhere(state), 1
    with _progress.meter("training", steps) if progress else nullcontext() as bar:
        while done < steps:
            began, stop = time.monotonic(), min(done + size, steps)
            if checkpoint is not None:
                stop = min(stop, done - done % checkpoint_every + checkpoint_every)
            state, *seen = _advance(task, state, *(jnp.asarray(k, jnp.int32) for k in (done, stop)))
            for whole, part in zip(curve, seen, strict=True):
                whole[done:stop] = np.asarray(part)[: stop - done]
            _check_finite(curve, done, stop)
            # The first round holds the compilation, and is one step.
            size = max(
                1,
                min(_LONGEST, int((stop - done) * _DISPATCH / max(time.monotonic() - began, 1e-9))),
            )
            size, done = _agreed(size, sharding), stop
            if (
                checkpoint is not None
                and writes
                and (done % checkpoint_every == 0 or done == steps)
            ):
                write_checkpoint(checkpoint, header, (state, curve), done)
            if bar is not None:
                bar.update(done, f"loss {curve.loss[max(done - 100, 0) : done].mean():.4f}")
    if checkpoint is not None:
        _check_same(done, sharding, checkpoint)  # and nobody goes on before the file is there
    return Fit(frame.network(state.parameters), frame.network(state.average), curve)


@eqx.filter_jit(donate="all-except-first")
def _advance(task: _Task, state: _State, start: Array, stop: Array) -> tuple[_State, Array, Array]:
    """Steps `start <= k < stop`, at most `_LONGEST`; their losses and norms stand at the beginning
    of the arrays returned.

    The ends are arguments: any number of steps is the same program, which compiles once and rounds
    alike.
    """

    import optax

    def step(k: Array, carry: tuple) -> tuple:
        state, losses, norms = carry
        of_parameters = lambda parameters: task.loss(
            task.frame.network(parameters), jax.random.fold_in(task.key, k)
        )
        value, slope = jax.value_and_grad(of_parameters)(state.parameters)
        norm = jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in slope.values()))
        # Optax mixes dtypes, as in 0.9 ** count, which a caller's strict rules would refuse.
        with jax.numpy_dtype_promotion("standard"):
            updates, memory = task.optimizer.update(slope, state.optimizer, state.parameters)
        parameters: Any = optax.apply_updates(state.parameters, updates)
        kept = k.astype(jnp.float32)
        change = 1 - jnp.minimum(task.ema, (1 + kept) / (10 + kept))
        average = jax.tree.map(
            lambda a, w: a + change.astype(a.dtype) * (w - a), state.average, parameters
        )
        state = _State(parameters, average, memory)
        if task.sharding is not None:
            state = jax.lax.with_sharding_constraint(state, _sharding.replicated(task.sharding))
        record = lambda array, number: array.at[k - start].set(number.astype(array.dtype))
        return state, record(losses, value), record(norms, norm)

    empty = jnp.zeros(_LONGEST, jnp.float32)
    return jax.lax.fori_loop(start, stop, step, (state, empty, empty))


def _of_several_hosts(sharding: jax.sharding.NamedSharding | None) -> bool:
    return sharding is not None and not sharding.is_fully_addressable


def _agreed(size: int, sharding: jax.sharding.NamedSharding | None) -> int:
    """The first host's number: clocks differ, and those that run different numbers of steps would
    wait for each other for ever.
    """
    if not _of_several_hosts(sharding):
        return size
    from jax.experimental import multihost_utils

    return int(multihost_utils.broadcast_one_to_all(np.int32(size)))


def _check_same(done: int, sharding: jax.sharding.NamedSharding | None, checkpoint: Any) -> None:
    """Refuse, on all hosts, to continue from different steps: they would wait for each other for
    ever.
    """
    if not _of_several_hosts(sharding):
        return
    from jax.experimental import multihost_utils

    found = np.ravel(multihost_utils.process_allgather(np.int32(done)))
    if np.any(found != done):
        raise RuntimeError(
            f"hosts found {checkpoint} at different steps, {found.tolist()}: name a file in a "
            "folder that all of them see"
        )


def _check_finite(curve: Curve, start: int, stop: int) -> None:
    bad = ~np.isfinite(curve.loss[start:stop]) | ~np.isfinite(curve.norm[start:stop])
    if np.any(bad):
        step = start + int(np.argmax(bad))
        raise FloatingPointError(
            f"training failed in step {step} of {len(curve.loss)}: the loss is "
            f"{curve.loss[step]:g}, its gradient's norm "
            f"{curve.norm[step]:g}. From the first step on: look at the data, sampler or reward "
            "and the network. Later: lower the rate, or clip"
        )
