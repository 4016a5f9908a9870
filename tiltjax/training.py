r"""Training: from data, or a sampler of data, to a network that a model is made of.

    X_t = alpha_t X_1 + sigma_t X_0,     L = E |network(t, X_t) - Y|^2 / d,     t ~ times,  X_0 ~ N(0, I),  X_1 ~ data

| `target` | Y | the minimiser | for |
|---|---|---|---|
| `from_velocity` | `alpha' X_1 + sigma' X_0` | `b_t(x)` | paths with bounded derivatives, such as `Linear` |
| `from_noise` | `X_0` | `E[X_0 \| X_t = x]` | variance-preserving paths |
| `from_denoiser` | `X_1` | `E[X_1 \| X_t = x]` | any path |

The target is the builder that will make a model of the network. The minimum of L is not zero but the mean conditional variance of Y: for
Gaussian data of standard deviation s and `Linear(c)` it is `pi s c / 2` by coordinate. So the loss is read against its last value, never
against zero, and samples judge.

One step: the gradient, clipped to a global norm; Adam with decoupled weight decay; and the average

    a_{k+1} = a_k + (1 - d_k) (w_{k+1} - a_k),     d_k = min(d, (1 + k) / (10 + k)),

whose memory is short at first, so that the initial weights are forgotten. What is random in step k is a function of the key and of k alone,
and all steps are one compiled program: neither how many of them the host asks for at once nor a run that was killed and taken up again from
its checkpoint changes a bit, on one device and with one version of the compiler.

References: Lipman et al. (arXiv 2210.02747), flow matching; Loshchilov and Hutter (arXiv 1608.03983, 1711.05101), cosine schedules and
AdamW; Polyak and Juditsky (1992), averages of weights.
"""

import functools
import math
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from tiltjax import checkpoints, inputs, models, networks
from tiltjax import progress as progress_bar
from tiltjax.interpolants import Interpolant, Linear
from tiltjax.models import from_denoiser, from_noise, from_velocity

_LONGEST = 1024  # steps of one dispatch
_DISPATCH = 0.25  # seconds it should take


def _velocity(path: Interpolant, t: Array, x0: Array, x1: Array) -> Array:
    # Not through the denoiser: (x - alpha x1) / sigma would divide rounding errors by sigma.
    return jax.grad(path.alpha)(t) * x1 + jax.grad(path.sigma)(t) * x0


_TARGETS: dict[Callable, Callable] = {
    from_velocity: _velocity,
    from_noise: lambda path, t, x0, x1: x0,
    from_denoiser: lambda path, t, x0, x1: x1,
}


def uniform(key: Array) -> Array:
    """The usual law of times: uniform on [0, 1)."""
    return jax.random.uniform(key)


def loss(
    network: Callable,
    key: Array,
    x1: Array,
    *,
    target: Callable = from_velocity,
    interpolant: Interpolant | None = None,
    times: Callable = uniform,
    batched: bool = False,
) -> Array:
    """The mean squared error of a network's answers on a batch, by coordinate: one time and one draw of noise for each row.

    **Arguments:**

    - `network`: `network(t, x)`, as in `from_velocity`.
    - `x1`: clean states, `(n, *shape)`.
    - `target`: what the network answers with, as the function that makes a model of it: `from_velocity`, `from_noise` or `from_denoiser`.
    - `interpolant`: the path, `Linear()` by default.
    - `times`: the law of t, a function of a key. A network that knows certain levels only:
      `lambda key: path.clock(jax.random.randint(key, (), 0, N))`.
    - `batched`: whether the network takes `t` of shape `(n,)` and `x` of shape `(n, *shape)`.

    **Raises:** `ValueError` for an answer of the wrong shape, and for the velocity of a path on which it is unbounded.
    """
    wanted = _wanted(target)
    path = inputs.cast(_path(interpolant, target, times), x1.dtype)
    key_time, key_noise = jax.random.split(key)
    t = jax.vmap(times)(jax.random.split(key_time, len(x1)))
    if t.shape != (len(x1),):
        raise ValueError(f"times must return a scalar for a key, got shape {t.shape[1:]}")
    t, x0 = t.astype(x1.dtype), jax.random.normal(key_noise, x1.shape, x1.dtype)
    x = jax.vmap(lambda t, x0, x1: path.alpha(t) * x1 + path.sigma(t) * x0)(t, x0, x1)
    y = jax.vmap(lambda t, x0, x1: wanted(path, t, x0, x1))(t, x0, x1)
    answer = network(t, x) if batched else jax.vmap(network)(t, x)
    if jnp.shape(answer) != x.shape:
        hint = "" if batched else " (a network that wants a batch axis needs batched=True)"
        raise ValueError(
            f"the network must return the shape of its input: expected {x.shape}, got {jnp.shape(answer)}{hint}"
        )
    return jnp.mean((answer.astype(x.dtype) - y) ** 2)


def schedule(rate: float, steps: int, warmup: int) -> Callable:
    """The learning rate of step k: up to `rate` in `warmup` equal steps, the first of them not zero, then a half cosine to 0 at `steps`."""

    def value(k: Array) -> Array:
        k = jnp.asarray(k, jnp.float32)
        fraction = jnp.clip((k - warmup) / max(steps - warmup, 1), 0, 1)
        return rate * jnp.minimum((k + 1) / max(warmup, 1), (1 + jnp.cos(math.pi * fraction)) / 2)

    return value


def adamw(
    rate: float, steps: int, *, warmup: int | None = None, clip: float = 1.0, weight_decay: float = 0.0
) -> optax.GradientTransformation:
    """Gradients clipped to the global norm `clip`, then AdamW at the rate `schedule(rate, steps, warmup)`.

    **Arguments:** `warmup`, a twentieth of `steps` by default; `weight_decay`, of matrices and kernels, not of biases and gains.
    """
    steps = inputs.count(steps, "steps")
    warmup = steps // 20 if warmup is None else warmup
    if not 0 <= warmup <= steps:
        raise ValueError(f"warmup must lie between 0 and steps = {steps}, got {warmup}")
    for name, number in (("rate", rate), ("clip", clip)):
        if not 0 < number < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {number}")
    if not 0 <= weight_decay < math.inf:
        raise ValueError(f"weight_decay must be finite and not negative, got {weight_decay}")
    matrices = lambda parameters: jax.tree.map(lambda leaf: leaf.ndim > 1, parameters)
    step = optax.adamw(schedule(rate, steps, warmup), weight_decay=weight_decay, mask=matrices)
    return optax.chain(optax.clip_by_global_norm(clip), step)


# One object for equal arguments: a program is kept for an optimiser, and another seed must not compile it again.
_usual = functools.lru_cache(maxsize=16)(adamw)


class Curve(NamedTuple):
    """What every step saw before it moved: the `loss` and the global `norm` of its gradient before clipping, each `(steps,)`."""

    loss: np.ndarray
    norm: np.ndarray

    def plot(self, ax: Any) -> None:
        """Draw the loss on Matplotlib axes: each step, and means over a hundredth of the run."""
        window = max(len(self.loss) // 100, 1)
        whole = len(self.loss) // window
        means = self.loss[: whole * window].reshape(whole, window).mean(axis=1)
        ax.plot(np.arange(len(self.loss)) + 1, self.loss, color="#BDBDBD", linewidth=0.5)
        ax.plot((np.arange(whole) + 0.5) * window + 0.5, means, color="#0072B2", linewidth=1.5)
        ax.set(xlabel="step", ylabel="loss", yscale="log")


class Fit(NamedTuple):
    """What `fit` returns: the `network` after the last step, the `average` of its weights along the way (the one to use), and the `curve`."""

    network: Any
    average: Any
    curve: Curve


class _State(eqx.Module):
    """What one step leaves to the next."""

    parameters: dict[str, Array]
    average: dict[str, Array]
    optimiser: Any


class _Task(eqx.Module):
    """What all steps share. Arrays are arguments of the compiled program, everything else decides which program it is."""

    key: Array
    frame: networks.Frame
    data: Any
    interpolant: Interpolant
    times: inputs.Function
    ema: Array
    target: Callable = eqx.field(static=True)
    optimiser: optax.GradientTransformation = eqx.field(static=True)
    batch: int = eqx.field(static=True)
    batched: bool = eqx.field(static=True)
    sharding: jax.sharding.NamedSharding | None = eqx.field(static=True)

    def draw(self, key: Array) -> Array:
        """A batch of clean states."""
        if isinstance(self.data, inputs.Function):
            return self.data(key)
        return self.data[jax.random.randint(key, (self.batch,), 0, len(self.data))]

    def loss(self, parameters: dict[str, Array], key: Array, x1: Array) -> Array:
        settings: dict[str, Any] = {"target": self.target, "interpolant": self.interpolant, "times": self.times}
        return loss(self.frame.network(parameters), key, x1, batched=self.batched, **settings)


def fit(
    key: Array,
    network: Any,
    data: Any,
    *,
    steps: int,
    batch: int | None = None,
    rate: float | None = None,
    optimiser: optax.GradientTransformation | None = None,
    ema: float = 0.999,
    target: Callable = from_velocity,
    interpolant: Interpolant | None = None,
    times: Callable = uniform,
    batched: bool = False,
    sharding: jax.sharding.NamedSharding | None = None,
    checkpoint: str | os.PathLike | None = None,
    every: int | None = None,
    progress: bool = False,
) -> Fit:
    """Train a network on data by `steps` steps of AdamW.

    **Arguments:**

    - `key`: decides the batches, times and noise.
    - `network`: `network(t, x)`, a Flax NNX or an Equinox module; a function with parameters as `jax.tree_util.Partial(fn, params)`. It
      is left as it is. Trained are the `nnx.Param`s of Flax modules, and all floating arrays of everything else.
    - `data`: `(n, *shape)`, finite, from which batches are drawn with replacement on the device; or a sampler, `key -> (batch, *shape)`.
    - `batch`: rows of a step, 256 by default for an array; a sampler says it itself.
    - `rate`: the highest one of `adamw(rate, steps)`, by default 1e-3; or another `optimiser`, from Optax, in its place.
    - `ema`: d of the average.
    - `target`, `interpolant`, `times`, `batched`: as in `loss`. Models are then built with the same ones.
    - `sharding`: a `NamedSharding` of the batch axis over devices, each of which holds the parameters and the data.
    - `checkpoint`, `every`: a file to continue from if it exists, and written after every so many steps (1000 by default) and at the end.
      It is replaced at once or not at all, and refused if it is of another run: other settings, data, weights to start from or shapes.
      Functions, and an `optimiser`, are told apart by name only.
    - `progress`: show a bar with the loss.

    **Returns:** `Fit(network, average, curve)`: `tj.from_velocity(fit.average, shape=...)`.

    **Raises:** `ValueError` for wrong shapes, data that is not finite, modules in training mode (dropout and running statistics are not
    trained here), or a checkpoint of another run; `FloatingPointError` naming the first step whose loss or gradient is not finite.
    """
    key, steps = inputs.typed_key(key), inputs.count(steps, "steps")
    if not 0 <= ema < 1:
        raise ValueError(f"ema must lie in [0, 1), got {ema}: 0.999 remembers about a thousand steps")
    if rate is not None and optimiser is not None:
        raise ValueError("give rate or optimiser, not both: the optimiser has a rate of its own")
    if every is not None and checkpoint is None:
        raise ValueError("every= says how often to write a checkpoint: say where, checkpoint=")
    if checkpoint is not None and not (folder := Path(checkpoint).absolute().parent).is_dir():
        raise ValueError(f"there is no folder {folder} to write the checkpoint to: make it first")
    every = 1000 if every is None else inputs.count(every, "every")
    if optimiser is None:
        rate = 1e-3 if rate is None else float(rate)
        rule, law = _usual(rate, steps), "adamw"
    else:
        inputs.instance(optimiser, optax.GradientTransformation, "optimiser", "such as optax.adam(1e-3)")
        rule, law = optimiser, checkpoints.name(optimiser.update)
    _wanted(target)
    path = _path(interpolant, target, times)
    parameters, frame = networks.taken_apart(network)
    models.Net(network)  # refuses another signature, and modules hidden in a closure
    source, example = _source(key, data, batch)
    _check_sharding(sharding, example.shape[0])

    names = {"target": target.__name__, "times": checkpoints.name(times), "optimiser": law}
    everywhere = lambda tree: tree if sharding is None else jax.device_put(tree, _replicated(sharding))
    start = _State(jax.tree.map(jnp.copy, parameters), jax.tree.map(jnp.copy, parameters), rule.init(parameters))
    task = _Task(
        *everywhere((key, frame, source, path, inputs.Function(times), jnp.asarray(ema, jnp.float32))),
        target=target,
        optimiser=rule,
        batch=example.shape[0],
        batched=bool(batched),
        sharding=sharding,
    )
    jax.eval_shape(task.loss, parameters, key, example)  # finds shapes that do not fit before anything is compiled

    state, done, curve = start, 0, Curve(np.zeros(steps, np.float32), np.zeros(steps, np.float32))
    settings: dict[str, Any] = {}
    if checkpoint is not None:
        settings = names | {
            "steps": steps,
            "batch": task.batch,
            "rate": rate,
            "ema": float(ema),
            "batched": task.batched,
        }
        settings |= {"key": checkpoints.digest(key), "interpolant": f"{type(path).__name__} {checkpoints.digest(path)}"}
        settings |= {"network at the start": checkpoints.digest((parameters, frame))}
        settings |= {"state": f"{example.dtype}{example.shape[1:]}"}
        settings |= {"data": checkpoints.name(data) if callable(data) else f"{len(data)} {checkpoints.digest(source)}"}
        if Path(checkpoint).exists():
            (state, curve), done = checkpoints.read(checkpoint, settings, (start, curve))
    state, size = everywhere(state), 1
    with progress_bar.meter("training", steps) if progress else nullcontext() as bar:
        while done < steps:
            began, stop = time.monotonic(), min(done + size, steps)
            if checkpoint is not None:
                stop = min(stop, done - done % every + every)
            state, *seen = _advance(task, state, *(jnp.asarray(k, jnp.int32) for k in (done, stop)))
            for whole, part in zip(curve, seen, strict=True):
                whole[done:stop] = np.asarray(part)[: stop - done]
            _check_finite(curve, done, stop)
            # The first round holds the compilation, and is one step.
            size = max(1, min(_LONGEST, int((stop - done) * _DISPATCH / max(time.monotonic() - began, 1e-9))))
            done = stop
            if checkpoint is not None and (done % every == 0 or done == steps):
                checkpoints.write(checkpoint, settings, (state, curve), done)
            if bar is not None:
                bar.update(done, f"loss {curve.loss[max(done - 100, 0) : done].mean():.4f}")
    return Fit(frame.network(state.parameters), frame.network(state.average), curve)


@eqx.filter_jit(donate="all-except-first")
def _advance(task: _Task, state: _State, start: Array, stop: Array) -> tuple[_State, Array, Array]:
    """Steps `start <= k < stop`, at most `_LONGEST`; their losses and norms stand at the beginning of the arrays returned.

    The ends are arguments: any number of steps is the same program, which compiles once and rounds alike.
    """

    def step(k: Array, carry: tuple) -> tuple:
        state, losses, norms = carry
        key_data, key_loss = jax.random.split(jax.random.fold_in(task.key, k))
        x1 = task.draw(key_data)
        if task.sharding is not None:
            x1 = jax.lax.with_sharding_constraint(x1, task.sharding)
        value, slope = jax.value_and_grad(task.loss)(state.parameters, key_loss, x1)
        norm = jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in slope.values()))
        # Optax mixes dtypes, as in 0.9 ** count, which a caller's strict rules would refuse.
        with jax.numpy_dtype_promotion("standard"):
            updates, memory = task.optimiser.update(slope, state.optimiser, state.parameters)
        parameters: Any = optax.apply_updates(state.parameters, updates)
        kept = k.astype(jnp.float32)
        change = 1 - jnp.minimum(task.ema, (1 + kept) / (10 + kept))
        average = jax.tree.map(lambda a, w: a + change.astype(a.dtype) * (w - a), state.average, parameters)
        state = _State(parameters, average, memory)
        if task.sharding is not None:
            state = jax.lax.with_sharding_constraint(state, _replicated(task.sharding))
        record = lambda array, number: array.at[k - start].set(number.astype(array.dtype))
        return state, record(losses, value), record(norms, norm)

    empty = jnp.zeros(_LONGEST, jnp.float32)
    return jax.lax.fori_loop(start, stop, step, (state, empty, empty))


def _source(key: Array, data: Any, batch: int | None) -> tuple[Any, jax.ShapeDtypeStruct]:
    """The data as an argument of the program, and what a batch looks like."""
    if callable(data):
        sampler = inputs.Function(data)
        example = jax.eval_shape(sampler, key)
        if len(getattr(example, "shape", ())) < 2 or (batch is not None and example.shape[0] != batch):
            rows = "batch" if batch is None else batch
            raise ValueError(f"the sampler must return states of shape ({rows}, *shape), got {example}")
        source = sampler
    else:
        source = inputs.floating(data, "data")
        if source.ndim < 2 or not len(source):
            raise ValueError(
                f"data must hold states, shape (n, *shape), got {source.shape}: make a column with x[:, None]"
            )
        bad = ~np.isfinite(np.asarray(source)).reshape(len(source), -1).all(axis=1)
        if np.any(bad):
            raise ValueError(
                f"data must be finite, {np.sum(bad)} of {len(source)} rows are not, the first one is {int(np.argmax(bad))}"
            )
        rows = inputs.count(256 if batch is None else batch, "batch")
        example = jax.ShapeDtypeStruct((rows, *source.shape[1:]), source.dtype)
    if not jnp.issubdtype(example.dtype, jnp.floating) or jnp.finfo(example.dtype).bits < 32:
        raise ValueError(
            f"states must have a floating dtype of at least 32 bits, got {example.dtype}: the network may compute in any"
        )
    return source, example


def _wanted(target: Callable) -> Callable:
    if target not in _TARGETS:
        raise ValueError(
            f"target must be from_velocity, from_noise or from_denoiser, the function itself, got {target!r}"
        )
    return _TARGETS[target]


def _path(interpolant: Interpolant | None, target: Callable, times: Callable) -> Interpolant:
    path = Linear() if interpolant is None else interpolant
    inputs.instance(path, Interpolant, "interpolant", "such as tiltjax.Linear(base_scale)")
    if target is from_velocity and times is uniform and inputs.concrete(path):
        with jax.ensure_compile_time_eval():
            slope = np.asarray(jax.grad(path.sigma)(jnp.ones(())))
        if not np.isfinite(slope):
            raise ValueError(
                f"the velocity of {type(path).__name__} is unbounded at t = 1, where its loss has no mean: train the noise, "
                "target=from_noise, or the denoiser, or give times= that end earlier"
            )
    return path


def _check_sharding(sharding: Any, rows: int) -> None:
    if sharding is None:
        return
    inputs.instance(sharding, jax.sharding.NamedSharding, "sharding", 'NamedSharding(mesh, PartitionSpec("batch"))')
    if any(kind != jax.sharding.AxisType.Auto for kind in sharding.mesh.axis_types):
        raise ValueError(
            'the axes of the mesh must be Auto: jax.make_mesh((n,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))'
        )
    try:
        sharding.shard_shape((rows, 1))
    except ValueError as error:
        raise ValueError(
            f"a batch of {rows} rows cannot be divided over the devices of {sharding.spec}: {error}"
        ) from None


def _replicated(sharding: jax.sharding.NamedSharding) -> jax.sharding.NamedSharding:
    return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())


def _check_finite(curve: Curve, start: int, stop: int) -> None:
    bad = ~np.isfinite(curve.loss[start:stop]) | ~np.isfinite(curve.norm[start:stop])
    if np.any(bad):
        step = start + int(np.argmax(bad))
        raise FloatingPointError(
            f"training failed in step {step} of {len(curve.loss)}: the loss is {curve.loss[step]:g}, its gradient's norm "
            f"{curve.norm[step]:g}. From the first step on: look at the data or sampler and the network. Later: lower the rate, or clip"
        )
