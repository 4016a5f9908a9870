r"""Rewards in PyTorch with gradients: ImageReward, and the answer of a vision-language model to a
question.

| reward | r(x) |
|---|---|
| `image_reward(prompt)` | the score of ImageReward, standardized as in its method `score` |
| `yes_or_no(question, model, processor)` | log-odds of Yes after an image and a question |

Both are `tiltjax.external.External` rewards of one image `(H, W, 3)` in [0, 1]. On latents use
`Decoded(autoencoder.decode, reward)`. Images are prepared as published, but without the rounding to
256 levels, so that the preparation is differentiable. The models are those of the packages, or
models with the same interface.

References: Xu et al., arXiv 2304.05977 (ImageReward); Bai et al., arXiv 2502.13923 (Qwen2.5-VL).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from tiltjax import _checks, external
from tiltjax.images.networks import clip

_TOKENS, _SIDE = 35, 224  # the inputs of ImageReward


def image_reward(
    prompt: str, model: Any = None, *, device: str = "cpu", **settings: Any
) -> external.External:
    """ImageReward's score of an image for a prompt, with mean 0 and standard deviation 1 over its
    training images.

    **Arguments:** `prompt`; `model`, the package's, already on its device (by default
    `ImageReward.load("ImageReward-v1.0", device=device)`); `device`; `settings` of
    `tiltjax.external.from_torch`. **Warns:** for a prompt of more than 35 tokens, the model's
    limit.

    **Raises:** `ImportError` without PyTorch, or without the package if `model` is None;
    `ValueError` for a model in training mode.
    """
    torch = _torch()
    if model is None:
        try:
            import ImageReward  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ImportError(
                "image_reward needs the package image-reward (pip install image-reward), or model= "
                "of the same interface"
            ) from error
        model = ImageReward.load("ImageReward-v1.0", device=device)
    _refuse_training(model)
    tokenizer = model.blip.tokenizer
    if len(tokenizer(prompt).input_ids) > _TOKENS:
        _checks.warn(f"ImageReward takes {_TOKENS} tokens: the end of the prompt {prompt!r} is cut")
    text = tokenizer(
        prompt, padding="max_length", truncation=True, max_length=_TOKENS, return_tensors="pt"
    ).to(device)

    def score(images: Any) -> Any:
        images = _channels_first(images, model)
        patches = model.blip.visual_encoder(
            _standardized(_cropped(images, _SIDE), clip.MEAN, clip.STD)
        )
        states = model.blip.text_encoder(
            text.input_ids.expand(len(images), -1),
            attention_mask=text.attention_mask.expand(len(images), -1),
            encoder_hidden_states=patches,
            encoder_attention_mask=torch.ones(
                patches.shape[:-1], dtype=torch.long, device=patches.device
            ),
            return_dict=True,
        ).last_hidden_state
        return (model.mlp(states[:, 0])[:, 0] - model.mean) / model.std

    return external.from_torch(score, device=device, **{"name": "ImageReward"} | settings)


def yes_or_no(
    question: str,
    model: Any,
    processor: Any,
    *,
    size: tuple[int, int],
    answers: tuple[str, str] = ("Yes", "No"),
    device: str = "cpu",
    **settings: Any,
) -> external.External:
    """The log-odds of `answers` from a vision-language model, for a question about an image.

    **Arguments:** `question`; `model` and `processor` of `transformers`, such as Qwen2-VL and
    Qwen2.5-VL, with patches `(places, pixels)` in groups of `merge_size`, and `image_grid_thw`;
    `size`, `(height, width)` of the images; `answers`, the positive and the negative answer;
    `device` of the model; `settings` of `tiltjax.external.from_torch`.

    **Raises:** `ImportError` without PyTorch or Pillow; `ValueError` for a model in training mode,
    and for two answers with the same first token.
    """
    torch = _torch()
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("yes_or_no needs Pillow: pip install pillow") from error
    _refuse_training(model)
    blank = Image.fromarray(np.zeros((*size, 3), np.uint8))
    content = [{"type": "image", "image": blank}, {"type": "text", "text": question}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    inputs = processor(text=[text], images=[blank], return_tensors="pt")
    first = [
        processor.tokenizer(answer, add_special_tokens=False).input_ids[0] for answer in answers
    ]
    if first[0] == first[1]:
        raise ValueError(f"the answers must differ in their first token, got {answers}")
    grid = inputs["image_grid_thw"]
    constant = {
        name: inputs[name].to(device)
        for name in inputs
        if name not in ("pixel_values", "image_grid_thw")
    }

    def score(images: Any) -> Any:
        n = len(images)
        patches = _patches(
            _channels_first(images, model), processor.image_processor, tuple(grid[0].tolist())
        )
        logits = model(
            **{name: value.expand(n, *value.shape[1:]) for name, value in constant.items()},
            pixel_values=patches,
            image_grid_thw=grid.to(patches.device).expand(n, -1),
            use_cache=False,
        ).logits[:, -1]
        return (logits[:, first[0]] - logits[:, first[1]]).to(
            torch.promote_types(logits.dtype, torch.float32)
        )

    return external.from_torch(score, device=device, **{"name": "yes_or_no"} | settings)


def _patches(images: Any, settings: Any, grid: tuple[int, int, int]) -> Any:
    """Images `(n, 3, H, W)` as the patches of a grid, `(n * places, 3 * frames * patch^2)`, with
    the `merge_size^2` patches of a group side by side.
    """
    frames, high, wide = grid
    side, merge, repeat = settings.patch_size, settings.merge_size, settings.temporal_patch_size
    if frames != 1:
        raise ValueError(f"one image must be one frame, got a grid of {grid}")
    resized = _resized(images, (high * side, wide * side))
    resized = _standardized(resized, settings.image_mean, settings.image_std)
    tiles = resized.reshape(len(images), 3, high // merge, merge, side, wide // merge, merge, side)
    tiles = tiles.permute(
        0, 2, 5, 3, 6, 1, 4, 7
    )  # image, group row and column, row and column in it, channel, pixel row and column
    tiles = tiles[..., None, :, :].expand(*tiles.shape[:6], repeat, side, side)
    return tiles.reshape(len(images) * high * wide, 3 * repeat * side**2)


def _cropped(images: Any, side: int) -> Any:
    """The middle square of `(n, 3, H, W)`, after a resize of the shorter side to `side`."""
    height, width = images.shape[-2:]
    shape = tuple(max(side, side * each // min(height, width)) for each in (height, width))
    top, left = ((each - side) // 2 for each in shape)
    return _resized(images, shape)[..., top : top + side, left : left + side]


def _resized(images: Any, shape: tuple[int, ...]) -> Any:
    if tuple(images.shape[-2:]) == shape:
        return images
    resize = _torch().nn.functional.interpolate
    return resize(images, size=shape, mode="bicubic", antialias=True, align_corners=False)


def _standardized(images: Any, mean: Sequence[float], std: Sequence[float]) -> Any:
    mean, std = (images.new_tensor(tuple(each))[:, None, None] for each in (mean, std))
    return (images - mean) / std


def _channels_first(images: Any, model: Any) -> Any:
    if images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(
            f"this reward takes images (height, width, 3), got {tuple(images.shape[1:])}: use "
            "Decoded on latents"
        )
    return images.permute(0, 3, 1, 2).to(next(model.parameters()).dtype)


def _refuse_training(model: Any) -> None:
    if model.training:
        raise ValueError(
            f"{type(model).__name__} is in training mode, where its outputs are random: call "
            ".eval() first"
        )


def _torch() -> Any:
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError("this reward needs PyTorch: pip install torch") from error
    return torch
