r"""The FLUX.1 transformer: a velocity for latent images, given a text.

    temb = MLP_t(1000 sigma) [+ MLP_g(1000 guidance)] + MLP_p(pooled text)
    tokens = [text, image]
    block:   x + gate * f(shift + (1 + scale) * norm(x)),  (shift, scale, gate) = linear(silu(temb))
    velocity = linear(shift + (1 + scale) * norm(image tokens))

Double blocks have separate weights for text and image, and one attention over both. Single blocks
have one stream.

Attention normalizes queries and keys by their root mean square, separately for text and image. Then
it rotates the pairs `(2i, 2i + 1)` of each head by `position / 10000^(2i / d)`. A position has
three axes: zero, the row, and the column; all are zero for text. Angles are float64 in NumPy.

A *flow map* is the same network with two times, from sigma to a later one. It has two copies of
every embedder, and `temb` is their mean. Equal times give the velocity.

Blocks of one kind are stacked on a leading axis and scanned, so that the program for 57 blocks is
as long as for 2.
| option | |
|---|---|
| `dtype`, `param_dtype` | of the computation and of the parameters |
| `remat` | recompute blocks in the backward pass; or a checkpoint policy of JAX |
| `attention` | `"xla"`, `"cudnn"` (GPU, 16 bit, no forward mode), or `(q, k, v) -> values` |
| `timestep_dtype` | of sigma and the guidance, by default at least float32 |

Queries, keys and values are `(batch, tokens, heads, dim)`. Statistics, rotations and times are at
least float32. `timestep_dtype=bfloat16` reproduces the published pipeline, which rounds before it
multiplies by 1000.

Reference: Black Forest Labs, FLUX.1; Esser et al. (arXiv 2403.03206), the architecture; Su et al.
(arXiv 2104.09864), rotations.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from tiltjax import _checks
from tiltjax.images.networks import embeddings, layers
from tiltjax.pretrained.state_dicts import Placement

RENAMES = {
    "to_out": "to_out.0",
    "ff.up": "ff.net.0.proj",
    "ff.down": "ff.net.2",
    "ff_context.up": "ff_context.net.0.proj",
    "ff_context.down": "ff_context.net.2",
}
STACKED = ("transformer_blocks", "single_transformer_blocks")
_EPSILON = 1e-6
Attention = str | Callable[[Array, Array, Array], Array]


@dataclasses.dataclass(frozen=True)
class Config:
    """The configuration of the transformer, with the published names; by default that of
    FLUX.1-dev.

    `dual_time` is not a published entry. It selects two times, for a flow map.
    """

    patch_size: int = 1
    in_channels: int = 64
    out_channels: int | None = None
    num_layers: int = 19
    num_single_layers: int = 38
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096
    pooled_projection_dim: int = 768
    guidance_embeds: bool = True
    axes_dims_rope: tuple[int, int, int] = (16, 56, 56)
    dual_time: bool = False

    def __post_init__(self):
        object.__setattr__(self, "axes_dims_rope", tuple(self.axes_dims_rope))
        if sum(self.axes_dims_rope) != self.attention_head_dim or any(
            n % 2 for n in self.axes_dims_rope
        ):
            raise ValueError(
                "axes_dims_rope must be even and add up to attention_head_dim = "
                f"{self.attention_head_dim}, got {self.axes_dims_rope}"
            )
        if len(self.axes_dims_rope) != 3 or self.patch_size != 1:
            raise ValueError(
                f"axes_dims_rope must have three entries and patch_size must be 1, as in FLUX.1, "
                f"got {self.axes_dims_rope} and {self.patch_size}"
            )

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> "Config":
        """The configuration from the published `config.json`, a dictionary.

        **Raises:** `ValueError` for entries that this architecture does not have.
        """
        settings = {name: value for name, value in config.items() if not name.startswith("_")}
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(settings.keys() - known):
            raise ValueError(
                f"not a configuration of the FLUX.1 transformer: unknown {', '.join(unknown)}; it "
                f"has {', '.join(sorted(known))}"
            )
        # The published file leaves this entry out if it is false.
        return cls(**{"guidance_embeds": False, **settings})

    @property
    def width(self) -> int:
        """The width of a token."""
        return self.num_attention_heads * self.attention_head_dim


class _Layers:
    """Builds layers of one dtype."""

    def __init__(self, dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
        self.options = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}

    def linear(self, n: int, m: int) -> nnx.Linear:
        return nnx.Linear(n, m, **self.options)

    def head_norm(self, n: int) -> layers.Norm:
        return layers.Norm(n, epsilon=_EPSILON, dtype=self.options["param_dtype"], center=False)


class Embedder(nnx.Module):
    """Two layers with a silu between them."""

    def __init__(self, n: int, width: int, make: _Layers):
        self.linear_1 = make.linear(n, width)
        self.linear_2 = make.linear(width, width)

    def __call__(self, x: Array) -> Array:
        return self.linear_2(nnx.silu(self.linear_1(x)))


class TimeTextEmbed(nnx.Module):
    """The embedding of time, guidance and pooled text that modulates every block,
    `(batch, width)`.
    """

    def __init__(self, config: Config, make: _Layers):
        self.timestep_embedder = Embedder(2 * embeddings.FREQUENCIES, config.width, make)
        if config.guidance_embeds:
            self.guidance_embedder = Embedder(2 * embeddings.FREQUENCIES, config.width, make)
        self.text_embedder = Embedder(config.pooled_projection_dim, config.width, make)

    def __call__(self, sigma: Array, guidance: Array | None, pooled: Array) -> Array:
        embedded = self.timestep_embedder(embeddings.of_time(sigma))
        if guidance is not None:
            embedded = embedded + self.guidance_embedder(embeddings.of_time(guidance))
        return embedded + self.text_embedder(pooled)


class DualTimeTextEmbed(nnx.Module):
    """The mean of two embeddings, for the start time and the end time of a flow map."""

    def __init__(self, config: Config, make: _Layers):
        self.original_embedder = TimeTextEmbed(config, make)
        self.second_embedder = TimeTextEmbed(config, make)

    def __call__(self, sigma: Array, guidance: Array | None, pooled: Array) -> Array:
        first = self.original_embedder(sigma[:, 0], guidance, pooled)
        return (first + self.second_embedder(sigma[:, 1], guidance, pooled)) / 2


class Modulation(nnx.Module):
    """`n` vectors for each sample, as `(batch, 1, width)`, from the modulating embedding."""

    def __init__(self, width: int, n: int, make: _Layers):
        self.linear = make.linear(width, n * width)
        self.n = n

    def __call__(self, temb: Array) -> list[Array]:
        return jnp.split(self.linear(nnx.silu(temb))[:, None], self.n, axis=-1)


class FeedForward(nnx.Module):
    """Two layers with a gelu between them, four times as wide."""

    def __init__(self, width: int, make: _Layers):
        self.up = make.linear(width, 4 * width)
        self.down = make.linear(4 * width, width)

    def __call__(self, x: Array) -> Array:
        return self.down(nnx.gelu(self.up(x)))


class JointAttention(nnx.Module):
    """Attention over image tokens, and over text tokens with separate projections if `text`."""

    def __init__(self, config: Config, make: _Layers, *, text: bool):
        width, head = config.width, config.attention_head_dim
        self.heads = config.num_attention_heads
        self.to_q, self.to_k, self.to_v = (make.linear(width, width) for _ in range(3))
        self.norm_q, self.norm_k = make.head_norm(head), make.head_norm(head)
        if text:
            self.add_q_proj, self.add_k_proj, self.add_v_proj = (
                make.linear(width, width) for _ in range(3)
            )
            self.norm_added_q, self.norm_added_k = make.head_norm(head), make.head_norm(head)
            self.to_out, self.to_add_out = make.linear(width, width), make.linear(width, width)

    def image(self, x: Array) -> tuple[Array, Array, Array]:
        """Queries, keys and values, `(batch, tokens, heads, dim)`."""
        q, k, v = (self._split(layer(x)) for layer in (self.to_q, self.to_k, self.to_v))
        return self.norm_q(q), self.norm_k(k), v

    def text(self, x: Array) -> tuple[Array, Array, Array]:
        """Queries, keys and values of text tokens."""
        q, k, v = (
            self._split(layer(x)) for layer in (self.add_q_proj, self.add_k_proj, self.add_v_proj)
        )
        return self.norm_added_q(q), self.norm_added_k(k), v

    def _split(self, x: Array) -> Array:
        return x.reshape(*x.shape[:-1], self.heads, -1)


class DoubleBlock(nnx.Module):
    """Text and image in two streams that attend to each other."""

    def __init__(self, config: Config, make: _Layers):
        width = config.width
        self.norm1, self.norm1_context = Modulation(width, 6, make), Modulation(width, 6, make)
        self.attn = JointAttention(config, make, text=True)
        self.ff, self.ff_context = FeedForward(width, make), FeedForward(width, make)

    def __call__(
        self,
        image: Array,
        text: Array,
        temb: Array,
        rotation: tuple[Array, Array],
        attention: Attention,
    ) -> tuple[Array, Array]:
        shift, scale, gate, shift_ff, scale_ff, gate_ff = self.norm1(temb)
        text_shift, text_scale, text_gate, text_shift_ff, text_scale_ff, text_gate_ff = (
            self.norm1_context(temb)
        )
        own = self.attn.image(_modulated(_normed(image), shift, scale))
        other = self.attn.text(_modulated(_normed(text), text_shift, text_scale))
        q, k, v = (jnp.concatenate(pair, axis=1) for pair in zip(other, own, strict=True))
        values = _attend(attention, q, k, v, rotation)
        text_values, values = values[:, : text.shape[1]], values[:, text.shape[1] :]
        image = image + gate * self.attn.to_out(values)
        image = image + gate_ff * self.ff(_modulated(_normed(image), shift_ff, scale_ff))
        text = text + text_gate * self.attn.to_add_out(text_values)
        text = text + text_gate_ff * self.ff_context(
            _modulated(_normed(text), text_shift_ff, text_scale_ff)
        )
        return image, text


class SingleBlock(nnx.Module):
    """Text and image in one stream, with attention next to the feed-forward layer."""

    def __init__(self, config: Config, make: _Layers):
        width = config.width
        self.norm = Modulation(width, 3, make)
        self.attn = JointAttention(config, make, text=False)
        self.proj_mlp = make.linear(width, 4 * width)
        self.proj_out = make.linear(5 * width, width)

    def __call__(
        self, x: Array, temb: Array, rotation: tuple[Array, Array], attention: Attention
    ) -> Array:
        shift, scale, gate = self.norm(temb)
        normed = _modulated(_normed(x), shift, scale)
        values = _attend(attention, *self.attn.image(normed), rotation)
        return x + gate * self.proj_out(
            jnp.concatenate([values, nnx.gelu(self.proj_mlp(normed))], axis=-1)
        )


class Transformer(nnx.Module):
    """The network. `transformer(tokens, sigma, text, pooled, guidance, grid=(rows, columns))` is
    the velocity `dx / dsigma`, noise minus data.

    **Arguments:** `config`; the options of the module's docstring; `rngs`, for the initial weights.
    """

    def __init__(
        self,
        config: Config,
        *,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        remat: bool | Callable = False,
        attention: Attention = "xla",
        timestep_dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        _checks.instance(config, Config, "config", "Config.from_json(published configuration)")
        if attention not in ("xla", "cudnn") and not callable(attention):
            raise ValueError(
                "attention must be 'xla', 'cudnn' or a function (query, key, value), got "
                f"{attention!r}"
            )
        make = _Layers(dtype, param_dtype, rngs)
        self.config, self.dtype = config, jnp.dtype(dtype)
        self.timestep_dtype = jnp.dtype(
            layers.wide(dtype) if timestep_dtype is None else timestep_dtype
        )
        self.remat, self.attention = remat, attention
        self.x_embedder = make.linear(config.in_channels, config.width)
        self.context_embedder = make.linear(config.joint_attention_dim, config.width)
        self.time_text_embed = (DualTimeTextEmbed if config.dual_time else TimeTextEmbed)(
            config, make
        )

        def stack(block: Callable, n: int) -> Any:
            one = lambda keys: block(config, _Layers(dtype, param_dtype, keys))
            return layers.stacked(one, n, rngs)

        self.transformer_blocks = stack(DoubleBlock, config.num_layers)
        self.single_transformer_blocks = stack(SingleBlock, config.num_single_layers)
        self.norm_out = Modulation(config.width, 2, make)
        self.proj_out = make.linear(config.width, config.out_channels or config.in_channels)

    def __call__(
        self,
        tokens: Array,
        sigma: Array,
        text: Array,
        pooled: Array,
        guidance: Array | None = None,
        *,
        grid: tuple[int, int],
    ) -> Array:
        """The velocity of each image token, `(batch, rows * columns, out_channels)`, in the
        network's dtype.

        **Arguments:**

        - `tokens`: `(batch, rows * columns, in_channels)`; `grid`, their rows and columns.
        - `sigma`: `(batch,)`, 1 at the noise and 0 at the data; with dual time `(batch, 2)`, the
          start and the end.
        - `text`, `pooled`: `(batch, length, joint_attention_dim)` and
          `(batch, pooled_projection_dim)`; a batch of 1 is used for all samples.
        - `guidance`: `(batch,)`, the guidance scale that was distilled into the network, if
          `guidance_embeds`.

        **Raises:** `ValueError` for other shapes.
        """
        self._check(tokens, sigma, text, pooled, guidance, grid)
        rounded = lambda value: value.astype(self.timestep_dtype) * 1000
        strength = None if guidance is None else rounded(guidance)
        temb = self.time_text_embed(rounded(sigma), strength, pooled.astype(self.dtype))
        image = self.x_embedder(tokens.astype(self.dtype))
        text = self.context_embedder(text.astype(self.dtype))
        text = jnp.broadcast_to(text, (len(image), *text.shape[1:]))
        rotation = embeddings.rotations(self.config.axes_dims_rope, text.shape[1], grid, self.dtype)

        def double(
            carry: tuple[Array, Array], block: DoubleBlock
        ) -> tuple[tuple[Array, Array], None]:
            return block(*carry, temb, rotation, self.attention), None

        def single(carry: Array, block: SingleBlock) -> tuple[Array, None]:
            return block(carry, temb, rotation, self.attention), None

        (image, text), _ = jax.lax.scan(self._saved(double), (image, text), self.transformer_blocks)
        both = jnp.concatenate([text, image], axis=1)
        both, _ = jax.lax.scan(self._saved(single), both, self.single_transformer_blocks)
        scale, shift = self.norm_out(temb)
        return self.proj_out(_modulated(_normed(both[:, text.shape[1] :]), shift, scale))

    def _saved(self, body: Callable) -> Callable:
        if not self.remat:
            return body
        return jax.checkpoint(
            body, prevent_cse=False, policy=self.remat if callable(self.remat) else None
        )

    def _check(self, tokens, sigma, text, pooled, guidance, grid) -> None:
        config, n = self.config, len(tokens)
        expected = {
            "tokens": (tokens.shape, (n, grid[0] * grid[1], config.in_channels)),
            "sigma": (sigma.shape, (n, 2) if config.dual_time else (n,)),
            "text": (
                text.shape[:1] + text.shape[2:],
                (len(text) if len(text) in (1, n) else n, config.joint_attention_dim),
            ),
            "pooled": (
                pooled.shape,
                (len(pooled) if len(pooled) in (1, n) else n, config.pooled_projection_dim),
            ),
        }
        if guidance is not None:
            expected["guidance"] = guidance.shape, (n,)
        wrong = [
            f"{name} has shape {got}, expected {want}"
            for name, (got, want) in expected.items()
            if got != want
        ]
        if wrong:
            raise ValueError(f"a {grid[0]} x {grid[1]} image of {n} samples: {'; '.join(wrong)}")
        if (guidance is None) == config.guidance_embeds:
            raise ValueError(
                "this network was trained with a guidance scale: pass guidance, such as 3.5"
                if config.guidance_embeds
                else "this network has no guidance embedding (guidance_embeds is false): pass "
                "guidance=None"
            )


def sharded(mesh: Mesh, data: str = "data", model: str = "model") -> Placement:
    """A function that places parameters on a mesh, for
    `state_dicts.from_state_dict(..., sharding=sharded(mesh))`. Matrices are divided on both axes;
    everything else is on every device.

    Layers that widen are divided on the axis `model` by their output, and layers that narrow by
    their input, as in tensor parallelism. The other side is divided on the axis `data` (FSDP). An
    axis of the mesh with one device, or whose number of devices does not divide the side, divides
    nothing.
    """

    def placement(path: tuple, leaf: Any) -> NamedSharding:
        axes: list[str | None] = [None] * leaf.ndim
        if path[-1] == "kernel":
            narrows = bool({"to_out", "to_add_out", "down", "proj_out"} & set(path))
            axes[-2:] = [model, data] if narrows else [data, model]
        fits = [
            axis if axis and n % mesh.shape[axis] == 0 else None
            for axis, n in zip(axes, leaf.shape, strict=True)
        ]
        return NamedSharding(mesh, PartitionSpec(*fits))

    return placement


def _normed(x: Array) -> Array:
    """x with mean 0 and variance 1 over the last axis."""
    return layers.standardized(x.astype(layers.wide(x.dtype)), _EPSILON).astype(x.dtype)


def _modulated(x: Array, shift: Array, scale: Array) -> Array:
    return x * (1 + scale) + shift


def _attend(
    attention: Attention, q: Array, k: Array, v: Array, rotation: tuple[Array, Array]
) -> Array:
    """Values `(batch, tokens, width)` for rotated queries and keys."""
    q, k = embeddings.rotated(q, rotation), embeddings.rotated(k, rotation)
    if attention == "xla":
        values = layers.attention(q, k, v, scale=1 / math.sqrt(q.shape[-1]))
    elif attention == "cudnn":
        values = jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
    else:
        values = cast(Callable, attention)(q, k, v)
    return values.reshape(*values.shape[:2], -1)
