"""Particles: samples with weights, which every sampler returns.

    E f = sum_i W_i f(x_i),  W = softmax(log_weights),
        effective sample size = 1 / sum_i W_i^2 in [1, num]

Weights are stored as unnormalized log-weights. Samplers add to them, and never multiply weights.
Unweighted samples have equal weights and no normalizing constant.
"""

import dataclasses
import functools
import math
import os
import zipfile
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from tiltjax import _callbacks, _checks, _linalg, _repr, _sharding, resampling

CAUSES = {
    "denoiser": "the model's denoiser is not finite (for a fitted reward: look at its gradient, "
    "too)",
    "log_h": "the guidance's log_h is NaN or +inf: look at the reward's value",
    "shift": "the guidance's shift of the denoiser is not finite: look at the reward's gradient",
    "state": "the state is not finite after the solver's step: look at the times, the scale, and "
    "Adaptive's tolerance and max_steps",
    "weights": "no particle has a weight above zero: the twist is -inf for all of them, or it is "
    "not finite",
    "start": "the data is too wide for these times: divide the data by its standard deviation, or "
    "start earlier, with times= whose first steps are short",
}
# If several things failed, the largest number is the cause and the others are its consequences. A
# state that was not finite before the step is the cause of all other failures.
_NUMBERS = {name: len(CAUSES) - place for place, name in enumerate(CAUSES)}
_STATE_BEFORE = len(CAUSES) + 1
_FEW = 20  # the support below which an interval is worth a warning
_TEXTS = {_NUMBERS[name]: text for name, text in CAUSES.items()} | {_STATE_BEFORE: CAUSES["state"]}


class Failures(eqx.Module):
    """The first failure, as a number: 0 if nothing failed.

    The properties are booleans of the shape of `number`, and at most one of them is true:

    - `start`: the state at the start was not noise.
    - `denoiser`: the model's denoiser was not finite.
    - `log_h`: the guidance's `log_h` was NaN or +inf.
    - `shift`: the guidance's shift of the denoiser was not finite.
    - `state`: the state was not finite after the solver's step.
    - `weights`: all weights were zero.

    A loop carries and reduces one integer at a fraction of the cost of six booleans.
    """

    number: Array

    @classmethod
    def of(cls, state_before: Any = False, **wrong: Any) -> "Failures":
        """The cause among conditions with the names of the properties, all of one shape."""
        numbers = [jnp.where(flag, _NUMBERS[name], 0) for name, flag in wrong.items()]
        numbers.append(jnp.where(state_before, _STATE_BEFORE, 0))
        return cls(functools.reduce(jnp.maximum, numbers).astype(jnp.int32))

    @classmethod
    def none(cls) -> "Failures":
        """No failure."""
        return cls(jnp.zeros((), jnp.int32))

    def occurred(self) -> Array:
        """Whether there was a failure."""
        return self.number > 0

    def then(self, later: "Failures") -> "Failures":
        """These failures, and `later` ones where there are none: later failures are consequences
        of earlier ones.
        """
        return Failures(jnp.where(self.occurred(), self.number, later.number))

    def first(self, axis: int | tuple[int, ...] | None = None) -> "Failures":
        """The cause among all failures along an axis."""
        return Failures(jnp.max(self.number, axis=axis))

    @property
    def start(self) -> Array:
        return self.number == _NUMBERS["start"]

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


class Trace(_repr.Report):
    """The course of a run.

    - `times`: `(steps + 1,)`.
    - `failed`: the first failure of any particle in each step, `Failures` of shape `(steps,)`.
    - `trajectory`: the states at `times`, `(steps + 1, num, *shape)`, or `None` if they were not
      saved.

    Weighted particles also have the following fields. The first three have the shape `(steps,)`
    and describe the end of each step, before the particles were resampled.

    - `ess`: the effective sample size.
    - `tempering`: the factor of the twist.
    - `resampled`: whether the particles were then resampled.
    - `roots`: `(num,)`, the index of the initial particle from which each particle descends.
    """

    times: Array
    failed: Failures
    trajectory: Array | None = None
    ess: Array | None = None
    tempering: Array | None = None
    resampled: Array | None = None
    roots: Array | None = None

    def check(self) -> None:
        """Raise `FloatingPointError`, which names the first failed step and the cause, if the run
        failed.
        """
        if not _checks.concrete(self.failed):
            return
        if self.times.ndim > 1:
            raise ValueError(
                "this trace is that of several runs: check one, jax.tree.map(lambda a: a[i], trace)"
            )
        if failure := self._failure():
            raise FloatingPointError(f"sampling failed in {failure}")

    def _failure(self) -> str:
        """The first failed step, its time and the cause; "" if nothing failed or the numbers
        cannot be read.
        """
        numbers, times = _repr.read(self.failed.number), _repr.read(self.times)
        if numbers is None or times is None or not np.any(numbers):
            return ""
        numbers, times = np.atleast_2d(numbers), np.atleast_2d(times)  # one row for each run
        step = int(np.argmax(np.any(numbers > 0, axis=0)))
        run = int(np.argmax(numbers[:, step] > 0))
        return (
            f"step {step} of {numbers.shape[1]}, from t = {times[run, step]:.4g}: "
            f"{_TEXTS[numbers[run, step]]}"
        )

    def _steps(self) -> str:
        steps, times = f"{self.times.shape[-1] - 1} steps", _repr.read(self.times)
        if times is None:
            return steps
        return f"{steps} from t = {_repr.span(times[..., 0])} to {_repr.span(times[..., -1])}"

    def _title(self) -> str:
        return f"Trace: {self._steps()}"

    def _rows(self) -> dict[str, str]:
        rows = {}
        if _repr.read(self.failed.number) is not None:
            rows["failures"] = self._failure() or "none"
        if (resampled := _repr.read(self.resampled)) is not None:
            steps = resampled.shape[-1]
            rows["resampling"] = f"after {_repr.span(resampled.sum(axis=-1))} of {steps} steps"
        if (ess := _repr.read(self.ess)) is not None:
            rows["lowest effective sample size"] = _repr.span(ess.min(axis=-1))
        if self.trajectory is not None:
            rows["trajectory"] = f"saved, {self.trajectory.shape}"
        return rows


class Mixing(NamedTuple):
    """How well the chains of `gibbs` mixed: the number of `sweeps`, and the largest `correlation`
    between the state at the end and the state half-way.
    """

    sweeps: int
    correlation: float


def _log_weights(value: Any) -> Any:
    """Log-weights as floating numbers: weights in the dtype of integers would all be 0."""
    value = _checks.native(value)
    whole = jnp.issubdtype(getattr(value, "dtype", float), jnp.integer)
    return value.astype(jnp.result_type(float)) if whole else value


class Particles(_repr.Report):
    """Weighted samples.

    - `x`: `(num, *shape)`.
    - `log_weights`: `(num,)`, unnormalized.
    - `log_norm`: the estimate of the log normalizing constant, or `None` for unweighted samples.
    - `trace`: the course of the run, or `None`.
    - `log_prob`: `(num,)`, the log-density of the law of `x`, which `sample_with_log_prob` returns,
      or `None`.
    - `mixing`: how well the chains of `gibbs` mixed, or `None`.
    """

    x: Array = eqx.field(converter=_checks.native)
    log_weights: Array = eqx.field(converter=_log_weights)
    log_norm: Array | None = eqx.field(default=None, converter=_checks.native)
    trace: Trace | None = None
    log_prob: Array | None = eqx.field(default=None, converter=_checks.native)
    mixing: Mixing | None = None

    def __len__(self) -> int:
        return self.x.shape[0]

    def _title(self) -> str:
        *runs, num = self.log_weights.shape
        several = f"{math.prod(runs)} runs of " if runs else ""
        shape = self.x.shape[len(runs) + 1 :]
        return f"Particles: {several}{num} of shape {shape}, {self.x.dtype}"

    def _rows(self) -> dict[str, str]:
        rows, log_weights = {}, _repr.read(self.log_weights)
        if log_weights is not None and np.any(log_weights != log_weights[..., :1]):
            ess, num = effective_numpy(log_weights), log_weights.shape[-1]
            fraction = _repr.span(ess / num, ".1%")
            rows["effective sample size"] = f"{_repr.span(ess)} of {num} ({fraction})"
        if self.log_norm is not None:
            rows["log Z"] = _repr.span(self.log_norm)
        if self.log_prob is not None:
            rows["log_prob"] = _repr.span(self.log_prob)
        if self.mixing is not None:
            sweeps, correlation = self.mixing
            rows["mixing"] = f"{sweeps} sweeps, correlation {correlation:.2g}"
        roots = None if self.trace is None else _repr.read(self.trace.roots)
        if roots is not None and roots.ndim == 1:
            rows["initial particles"] = f"{len(np.unique(roots))} of {len(roots)} have descendants"
        if self.trace is not None:
            rows["trace"] = self.trace._steps()
            if resampling := self.trace._rows().get("resampling"):
                rows["trace"] += f", resampling {resampling}"
            if failure := self.trace._failure():
                rows["failed"] = f"in {failure}"
        return rows

    @property
    def weights(self) -> Array:
        """Normalized weights, `(num,)`."""
        return jax.nn.softmax(self.log_weights)

    @property
    def ess(self) -> Array:
        """The effective sample size `(sum w)^2 / sum w^2`, between 1 and `num`. Several runs have
        one each.
        """
        return effective(self.log_weights)

    def _check_one_run(self) -> None:
        if self.log_weights.ndim > 1:
            raise ValueError(
                "these are the particles of several runs: take one, "
                "jax.tree.map(lambda a: a[i], particles), or call this inside of the vmap"
            )

    def standard_error(self, fn=None) -> Array:
        """The standard error of `mean(fn)`, estimated from one run.

        Particles with a common initial ancestor are not independent. Particles with different
        initial ancestors are independent, apart from their weights. The weighted residuals are
        therefore summed over the descendants of each initial particle. The standard error is the
        square root of the sum of the squares of these sums (Chan and Lai 2013; Lee and Whiteley
        2018). It is infinite if only one initial particle has descendants with weight.

        The twist must be good. In 300 runs of 2,000 particles on three modes
        (`benchmarks/weighted/intervals.py`), the standard errors are right to 8% with `Laplace` and
        `das`. With `dps` and `tds` they are up to 18% too small, with `fk_steering` up to 38%,
        though 500 to 900 initial particles have descendants: a run that misses a rare mode does not
        see its own error. `mean ± 1.96 standard_error` then covers the mass .05 of a mode in .63 to
        .80 of the runs. `interval` covers it in .79 to .94.
        """
        return self._error(self._sums(self._values(fn)))[0]

    def support(self, fn=None) -> Array:
        """The effective number of initial particles that determine `standard_error(fn)`,

            (sum_i s_i^2)^2 / sum_i s_i^4,

        where `s_i` is the sum of the weighted residuals over the descendants of initial particle i.
        It is the number of degrees of freedom of the standard error (Satterthwaite 1946).

        For n independent particles with equal weights, an event of probability 1/2 has the support
        n, and a rare event that k of them have has the support k. The support is 0 if no particle
        has the event, or if all have it. Without a trace every particle is an initial particle.
        """
        return self._error(self._sums(self._values(fn)))[1]

    def interval(self, fn=None, level: float = 0.95) -> tuple[Array, Array]:
        """The ends `(low, high)` of a confidence interval of the mean of `fn`, by default of `x`,
        for each entry of `fn`.

        The interval is `mean(fn) ± q * standard_error(fn)`, where q is a quantile of Student's t
        distribution with `support(fn)` degrees of freedom. If all values are true or false, or 1 or
        0, the mean is a probability p. Its interval is symmetric in `log(p / (1 - p))`, so it lies
        between 0 and 1, and the interval of `1 - p` is its mirror image. If no particle has the
        event, `high` is `1 - ((1 - level) / 2)^(1 / n)`, where n is the effective number of initial
        particles.

        With 2,000 particles on three modes (`benchmarks/weighted/intervals.py`), intervals of level
        .95 contain the right value in these fractions of 300 runs:

        | | mass .05 of a mode | means of four functions |
        |---|---|---|
        | `smc` with `Laplace` | .95 | .93 to .97 |
        | `das` | .96 | .95 |
        | `tds` | .94 | .91 to .95 |
        | `smc` with `dps` | .89 | .78 to .92 |
        | `fk_steering` | .79 | .93 to .98 |

        **Warns** if the support is below 20. No interval knows of a mode that no particle visited:
        with `dps`, a run without a warning may miss the mean.

        **Raises:** `ValueError` inside of `jit`, `vmap` and `grad`, where `mean`, `standard_error`
        and `support` can be used.
        """
        level = _checks.number(level, "level", 0, 1, closed="neither")
        values = self._values(fn)
        _check_concrete((self, values))
        weights = self.weights.astype(values.dtype)
        parts = [_linalg.weighted_sum(weights, part) for part in (values, 1 - values)]
        parts += [*self._error(self._sums(values)), jnp.sum(self._by_root(weights) ** 2)]
        p, q, error, support, squares = (_double(part) for part in parts)
        _warn_of_support(support)
        low, high = np.where(
            jnp.all((values == 0) | (values == 1), axis=0),
            _logit_interval(p, q, error, support, 1 / squares, level),
            _student_interval(p, error, support, level),
        ).astype(values.dtype)
        return jnp.asarray(low), jnp.asarray(high)

    def log_norm_interval(self, level: float = 0.95) -> tuple[Array, Array]:
        """The ends `(low, high)` of a confidence interval of the log normalizing constant: that of
        `interval`, where the sums are those of the normalized weights, minus their mean.

        In the runs described there it contains the right value in .95 (`Laplace`), .97 (`das`), .94
        (`tds`), .84 (`dps`) and .90 (`fk_steering`) of the runs.

        **Warns**, **raises:** as `interval`; `ValueError` for unweighted samples.
        """
        level = _checks.number(level, "level", 0, 1, closed="neither")
        if self.log_norm is None:
            raise ValueError("unweighted samples do not estimate a normalizing constant: use smc")
        self._check_one_run()
        _check_concrete(self)
        parts = self.log_norm, *self._error(self._by_root(self.weights) - 1 / len(self))
        log_norm, error, support = (_double(part) for part in parts)
        _warn_of_support(support)
        low, high = _student_interval(log_norm, error, support, level)
        dtype = self.log_norm.dtype
        return jnp.asarray(low, dtype), jnp.asarray(high, dtype)

    def _by_root(self, values: Array) -> Array:
        """The sums of the values over the descendants of each initial particle, `(num, ...)`."""
        roots = None if self.trace is None else self.trace.roots
        return values if roots is None else jax.ops.segment_sum(values, roots, len(self))

    def _sums(self, values: Array) -> Array:
        """The sums of the weighted residuals over the descendants of each initial particle."""
        # Relative to one value, so that residuals keep their digits, and are 0 for equal values.
        values = values - values[jnp.argmax(self.log_weights)][None]
        weights = self.weights.astype(values.dtype)
        residuals = values - _linalg.weighted_sum(weights, values)[None]
        return self._by_root(weights.reshape(-1, *[1] * (values.ndim - 1)) * residuals)

    def _error(self, sums: Array) -> tuple[Array, Array]:
        """The root of the sum of squares, and `(sum s^2)^2 / sum s^4`."""
        largest = jnp.max(jnp.abs(sums), axis=0)
        squares = (
            sums / jnp.where(largest == 0, 1, largest)[None]
        ) ** 2  # at most 1: none underflows
        total = jnp.sum(squares, axis=0)
        support = total**2 / jnp.where(total == 0, 1, jnp.sum(squares**2, axis=0))
        alone = jnp.sum(self._by_root(self.weights) > 0) == 1
        return jnp.where(alone, jnp.inf, largest * jnp.sqrt(total)), jnp.where(alone, 1, support)

    def mean(self, fn=None) -> Array:
        """The weighted mean of `fn(x)`, by default that of `x` itself."""
        values = self._values(fn)
        return _linalg.weighted_sum(self.weights.astype(values.dtype), values)

    def _values(self, fn) -> Array:
        """`fn` of all samples, in the precision of the weights at least: the mean of a boolean is a
        probability. A particle of weight zero contributes zero, also if its value is infinite.
        """
        self._check_one_run()
        values = self.x if fn is None else _callbacks.run(jax.vmap(fn), self.x)
        wide = jnp.issubdtype(values.dtype, jnp.floating) and jnp.finfo(values.dtype).bits >= 32
        values = values if wide else values.astype(self.log_weights.dtype)
        counts = (self.weights > 0).reshape(-1, *[1] * (values.ndim - 1))
        return jnp.where(counts, values, jnp.zeros((), values.dtype))

    @property
    def num_roots(self) -> Array:
        """The number of initial particles that have descendants. How many of them determine an
        estimate says `support`.
        """
        self._check_one_run()
        if self.trace is None or self.trace.roots is None:
            return jnp.asarray(len(self))
        return jnp.sum(jnp.zeros(len(self), bool).at[self.trace.roots].set(True))

    def save(self, file: str | os.PathLike) -> None:
        """Write the particles to a `.npz` file, which `Particles.load` reads. If there are several
        processes, all of them must call `save`, and the first one writes.
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
        # NumPy has no bfloat16. Such arrays are written as float32, which is exact, and their names
        # are written too.
        narrow = [name for name, array in found.items() if array.dtype.name == "bfloat16"]
        written: dict[str, Any] = found | {name: found[name].astype(np.float32) for name in narrow}
        if not shared or jax.process_index() == 0:
            with open(file, "wb") as stream:
                np.savez(stream, bfloat16=np.asarray(narrow, "U64"), **written)
        if shared:  # every process waits until the file exists
            from jax.experimental import multihost_utils

            multihost_utils.sync_global_devices("particles are saved")

    @staticmethod
    def load(file: str | os.PathLike) -> "Particles":
        """The particles that `save` wrote. **Raises:** `ValueError` for a file that `save` did not
        write.
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
    """The effective sample size `(sum w)^2 / sum w^2` of log-weights, along the last axis."""
    # Relative to the largest one: the difference below loses the digits of a common offset.
    largest = jnp.max(log_weights, axis=-1, keepdims=True)
    log_weights = log_weights - jnp.where(jnp.isfinite(largest), largest, 0.0)
    total = lambda values: jax.nn.logsumexp(values, axis=-1)
    return jnp.exp(2 * total(log_weights) - total(2 * log_weights))


def effective_numpy(log_weights: np.ndarray) -> np.ndarray:
    """`effective` along the last axis, by NumPy, which compiles nothing."""
    with np.errstate(invalid="ignore"):  # NaN if all weights are zero
        weights = np.exp(log_weights - log_weights.max(axis=-1, keepdims=True))
    return weights.sum(axis=-1) ** 2 / (weights**2).sum(axis=-1)


def _student_interval(
    center: np.ndarray, error: np.ndarray, support: np.ndarray, level: float
) -> tuple[np.ndarray, np.ndarray]:
    """The interval of Student's t distribution with `support` degrees of freedom."""
    from scipy.special import stdtrit

    half = stdtrit(np.maximum(support, 1), (1 + level) / 2) * error
    return center - half, center + half


def _logit_interval(
    p: np.ndarray,
    q: np.ndarray,
    error: np.ndarray,
    support: np.ndarray,
    num: np.ndarray,
    level: float,
) -> tuple[np.ndarray, np.ndarray]:
    """The interval of a probability p, where `q = 1 - p`, from that of `log(p / q)`; for p = 0 and
    q = 0, the exact interval of `num` independent trials (Clopper and Pearson 1934).
    """
    from scipy.special import expit

    with np.errstate(divide="ignore", invalid="ignore"):  # of p = 0 and q = 0
        center = np.log(p) - np.log(q)
        low, high = map(expit, _student_interval(center, error / (p * q), support, level))
    unseen = 1 - ((1 - level) / 2) ** (1 / num)
    low = np.where(p == 0, 0, np.where(q == 0, 1 - unseen, low))
    return low, np.where(p == 0, unseen, np.where(q == 0, 1, high))


def _double(array: Array) -> np.ndarray:
    return _sharding.gathered(array).astype(np.float64)


def _check_concrete(values: Any) -> None:
    if not _checks.concrete(values):
        raise ValueError(
            "an interval is a report of numbers: call it outside of jit, vmap and grad. mean, "
            "standard_error and support work inside"
        )


def _warn_of_support(support: np.ndarray) -> None:
    lowest = np.min(support, initial=np.inf)
    if lowest < _FEW:
        _checks.warn(
            f"the interval has a support of {lowest:.2g} initial particles: only so many determine "
            f"its error. Below {_FEW}, an interval can miss the mean more often than its level "
            "says. Use more particles or a better guidance: Laplace(model, reward, scale) for a "
            "concave reward, Conjugate with ess_threshold=0 for others"
        )


@functools.partial(jax.jit, inline=True)
def conditional_effective(log_weights: Array, increments: Array) -> Array:
    """The conditional effective sample size `n (sum W v)^2 / sum W v^2`, where W are the normalized
    weights before the step and `v = exp(increments)` are the factors of the step.

    It measures how uneven the factors of one step are, whatever the weights were before (Zhou,
    Johansen and Aston 2016).
    """
    log_weights = jax.nn.log_softmax(log_weights)
    ratio = 2 * jax.nn.logsumexp(log_weights + increments) - jax.nn.logsumexp(
        log_weights + 2 * increments
    )
    return len(log_weights) * jnp.exp(ratio)


def unweighted(x: Array, trace: Trace | None = None) -> Particles:
    """Particles with equal weights and no normalizing constant."""
    return Particles(x, jnp.zeros(x.shape[0], weight_dtype(x.dtype)), None, trace)


def weight_dtype(dtype) -> jnp.dtype:
    """The dtype of the log-weights of states of `dtype`: at least single precision, and JAX's
    default for tokens.
    """
    if not jnp.issubdtype(dtype, jnp.floating):
        return jnp.dtype(jnp.result_type(float))
    return jnp.dtype(dtype if jnp.finfo(dtype).bits >= 32 else jnp.float32)
