"""The mean squared error of a model's denoiser, measured at each signal-to-noise ratio."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from tiltjax import _checks, _pytree
from tiltjax.guidance import Variance
from tiltjax.mixtures import decomposed
from tiltjax.models import Model
from tiltjax.samplers._sample import sample


def calibrate(
    key: Array,
    model: Model,
    *,
    num: int = 4096,
    levels: int = 48,
    data: Array | None = None,
    chunk_size: int | None = None,
) -> Variance:
    """Measure `v(snr)`, once per model.

    **Arguments:** `model`; `num`, samples a level; `levels`, of snr, evenly spaced in its logarithm
    from 1e-7 to 1e7 over the noise's own variance, as far as the network was trained there
    (`Interpolant.snr_range`); `data`, `(num, *shape)`, clean samples (drawn from the model by
    default); `chunk_size`, as in `sample`.

    **Raises:** `ValueError` for data of another shape, or fewer than two levels.
    """
    _checks.instance(model, Model, "model", "calibrate(key, model)")
    key_data, key_noise = jax.random.split(_checks.key(key))
    num = _checks.count(num, "num")
    if data is None:
        data = sample(key_data, model, num=num, chunk_size=chunk_size).x
    data = _checks.finite(data, "data").astype(model.dtype)
    if data.shape[1:] != model.shape:
        raise ValueError(
            f"data must hold states of shape {model.shape}, got an array of shape {data.shape}"
        )
    if _checks.count(levels, "levels") < 2 or not len(data):
        raise ValueError(
            f"a table needs at least two levels and one sample, got levels = {levels} and "
            f"{len(data)} samples"
        )
    return _calibrate(
        model,
        key_noise,
        data,
        levels,
        len(data) if chunk_size is None else _checks.count(chunk_size, "chunk_size"),
    )


@eqx.filter_jit
def _calibrate(model: Model, key: Array, data: Array, levels: int, chunk_size: int) -> Variance:
    model = decomposed(_pytree.cast(model, model.dtype))
    interpolant = model.interpolant
    base = interpolant.sigma(jnp.zeros((), data.dtype))
    # A network that is evaluated `ahead` of the model's snr reaches the ends of its range early.
    (network, ahead), widest = model.network_query(), jnp.asarray([1e-7, 1e7], data.dtype) / base**2
    lowest, highest = (end.astype(data.dtype) - ahead for end in network.snr_range())
    first, last = jnp.log(jnp.maximum(widest[0], lowest)), jnp.log(jnp.minimum(widest[1], highest))
    log_snr = jnp.linspace(first, last, levels)
    noise = jax.random.normal(key, data.shape, data.dtype)

    def level(log_snr: Array) -> Array:
        # An observation of precision q: natural parameter q X_1 + sqrt(q) noise. The same noise at
        # all levels keeps the table smooth.
        q = jnp.exp(log_snr)

        def error(pair: tuple[Array, Array]) -> Array:
            x, noise = pair
            t, noisy = interpolant.observe(q, q * x + jnp.sqrt(q) * noise)
            return jnp.mean((x - model.denoise(t, noisy)) ** 2)

        return jnp.mean(jax.lax.map(error, (data, noise), batch_size=chunk_size))

    return Variance(log_snr, jnp.log(jax.lax.map(level, log_snr)))
