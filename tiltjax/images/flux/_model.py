r"""FLUX.1 as a model of latents of images, given a text.

    X_t = t X_1 + (1 - t) X_0,  X_1 a latent (rows, columns, channels), X_0 noise
    v_sigma = E[X_0 - X_1 | X_t], the network's output at its time sigma = 1 - t
    D_t(x) = x - sigma v_sigma(x)
    flow map: X_{t,s}(x) = x - (sigma_t - sigma_s) v_{sigma_t, sigma_s}(x)

A flow map is one call of a network with two times; equal times give D.

The noise level sigma, and its sign, appear only in this file. A state is a latent of the
autoencoder, channels last; the network takes 2 x 2 pixels of the latent as one token (`packed`).
The model holds the text, as its T5 states and its pooled CLIP state. They are arguments, not
constants, of compiled programs.

Particles and the draws of a guidance are one batch of the network: by `vmap` with
`attention="xla"`, and as rows with any other attention, because other kernels do not support
`vmap`. With rows, a gradient computes the forward pass once more.

| `snr_factor` of `Lookahead` | one call of a flow map from x, after noise lowers its snr by this
factor |
|---|---|
| 1 | flow-map reward guidance |
| 5, 1.1 | weighted diamond maps |

A flow map may also take the steps of a run. `model.leaping(times)` is a model whose denoiser is the
end of the straight line through the flow's state at the *next* time of this grid, so that a step of
`Euler()` is the flow map itself.

Distilled guidance (a guidance scale other than 1) changes the velocity. The samples then have the
law of the changed flow, and the denoiser is not a posterior mean. References: Black Forest Labs,
FLUX.1;
Holderrieth et al. (arXiv 2602.05993), diamond maps; Esser et al. (arXiv 2403.03206), the shift.
"""

import math
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from tiltjax import _checks, _pytree, grids, models
from tiltjax.images.networks.autoencoder import Autoencoder
from tiltjax.images.networks.transformer import Config, Transformer
from tiltjax.interpolants import Interpolant, Linear
from tiltjax.posteriors import Posterior

FACTOR = 8  # of the published autoencoder; `times` and `memory` assume this factor
_PATCH = 2
# Of the published scheduler: the shift mu at two numbers of tokens, linear in between.
_SHIFTS = (256, 0.5), (4096, 1.15)
# Numbers that a block saves for its gradient, in units of a token's width; with remat only its
# input.
_SAVED = 34


class Parts(_pytree.KeepsDtype):
    """The networks and the text of a `FluxModel`. They keep their dtypes."""

    transformer: Transformer
    text: Array
    pooled: Array
    guidance: Array | None
    autoencoder: Autoencoder | None


class FluxModel(models.Model):
    """FLUX.1 given a text, as a model of latents.

    **Arguments:**

    - `transformer`: a `Transformer`, with two times for a flow map.
    - `text`, `pooled`: the T5 states `(length, joint_attention_dim)` and the pooled CLIP state
      `(pooled_projection_dim,)` of a prompt.
    - `height`, `width`: of the image; multiples of 16, twice the factor of the autoencoder.
    - `guidance`: the guidance scale that is distilled into FLUX.1-dev, 3.5 by default; `None` for
      models without it, such as FLUX.1-schnell.
    - `autoencoder`: for `decode` and `encode`.
    - `dtype`: of the states, float32 by default; the networks compute in their own dtype.

    States have the shape `(height / 8, width / 8, channels)`.

    **Raises:** `ValueError` for sizes and texts that do not match the networks, and for a text that
    is not finite.
    """

    parts: Parts
    interpolant: Interpolant
    leaps: Array | None
    shape: tuple[int, ...] = eqx.field(static=True)
    dtype: Any = eqx.field(static=True)

    def __init__(
        self,
        transformer: Transformer,
        text: Array,
        pooled: Array,
        *,
        height: int,
        width: int,
        guidance: float | Array | None = None,
        autoencoder: Autoencoder | None = None,
        dtype: Any = jnp.float32,
    ):
        _checks.instance(
            transformer, Transformer, "transformer", "loading.load('transformer', folder)"
        )
        config = transformer.config
        text, pooled = _checks.finite(text, "text", 2), _checks.finite(pooled, "pooled", 1)
        for name, array, n in (
            ("text", text, config.joint_attention_dim),
            ("pooled", pooled, config.pooled_projection_dim),
        ):
            if array.shape[-1] != n:
                raise ValueError(
                    f"{name} must have {n} entries per token, got shape {array.shape}: use this "
                    "model's text encoder"
                )
        if guidance is None and config.guidance_embeds:
            guidance = 3.5
        elif guidance is not None and not config.guidance_embeds:
            raise ValueError(
                "this network has no guidance embedding, like FLUX.1-schnell: leave out guidance"
            )
        factor = FACTOR if autoencoder is None else autoencoder.config.factor
        self.shape = latent_shape(config, height, width, factor)
        if autoencoder is not None and autoencoder.config.latent_channels != self.shape[-1]:
            raise ValueError(
                f"the transformer needs latents of {self.shape[-1]} channels, but the autoencoder "
                f"has {autoencoder.config.latent_channels}"
            )
        strength = None if guidance is None else _checks.nonnegative(guidance, "guidance")
        self.parts = Parts(transformer, text, pooled, strength, autoencoder)
        self.interpolant = _pytree.cast(Linear(), dtype)
        self.leaps = None
        self.dtype = jnp.dtype(dtype)

    def _call(self, **given: Any) -> str:
        parts = {"transformer": self.parts.transformer, "guidance": self.parts.guidance}
        return super()._call(**parts | given)

    def denoise(self, t: Array, x: Array) -> Array:
        if self.leaps is None:
            return self._moved(t, t, 1.0, x)
        following = jnp.searchsorted(self.leaps, jnp.asarray(t, self.leaps.dtype), side="right")
        return self._moved(t, self.leaps[jnp.minimum(following, len(self.leaps) - 1)], 1.0, x)

    def leaping(self, times: Array) -> "FluxModel":
        """The model for the steps of one grid, as in published pipelines of flow maps: with
        `Euler()` and these times, a step is `X_{t,u}` in one call.

        `denoise` is then the end of the straight line from x through `X_{t,u}(x)`, where u is the
        next of `times`. It is a posterior mean only in the limit of small steps.

        **Raises:** `ValueError` for a network of one time.
        """
        self._check_dual()
        times = grids.time_grid(times, None)
        return eqx.tree_at(
            lambda model: model.leaps, self, times, is_leaf=lambda leaf: leaf is None
        )

    def flow_map(self, t: Array, x: Array, s: float | Array = 1.0) -> Array:
        """The state at time s of the flow that is at x at time t, in one call.

        **Raises:** `ValueError` for a network of one time.
        """
        self._check_dual()
        return self._moved(t, s, s, x)

    def decode(self, x: Array) -> Array:
        """The image of a latent, `(height, width, 3)` in [0, 1] up to overshoots; for any leading
        axes.
        """
        return self._autoencoder().decode(x)

    def encode(self, images: Array, key: Array | None = None) -> Array:
        """The latent of an image in [0, 1], its mean or (with a key) a draw; for any
        leading axes.
        """
        return self._autoencoder().encode(images, key)

    def _autoencoder(self) -> Autoencoder:
        if self.parts.autoencoder is None:
            raise ValueError(
                "this model has no autoencoder: use FluxModel(..., "
                "autoencoder=loading.load('autoencoder', folder))"
            )
        return self.parts.autoencoder

    def _check_dual(self) -> None:
        if not self.parts.transformer.config.dual_time:
            raise ValueError(
                "this network has one time, so it has no flow map: load the adapters of a flow "
                "map, loading.load(..., adapters=), or integrate the flow, tiltjax.FlowMap(model)"
            )

    def _moved(self, t: Array, target: float | Array, end: float | Array, x: Array) -> Array:
        """`x - (sigma_t - sigma_end) v`, with v the network's velocity at t, or from t to
        `target`.
        """
        as_time = lambda time: jnp.asarray(time, x.dtype)
        t, target, end = as_time(t), as_time(target), as_time(end)
        times = jnp.stack([t, target]) if self.parts.transformer.config.dual_time else t
        parts = self.parts
        arguments = (parts.transformer, parts.text, parts.pooled, parts.guidance)
        # Kernels without `vmap` take rows of a batch, and the pullback then computes the forward
        # pass again. JAX's own operations use `vmap`, so that the forward pass of a guided step
        # also serves its gradient.
        batched = parts.transformer.attention != "xla"
        net = models.Net(_velocity if batched else _velocity_of_one, arguments)
        return x + (t - end) * models.call_network(net, times, x, x.shape, batched=batched)


class Lookahead(Posterior):
    """Draws by a learned flow map, with one call of the network. A draw first adds noise to x,
    which lowers the signal-to-noise ratio (snr), and then returns the end of the flow map.
    `tiltjax.posteriors.Renoise` does the same without a learned map.

    **Arguments:** `model`, a `FluxModel` of a network with two times; `snr_factor >= 1`, the factor
    by which the snr falls. With 1, no noise is added.

    **Raises:** `ValueError` for a network with one time, and a factor below 1.
    """

    model: FluxModel
    snr_factor: Array

    def __init__(self, model: FluxModel, snr_factor: float | Array = 1.0):
        _checks.instance(
            model,
            FluxModel,
            "model",
            "use Lookahead(FluxModel(...)); for any other model, tiltjax.posteriors.Renoise",
        )
        if not model.parts.transformer.config.dual_time:
            raise ValueError(
                "this model's network has one time: load the adapters of a flow map, or use "
                "tiltjax.Renoise"
            )
        self.model = model
        self.snr_factor = _checks.in_range(snr_factor, "snr_factor", 1, closed="left")

    def draw(self, key: Array, t: Array, x: Array) -> Array:
        interpolant = self.model.interpolant
        s = interpolant.time(interpolant.snr(t) / self.snr_factor)
        spread = interpolant.sigma(s) * jnp.sqrt(1 - 1 / self.snr_factor)
        noise = spread * jax.random.normal(key, x.shape, x.dtype)
        return self.model.flow_map(s, interpolant.alpha(s) / interpolant.alpha(t) * x + noise)


def times(
    steps: int, height: int, width: int, *, start: float = 1e-3, mu: float | None = None
) -> Array:
    """The grid of the published scheduler, for `sample(..., times=)`, `(steps + 1,)`, increasing to
    1. Steps are denser near the noise. The larger the image, the stronger this effect.

    A time is `1 - sigma` with `sigma = e^mu / (e^mu + 1 / u - 1)`, for `steps` equally spaced
    values u from 1 to `1 / steps`. The last sigma is 0. mu is linear in the number of tokens.

    **Arguments:** `steps`; `height` and `width` of the image; `start`, the first time. The
    published first time is 0, where x has no information for a guidance and division by t gives
    infinity. `mu`, 0 for FLUX.1-schnell, which is not shifted.

    **Raises:** `ValueError` for a first step that would end before `start`.
    """
    steps = _checks.count(steps, "steps")
    if mu is None:
        tokens = math.prod(latent_shape(Config(), height, width)[:2]) / _PATCH**2
        (few, low), (many, high) = _SHIFTS
        mu = low + (high - low) * (tokens - few) / (many - few)
    u = np.linspace(1.0, 1 / steps, steps)
    sigma = math.exp(mu) / (math.exp(mu) + 1 / u - 1)
    grid = np.append(1 - sigma, 1.0)
    grid[0] = start
    if not grid[0] < grid[1]:
        raise ValueError(
            f"the first step of {steps} ends at t = {grid[1]:.3g}, before start = {start:g}: use a "
            "smaller start or fewer steps"
        )
    return jnp.asarray(grid, jnp.result_type(float))


def latent_shape(
    config: Config, height: int, width: int, factor: int = FACTOR
) -> tuple[int, int, int]:
    """The shape of a state. **Raises:** `ValueError` for sizes that are not whole tokens."""
    unit = _PATCH * factor
    height, width = _checks.count(height, "height"), _checks.count(width, "width")
    if height % unit or width % unit:
        near = [max(unit, unit * round(n / unit)) for n in (height, width)]
        raise ValueError(
            f"height and width must be multiples of {unit}, got {height} x {width}: use, for "
            f"example, {near[0]} x {near[1]}"
        )
    return height // factor, width // factor, config.in_channels // _PATCH**2


def packed(x: Array) -> Array:
    """Latents `(batch, rows, columns, channels)` as tokens,
    `(batch, rows * columns / 4, 4 * channels)`, with the channels slowest, as published.
    """
    n, rows, columns, channels = x.shape
    x = x.reshape(n, rows // _PATCH, _PATCH, columns // _PATCH, _PATCH, channels)
    return x.transpose(0, 1, 3, 5, 2, 4).reshape(n, -1, channels * _PATCH**2)


def unpacked(tokens: Array, rows: int, columns: int) -> Array:
    """The inverse of `packed`."""
    n, _, channels = tokens.shape
    x = tokens.reshape(n, rows // _PATCH, columns // _PATCH, channels // _PATCH**2, _PATCH, _PATCH)
    return x.transpose(0, 1, 4, 2, 5, 3).reshape(n, rows, columns, channels // _PATCH**2)


class Memory(NamedTuple):
    """Bytes of the parameters, and of the arrays that a forward pass or a gradient stores."""

    parameters: int
    activations: int

    @property
    def total(self) -> int:
        """The sum of both."""
        return self.parameters + self.activations


def memory(
    config: Config,
    height: int,
    width: int,
    *,
    chunk_size: int = 1,
    length: int = 512,
    itemsize: int = 2,
    gradient: bool = True,
    remat: bool = False,
    fused: bool = True,
) -> Memory:
    """An estimate of the memory of a transformer, on one device or on all devices together.

    A block saves for its gradient 34 numbers per unit of a token's width, or only its input with
    `remat`. Without fused attention it also saves the scores of all pairs of tokens, in float32 and
    once more in the dtype of the computation. A forward pass stores one block at a time.

    **Arguments:** `config`; `height` and `width` of the image; `chunk_size`, particles times draws
    at once; `length` of the text; `itemsize`, 2 bytes for bfloat16; `gradient`, whether a gradient
    is computed; `remat`, `fused`, as the options of the network.
    """
    rows, columns, _ = latent_shape(config, height, width)
    tokens = chunk_size * (rows * columns // _PATCH**2 + length)
    abstract = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    parameters = sum(
        math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(abstract, nnx.Param))
    )
    n = config.width
    block = _SAVED * n * tokens * itemsize
    if not fused:
        block += config.num_attention_heads * tokens**2 // chunk_size * (4 + itemsize)
    depth = config.num_layers + config.num_single_layers
    if gradient:
        block = block + depth * n * tokens * itemsize if remat else depth * block
    return Memory(parameters * itemsize, block)


def check_memory(needed: Memory, available: int | None = None) -> None:
    """Raise a `MemoryError`, with the missing memory and ways to reduce it, if `needed` exceeds the
    available memory.

    **Arguments:** `needed`; `available`, bytes, by default the limit of JAX on all local devices,
    if they report it.
    """
    if available is None:
        limits = [
            (device.memory_stats() or {}).get("bytes_limit") for device in jax.local_devices()
        ]
        if any(limit is None for limit in limits):
            return
        available = sum(limit for limit in limits if limit is not None)
    if needed.total <= available:
        return
    gib = lambda n: f"{n / 2**30:.1f} GiB"
    raise MemoryError(
        f"about {gib(needed.total)} are needed, {gib(needed.parameters)} for parameters and "
        f"{gib(needed.activations)} for activations, but {gib(available)} are available. To reduce "
        "it: param_dtype=jnp.bfloat16; remat=True and attention='cudnn' (or your own fused kernel) "
        "for gradients; a smaller image; fewer particles at a time, sample(..., chunk_size=); more "
        "devices, load(..., sharding=transformer.sharded(mesh))"
    )


def _velocity_of_one(parts: tuple, t: Array, x: Array) -> Array:
    return _velocity(parts, t[None], x[None])[0]


def _velocity(parts: tuple, t: Array, x: Array) -> Array:
    """The network's `E[X_0 - X_1]` for times `(batch,)` or `(batch, 2)` and latents
    `(batch, *shape)`.
    """
    transformer, text, pooled, guidance = parts
    strength = None if guidance is None else jnp.broadcast_to(guidance, (len(x),))
    rows, columns = x.shape[1:3]
    grid = rows // _PATCH, columns // _PATCH
    tokens = transformer(packed(x), 1 - t, text[None], pooled[None], strength, grid=grid)
    return unpacked(tokens.astype(x.dtype), rows, columns)
