"""Particles: a weighted population, which every verb returns or takes.

    E f = sum_i W_i f(x_i),  W = softmax(log_weights),
        effective sample size = 1 / sum_i W_i^2 in [1, num]

Weights are log-weights: added, never multiplied, unnormalized. A population that nothing has
weighed has equal ones and no normalizing constant.
"""

import dataclasses
import functools
import os
import zipfile
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from tiltjax import _callbacks, _checks, _sharding, resampling

CAUSES = {
    "denoiser": "the model's denoiser is not finite (for a fitted reward: look at its gradient, "
    "too)",
    "log_h": "the guidance's log_h is NaN or +inf: look at the reward's value",
    "shift": "the guidance's shift of the denoiser is not finite: look at the reward's gradient",
    "state": "the state is not finite after the solver's step: look at the times, the scale, and "
    "Adaptive's tolerance and max_steps",
    "weights": "no particle has a weight: the twist excludes all states that are reached, or is "
    "not finite",
}
# The largest number of several failures is the cause, the others are its consequences. A state that
# was not finite before a step explains all that follows.
_NUMBERS = {name: len(CAUSES) - place for place, name in enumerate(CAUSES)}
_STATE_BEFORE = len(CAUSES) + 1


class Failures(eqx.Module):
    """What failed first: whether the model's `denoiser`, the guidance's `log_h`, its `shift` of the
    denoiser or the `state` after the solver's step was not finite, or no particle had any of the
    `weights`. At most one of these booleans is true; they have the shape of `number`.

    One integer instead of five booleans: a loop carries and reduces it at a fifth of the cost.
    """

    number: Array

    @classmethod
    def of(cls, state_before: Any = False, **wrong: Any) -> "Failures":
        """The cause among conditions by name, of one shape."""
        numbers = [jnp.where(flag, _NUMBERS[name], 0) for name, flag in wrong.items()]
        numbers.append(jnp.where(state_before, _STATE_BEFORE, 0))
        return cls(functools.reduce(jnp.maximum, numbers).astype(jnp.int32))

    @classmethod
    def none(cls) -> "Failures":
        """Nothing failed."""
        return cls(jnp.zeros((), jnp.int32))

    def occurred(self) -> Array:
        """Whether anything failed."""
        return self.number > 0

    def then(self, later: "Failures") -> "Failures":
        """These, or `later` ones where there are none: what follows a failure is its
        consequence.
        """
        return Failures(jnp.where(self.occurred(), self.number, later.number))

    def first(self, axis: int | tuple[int, ...] | None = None) -> "Failures":
        """The cause among all along an axis."""
        return Failures(jnp.max(self.number, axis=axis))

    @property
    def denoiser(self) -> Array:
        return self.number == _NUMBERS["denoiser"]

    @property
    def log_h(self) -> Array:
        return self.number == _NUMBERS["log_h"]

    @property
    def shift(self) -> Array:
        return self.number == _NUMBERS["shift"]

    @property
    def state(self) -> Array:
        return (self.number == _NUMBERS["state"]) | (self.number == _STATE_BEFORE)

    @property
    def weights(self) -> Array:
        return self.number == _NUMBERS["weights"]


class Trace(eqx.Module):
    """What happened on the way.

    `times`: `(steps + 1,)`. `failed`: what failed first in each step for any particle, `Failures`
    of shape `(steps,)`. `trajectory`: the states at `times`, `(steps + 1, num, *shape)`, or `None`
    if they were not saved.

    Of weighted particles also, after each step and before it resampled, `(steps,)`: `ess`, the
    effective sample size; `tempering`, the factor of the twist; `resampled`. `roots` `(num,)`: from
    which particle at the start each one descends.
    """

    times: Array
    failed: Failures
    trajectory: Array | None = None
    ess: Array | None = None
    tempering: Array | None = None
    resampled: Array | None = None
    roots: Array | None = None

    def check(self) -> None:
        """Raise `FloatingPointError` naming the first failed step and the cause."""
        if not _checks.concrete(self.failed):
            return
        if self.times.ndim > 1:
            raise ValueError(
                "this trace is that of several runs: check one, jax.tree.map(lambda a: a[i], trace)"
            )
        failed = np.asarray(self.failed.occurred())
        if not np.any(failed):
            return
        step = int(np.argmax(failed))
        cause = next(text for name, text in CAUSES.items() if getattr(self.failed, name)[step])
        raise FloatingPointError(
            f"sampling failed in step {step} of {len(failed)}, from t = "
            f"{float(self.times[step]):.4g}: {cause}"
        )


class Mixing(NamedTuple):
    """How well the chains of `gibbs` mixed: `sweeps`, their number; `correlation`, the largest with
    the state half-way.
    """

    sweeps: int
    correlation: float


class Particles(eqx.Module):
    """A weighted population.

    - `x`: `(num, *shape)`.
    - `log_weights`: `(num,)`, unnormalized.
    - `log_norm`: the estimate of the log normalizing constant, or `None` if nothing was weighed.
    - `trace`: what happened in the run, or `None`.
    - `log_prob`: `(num,)`, the log-density of the law that `x` comes from, where
      `sample_with_log_prob` found it, or `None`.
    - `mixing`: how well the chains of `gibbs` mixed, or `None`.
    """

    x: Array
    log_weights: Array
    log_norm: Array | None = None
    trace: Trace | None = None
    log_prob: Array | None = None
    mixing: Mixing | None = None

    def __len__(self) -> int:
        return self.x.shape[0]

    @property
    def weights(self) -> Array:
        """Normalized weights, `(num,)`."""
        return jax.nn.softmax(self.log_weights)

    @property
    def ess(self) -> Array:
        """The effective sample size `(sum w)^2 / sum w^2`, between 1 and `num`."""
        return effective(self.log_weights)

    def standard_error(self, fn=None) -> Array:
        """The standard error of `mean(fn)`, from one run: the spread between the descendants of
        different starts.

        Particles that descend from one particle at the start are not independent; those of
        different starts are (but for their weights). With the weighted residuals summed up over the
        descendants of each start, it is the root of the sum of their squares (Chan and Lai 2013;
        Lee and Whiteley 2018). It needs a large `num_roots`, hundreds rather than tens: where few
        starts have descendants it is too small, threefold with five, and where one has, infinite.
        """
        values = self._values(fn)
        weights = self.weights.astype(values.dtype)
        residual = weights.reshape(-1, *[1] * (values.ndim - 1)) * (
            values - jnp.tensordot(weights, values, axes=1)[None]
        )
        roots = None if self.trace is None else self.trace.roots
        if roots is None:
            return jnp.sqrt(jnp.sum(residual**2, axis=0))
        sums = jax.ops.segment_sum(residual, roots, len(self))
        alone = jnp.all(roots == roots[0])
        return jnp.where(alone, jnp.inf, jnp.sqrt(jnp.sum(sums**2, axis=0)))

    def mean(self, fn=None) -> Array:
        """The weighted mean of `fn(x)` over the population (of x itself by default)."""
        values = self._values(fn)
        return jnp.tensordot(self.weights.astype(values.dtype), values, axes=1)

    def _values(self, fn) -> Array:
        """In the precision of the weights at least: the mean of a condition is a probability."""
        values = self.x if fn is None else _callbacks.run(jax.vmap(fn), self.x)
        wide = jnp.issubdtype(values.dtype, jnp.floating) and jnp.finfo(values.dtype).bits >= 32
        return values if wide else values.astype(self.log_weights.dtype)

    @property
    def num_roots(self) -> Array:
        """How many of the particles at the start have descendants: what `standard_error` rests
        on.
        """
        if self.trace is None or self.trace.roots is None:
            return jnp.asarray(len(self))
        return jnp.sum(jnp.zeros(len(self), bool).at[self.trace.roots].set(True))

    def save(self, file: str | os.PathLike) -> None:
        """Write the particles to a `.npz` file; `Particles.load` reads it. Of several processes,
        all of which have to call it, the first one writes.
        """
        file = _checks.file_name(file, "file")
        arrays: dict[str, Any] = {
            name: getattr(self, name) for name in ("x", "log_weights", "log_norm", "log_prob")
        }
        if self.trace is not None:
            for field in dataclasses.fields(Trace):
                arrays[f"trace.{field.name}"] = getattr(self.trace, field.name)
            failed = arrays.pop("trace.failed")
            arrays["trace.failed"] = failed.number
        if self.mixing is not None:
            arrays |= {f"mixing.{name}": value for name, value in self.mixing._asdict().items()}
        shared = not all(
            array.is_fully_addressable for array in arrays.values() if isinstance(array, jax.Array)
        )
        found = {
            name: _sharding.gathered(array) for name, array in arrays.items() if array is not None
        }
        # NumPy has no bfloat16: such arrays are written as float32, which holds them exactly, and
        # named.
        narrow = [name for name, array in found.items() if array.dtype.name == "bfloat16"]
        written: dict[str, Any] = found | {name: found[name].astype(np.float32) for name in narrow}
        if not shared or jax.process_index() == 0:
            with open(file, "wb") as stream:
                np.savez(stream, bfloat16=np.asarray(narrow, "U64"), **written)
        if shared:  # no process goes on before the file is there
            from jax.experimental import multihost_utils

            multihost_utils.sync_global_devices("particles are saved")

    @staticmethod
    def load(file: str | os.PathLike) -> "Particles":
        """The particles that `save` wrote. **Raises:** `ValueError` for a file of something
        else.
        """
        file = _checks.file_name(file, "file")
        try:
            with open(file, "rb") as stream, np.load(stream, allow_pickle=False) as archive:
                found = {name: archive[name] for name in archive.files}
            narrow = [str(name) for name in found.pop("bfloat16")]
            of_mixing = {
                name: found.pop(f"mixing.{name}").item()
                for name in Mixing._fields
                if f"mixing.{name}" in found
            }
            arrays = {name: jnp.asarray(array) for name, array in found.items()}
            arrays |= {name: arrays[name].astype(jnp.bfloat16) for name in narrow}
            of_trace: dict[str, Any] = {
                name.removeprefix("trace."): arrays.pop(name)
                for name in list(arrays)
                if name.startswith("trace.")
            }
            if of_trace:
                of_trace["failed"] = Failures(of_trace["failed"])
            return Particles(
                **arrays,
                trace=Trace(**of_trace) if of_trace else None,
                mixing=Mixing(**of_mixing) if of_mixing else None,
            )
        except (
            ValueError, TypeError, KeyError, AttributeError, EOFError, NotImplementedError,
            zipfile.BadZipFile,
        ) as error:  # fmt: skip
            raise ValueError(
                f"{os.fspath(file)} holds no particles: expected a file that Particles.save wrote"
            ) from error

    def resample(self, key: Array, num: int | None = None) -> Array:
        """`num` unweighted samples, `(num, *shape)`: systematic resampling in random order."""
        key_offset, key_order = jax.random.split(_checks.key(key))
        ancestors = resampling.systematic(key_offset, self.log_weights, num)
        return self.x[jax.random.permutation(key_order, ancestors)]


@functools.partial(jax.jit, inline=True)
def effective(log_weights: Array) -> Array:
    """The effective sample size `(sum w)^2 / sum w^2` of log-weights."""
    return jnp.exp(2 * jax.nn.logsumexp(log_weights) - jax.nn.logsumexp(2 * log_weights))


@functools.partial(jax.jit, inline=True)
def conditional_effective(log_weights: Array, increments: Array) -> Array:
    """The conditional effective sample size `n (sum W v)^2 / sum W v^2`, W the normalized weights
    before the factors v = exp(increments).

    How uneven one step's factors are, whatever the weights were (Zhou, Johansen and Aston 2016).
    """
    log_weights = jax.nn.log_softmax(log_weights)
    ratio = 2 * jax.nn.logsumexp(log_weights + increments) - jax.nn.logsumexp(
        log_weights + 2 * increments
    )
    return len(log_weights) * jnp.exp(ratio)


def unweighted(x: Array, trace: Trace | None = None) -> Particles:
    """A population that nothing has weighed."""
    return Particles(x, jnp.zeros(x.shape[0], weight_dtype(x.dtype)), None, trace)


def weight_dtype(dtype) -> jnp.dtype:
    """That of the log-weights of states of a dtype: single precision at least, JAX's default for
    tokens.
    """
    if not jnp.issubdtype(dtype, jnp.floating):
        return jnp.dtype(jnp.result_type(float))
    return jnp.dtype(dtype if jnp.finfo(dtype).bits >= 32 else jnp.float32)
