"""What `diffusers` and `transformers` say of the small parts of `tests/helpers/flux_parts.py`.

In float64 the answers are the truth that both implementations round, each in its own way, in
float32.

python tests/parity/flux_parts_reference.py store it, in float64, for the tests that run without
these packages
"""

import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from diffusers import AutoencoderKL
from transformers.models.t5.modeling_t5 import T5LayerNorm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from helpers import flux_fixtures as fixtures
from helpers import flux_parts as parts

from tiltjax.images.networks.clip import MEAN, STD


def with_weights(model, dtype=torch.float32):
    """The model with the weights that its names and shapes lead to, and these weights."""
    state_dict = fixtures.weights(
        {name: tuple(array.shape) for name, array in model.state_dict().items()}
    )
    if "shared.weight" in state_dict:
        state_dict["encoder.embed_tokens.weight"] = state_dict["shared.weight"]
    model.load_state_dict(
        {name: torch.from_numpy(np.asarray(array)) for name, array in state_dict.items()}
    )
    return model.eval().to(dtype), state_dict


def first(array, dtype=torch.float32):
    """Channels last to channels first."""
    return torch.from_numpy(np.asarray(array)).permute(0, 3, 1, 2).to(dtype)


def last(tensor):
    return tensor.detach().permute(0, 2, 3, 1).numpy().copy()


def autoencoder_model(dtype=torch.float32):
    settings = {
        name: value for name, value in parts.AUTOENCODER.items() if not name.startswith("_")
    }
    return with_weights(AutoencoderKL(**settings), dtype)


def autoencoder(dtype=torch.float32):
    """Both directions, and the gradients of both to their inputs."""
    (model, _), values = autoencoder_model(dtype), parts.inputs()
    latents = first(values["latents"], dtype).requires_grad_()
    decoded = (
        model.decode(latents / model.config.scaling_factor + model.config.shift_factor).sample + 1
    ) / 2
    (decoded * first(values["decoded"], dtype)).sum().backward()
    images = first(parts.images(2, 6, 8, 3), dtype).requires_grad_()
    found = model.encode(2 * images - 1).latent_dist
    (found.mean * first(values["mean"], dtype)).sum().backward()
    return {
        "decoded": last(decoded),
        "decoded_gradient": last(latents.grad),
        "mean": last(found.mean),
        "log_variance": last(found.logvar),
        "mean_gradient": last(images.grad),
    }


def t5_model(dtype=torch.float32):
    return with_weights(transformers.T5EncoderModel(transformers.T5Config(**parts.T5)), dtype)


def _rms(self, x):
    return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))


def t5(dtype=torch.float32):
    norm = T5LayerNorm.forward
    if dtype == torch.float64:  # the published one takes its variance in float32 whatever its dtype
        T5LayerNorm.forward = _rms
    with torch.no_grad():
        states = t5_model(dtype)[0](torch.from_numpy(parts.T5_IDS).long())[0].numpy()
    T5LayerNorm.forward = norm
    return {"states": states}


def clip_model(name, dtype=torch.float32):
    return with_weights(transformers.CLIPModel(transformers.CLIPConfig(**parts.CLIPS[name])), dtype)


def clip(name, dtype=torch.float32):
    """Text states, unit vectors of texts and of images that are of the right size, and the
    gradient of their similarity to the images.
    """
    model, _ = clip_model(name, dtype)
    ids = torch.from_numpy(parts.CLIP_IDS).long()
    text = model.text_model(ids)
    images = first(parts.images(2, 8, 8, 3), dtype).requires_grad_()
    mean, std = (torch.tensor(each, dtype=dtype)[:, None, None] for each in (MEAN, STD))
    both = model(input_ids=ids, pixel_values=(images - mean) / std)
    both.logits_per_image.diagonal().sum().backward()
    return {
        "states": text.last_hidden_state.detach().numpy(),
        "pooled": text.pooler_output.detach().numpy(),
        "text": both.text_embeds.detach().numpy(),
        "image": both.image_embeds.detach().numpy(),
        "similarity": both.logits_per_image.detach().numpy(),
        "similarity_gradient": last(images.grad),
    }


ALL = {"autoencoder": autoencoder, "t5": t5} | {
    f"clip_{name}": lambda name=name, **k: clip(name, **k) for name in parts.CLIPS
}

if __name__ == "__main__":
    fixtures.FIXTURES.mkdir(parents=True, exist_ok=True)
    for which, reference in ALL.items():
        np.savez_compressed(fixtures.FIXTURES / f"{which}.npz", **reference(dtype=torch.float64))
