r"""The autoencoder of FLUX.1 from images to latents of an eighth of the side, and back,
differentiable in both directions.

    image      x in [0, 1], (H, W, 3)
    encoder    mean m and log-variance s of 2x - 1, (H/f, W/f, c) each
    latent     z = (m + exp(s / 2) xi - shift) * scaling,      xi = 0 without a key
    decoded    x = (decoder(z / scaling + shift) + 1) / 2

    encoder   conv_in - [resnets - downsampler] * levels - mid - norm, silu, conv_out
    decoder   conv_in - mid - [resnets - upsampler] * levels - norm, silu, conv_out
    resnet    x + conv(silu(norm(conv(silu(norm(x))))))
    mid       resnet - attention of all pixels - resnet

with c = 16 channels, f = 8, scaling .3611, shift .1159 for FLUX.1. A level doubles the side by
nearest neighbors and a convolution, or halves it by a convolution of stride 2, padded only below
and on the right. Norms are group norms with epsilon 1e-6.

| option | effect |
|---|---|
| `remat` | save only the states between resnets: less memory for one more forward pass |
| `chunk_size` | queries of the attention at once, each with n scores, n = H W / f^2 |
| `param_dtype` | of the parameters and the computation |

`remat` is for accelerators; on a CPU, XLA undoes it. A decoded image is not clipped:
`tiltjax.images.rewards.Decoded` clips it. Convolutions have no forward mode (`layers.convolved`).

Attributes have the names of the published parameters (`tiltjax.pretrained.state_dicts`). Reference:
Rombach et al., arXiv 2112.10752; FLUX.1 by Black Forest Labs.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from tiltjax import _checks
from tiltjax.images.networks import layers
from tiltjax.pretrained import state_dicts

_IMPLIED = {
    "act_fn": ("silu",),
    "mid_block_add_attention": (True,),
    "latents_mean": (None,),
    "latents_std": (None,),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """The sizes of an autoencoder, by default those of FLUX.1. `factor` is the ratio of the sides
    of an image and its latent.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 16
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scaling_factor: float = 0.3611
    shift_factor: float = 0.1159

    @classmethod
    def from_json(cls, published: Mapping[str, Any]) -> "Config":
        """The sizes from the published `config.json` of an `AutoencoderKL`.

        **Raises:** `ValueError` for a setting that is not implemented.
        """
        absent = {
            "block_out_channels": (64,),
            "layers_per_block": 1,
            "latent_channels": 4,
            "scaling_factor": 0.18215,
        }
        depth = len(published.get("block_out_channels", absent["block_out_channels"]))
        kinds = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}
        implied = _IMPLIED | {name: ((kind,) * depth,) for name, kind in kinds.items()}
        # If these are absent, the published class takes them as true.
        for name in ("use_quant_conv", "use_post_quant_conv"):
            if published.get(name, True) is not False:
                raise ValueError(
                    f"{name} = True is not implemented: the autoencoder of FLUX.1 has no such layer"
                )
        published = {
            name: value
            for name, value in published.items()
            if (name, value) != ("shift_factor", None)
        }
        return layers.configuration(cls, published, implied, **absent, shift_factor=0.0)

    @property
    def factor(self) -> int:
        return 2 ** (len(self.block_out_channels) - 1)


class Autoencoder(nnx.Module):
    """The autoencoder, for one image or any leading axes.

    **Arguments:** `config`; `remat`, `chunk_size`, `param_dtype`, as in the module's docstring;
    `rngs`, for the initial weights.
    """

    def __init__(
        self,
        config: Config,
        *,
        remat: bool = False,
        chunk_size: int | None = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.config = config
        make = _Make(
            config.norm_num_groups,
            bool(remat),
            None if chunk_size is None else _checks.count(chunk_size, "chunk_size"),
            param_dtype,
            rngs,
        )
        self.encoder = Encoder(config, make)
        self.decoder = Decoder(config, make)

    def moments(self, images: Array) -> tuple[Array, Array]:
        """The mean and the log-variance of the encoder's Gaussian, before scaling.

        **Raises:** `ValueError` for another shape.
        """
        config = self.config
        *lead, height, width, channels = _places(images, "images", config.in_channels)
        if height % config.factor or width % config.factor:
            raise ValueError(
                f"sides must be multiples of {config.factor}, got an image of {height} x {width}: "
                "crop or resize it"
            )
        batch = _inner(self.encoder, 2 * images.reshape(-1, height, width, channels) - 1)
        mean, log_variance = jnp.split(self.encoder(batch), 2, axis=-1)
        shape = (*lead, *mean.shape[1:])
        # The limits are part of the model: its decoder was trained on variances inside of them.
        limited = jnp.clip(log_variance, -30, 20)
        return mean.astype(images.dtype).reshape(shape), limited.astype(images.dtype).reshape(shape)

    def encode(self, images: Array, key: Array | None = None) -> Array:
        """Latents of images in [0, 1]: the mean, or a draw if there is a key.

        **Raises:** `ValueError` for another shape.
        """
        latents, log_variance = self.moments(images)
        if key is not None:
            noise = jax.random.normal(_checks.key(key), latents.shape, latents.dtype)
            latents += jnp.exp(log_variance / 2) * noise
        return (latents - self.config.shift_factor) * self.config.scaling_factor

    def decode(self, latents: Array) -> Array:
        """Images of latents, in [0, 1] up to overshoots, which are not clipped.

        **Raises:** `ValueError` for another shape.
        """
        config = self.config
        *lead, height, width, channels = _places(latents, "latents", config.latent_channels)
        latents = latents / config.scaling_factor + config.shift_factor
        decoded = self.decoder(
            _inner(self.decoder, latents.reshape(-1, height, width, channels))
        ).astype(latents.dtype)
        return (decoded.reshape(*lead, *decoded.shape[1:]) + 1) / 2


class Encoder(nnx.Module):
    """The encoder, from `(batch, H, W, 3)` in [-1, 1] to means and log-variances,
    `(batch, H/f, W/f, 2c)`.
    """

    def __init__(self, config: Config, make: "_Make"):
        widths, last = config.block_out_channels, config.block_out_channels[-1]
        self.conv_in = make.conv(config.in_channels, widths[0])
        before = (widths[0], *widths)
        self.down_blocks = nnx.List(
            [
                Level(n, m, config.layers_per_block, make, down=level < len(widths) - 1)
                for level, (n, m) in enumerate(zip(before, widths, strict=False))
            ]
        )
        self.mid_block = Mid(last, make)
        self.conv_norm_out = make.norm(last)
        self.conv_out = make.conv(last, 2 * config.latent_channels)

    def __call__(self, x: Array) -> Array:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(nnx.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nnx.Module):
    """The decoder, from latents without scaling, `(batch, h, w, c)`, to images in [-1, 1],
    `(batch, fh, fw, 3)`.
    """

    def __init__(self, config: Config, make: "_Make"):
        widths = config.block_out_channels[::-1]
        self.conv_in = make.conv(config.latent_channels, widths[0])
        self.mid_block = Mid(widths[0], make)
        before = (widths[0], *widths)
        self.up_blocks = nnx.List(
            [
                Level(n, m, config.layers_per_block + 1, make, up=level < len(widths) - 1)
                for level, (n, m) in enumerate(zip(before, widths, strict=False))
            ]
        )
        self.conv_norm_out = make.norm(widths[-1])
        self.conv_out = make.conv(widths[-1], config.out_channels)

    def __call__(self, z: Array) -> Array:
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(nnx.silu(self.conv_norm_out(x)))


class Level(nnx.Module):
    """Resnets at one resolution, and the change to the next resolution if there is one."""

    def __init__(
        self, n: int, m: int, depth: int, make: "_Make", *, down: bool = False, up: bool = False
    ):
        self.resnets = nnx.List([Resnet(n if i == 0 else m, m, make) for i in range(depth)])
        if down:
            self.downsamplers = nnx.List([Downsample(m, make)])
        if up:
            self.upsamplers = nnx.List([Upsample(m, make)])

    def __call__(self, x: Array) -> Array:
        for resnet in self.resnets:
            x = resnet(x)
        for resize in (*getattr(self, "downsamplers", ()), *getattr(self, "upsamplers", ())):
            x = resize(x)
        return x


class Mid(nnx.Module):
    """A resnet, an attention layer, a resnet."""

    def __init__(self, n: int, make: "_Make"):
        self.resnets = nnx.List([Resnet(n, n, make), Resnet(n, n, make)])
        self.attentions = nnx.List([Attention(n, make)])

    def __call__(self, x: Array) -> Array:
        first, second = self.resnets
        return second(self.attentions[0](first(x)))


class Resnet(nnx.Module):
    """`x + f(x)` with two convolutions in f. If the number of channels changes, x passes through a
    1 x 1 convolution.
    """

    def __init__(self, n: int, m: int, make: "_Make"):
        self.norm1, self.conv1 = make.norm(n), make.conv(n, m)
        self.norm2, self.conv2 = make.norm(m), make.conv(m, m)
        if n != m:
            self.conv_shortcut = make.conv(n, m, 1)
        self.remat = make.remat

    def __call__(self, x: Array) -> Array:
        return jax.checkpoint(_resnet)(self, x) if self.remat else _resnet(self, x)


def _resnet(self: Resnet, x: Array) -> Array:
    h = self.conv1(nnx.silu(self.norm1(x)))
    h = self.conv2(nnx.silu(self.norm2(h)))
    return h + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)


class Downsample(nnx.Module):
    """Half the side, by a convolution of stride 2 with a row of zeros below and a column of zeros
    on the right.
    """

    def __init__(self, n: int, make: "_Make"):
        self.conv = make.conv(n, n, stride=2, padding=((0, 1), (0, 1)))

    def __call__(self, x: Array) -> Array:
        return self.conv(x)


class Upsample(nnx.Module):
    """Twice the side: every pixel is repeated four times, then a convolution follows."""

    def __init__(self, n: int, make: "_Make"):
        self.conv = make.conv(n, n)

    def __call__(self, x: Array) -> Array:
        b, height, width, n = x.shape
        doubled = jnp.broadcast_to(x[:, :, None, :, None], (b, height, 2, width, 2, n))
        return self.conv(doubled.reshape(b, 2 * height, 2 * width, n))


class Attention(nnx.Module):
    """`x + attention(norm(x))` with one head over all pixels."""

    def __init__(self, n: int, make: "_Make"):
        self.group_norm = make.norm(n)
        self.to_q, self.to_k, self.to_v = (make.linear(n) for _ in range(3))
        self.to_out = nnx.List([make.linear(n)])
        self.chunk_size = make.chunk_size

    def __call__(self, x: Array) -> Array:
        b, height, width, n = x.shape
        h = self.group_norm(x).reshape(b, height * width, n)
        q, k, v = (project(h) for project in (self.to_q, self.to_k, self.to_v))
        # The one head is the second-to-last axis.
        attend = lambda q: layers.attention(q, k[:, :, None], v[:, :, None], scale=1 / math.sqrt(n))
        if self.chunk_size is None:
            h = attend(q[:, :, None])
        else:
            # The gradient recomputes the scores of a chunk, because they are too large to save.
            rows = jax.lax.map(
                jax.checkpoint(lambda q: attend(q[:, None, None])),
                q.swapaxes(0, 1),
                batch_size=self.chunk_size,
            )
            h = rows[:, :, 0].swapaxes(0, 1)
        return x + self.to_out[0](h.reshape(b, height, width, n))


@dataclasses.dataclass(frozen=True)
class _Make:
    """The settings of all layers, and functions that build layers."""

    groups: int
    remat: bool
    chunk_size: int | None
    dtype: Any
    rngs: nnx.Rngs

    def conv(
        self, n: int, m: int, size: int = 3, *, stride: int = 1, padding: Any = "SAME"
    ) -> nnx.Conv:
        return nnx.Conv(
            n,
            m,
            (size, size),
            strides=stride,
            padding=padding,
            conv_general_dilated=layers.convolved,
            dtype=self.dtype,
            param_dtype=self.dtype,
            rngs=self.rngs,
        )

    def linear(self, n: int) -> nnx.Linear:
        return nnx.Linear(n, n, dtype=self.dtype, param_dtype=self.dtype, rngs=self.rngs)

    def norm(self, n: int) -> layers.Norm:
        if n % self.groups:
            raise ValueError(f"{n} channels must be a multiple of norm_num_groups = {self.groups}")
        return layers.Norm(n, groups=self.groups, epsilon=1e-6, dtype=self.dtype)


def _places(x: Array, name: str, channels: int) -> tuple[int, ...]:
    if x.ndim < 3 or x.shape[-1] != channels:
        raise ValueError(
            f"{name} must be (..., height, width, {channels}), channels last, got {x.shape}"
        )
    return x.shape


def _inner(network: Any, x: Array) -> Array:
    return x.astype(network.conv_in.kernel.dtype)


_ORIGINAL = (  # names of the single-file form, and their replacements
    (r"\.down\.(\d+)\.", r".down_blocks.\1."),
    (r"\.block\.(\d+)\.", r".resnets.\1."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.to_out.0."),
    (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.(down|up)sample\.", r".\1samplers.0."),
    (r"coder\.norm_out\.", "coder.conv_norm_out."),
)


def published(state_dict: Mapping[str, Any]) -> state_dicts.View:
    """The weights under the names of `AutoencoderKL`, from this form or from the single-file form
    (`ae.safetensors`).
    """
    levels = [
        int(match[1]) for name in state_dict if (match := re.match(r"decoder\.up\.(\d+)\.", name))
    ]
    parts = {}
    for key in state_dict:
        # The single-file form numbers the levels by resolution, the other in the order of the
        # calls.
        name = re.sub(
            r"\.up\.(\d+)\.", lambda match: f".up_blocks.{max(levels) - int(match[1])}.", key
        )
        for pattern, replacement in _ORIGINAL:
            name = re.sub(pattern, replacement, name)
        shape, read = state_dicts.shape_of(state_dict, key), state_dicts.reader(state_dict, key)
        if ".attentions." in name and len(shape) == 4:  # 1 x 1 convolutions
            shape, read = shape[:2], lambda *index, read=read: read()[:, :, 0, 0][index]
        parts[name] = shape, read
    return state_dicts.View(parts)
