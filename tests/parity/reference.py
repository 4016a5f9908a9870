"""What `diffusers` says, on the weights and inputs of `tests/helpers/flux_fixtures.py`.

python tests/parity/reference.py        store it for the tests that run without PyTorch
"""

import copy
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from helpers import flux_fixtures as fixtures


class Dual(torch.nn.Module):
    """Two embedders for two times, under the names of the published flow map's adapters."""

    def __init__(self, embedder):
        super().__init__()
        self.original_embedder, self.second_embedder = embedder, copy.deepcopy(embedder)

    def forward(self, times, *rest):
        first, second = times.unbind(-1)
        return (self.original_embedder(first, *rest) + self.second_embedder(second, *rest)) / 2


def transformer(name, dtype=torch.float32):
    """Output, gradient to the tokens, and what enters and leaves each block, for
    `fixtures.TRANSFORMERS[name]`.
    """
    config = dict(fixtures.TRANSFORMERS[name])
    dual = config.pop("dual_time", False)
    model = FluxTransformer2DModel(**config).eval()
    if dual:
        model.time_text_embed = Dual(model.time_text_embed)
    shapes = {key: tuple(array.shape) for key, array in model.state_dict().items()}
    model.load_state_dict(
        {key: torch.from_numpy(array) for key, array in fixtures.weights(shapes).items()}
    )
    model.to(dtype)
    inputs = fixtures.transformer_inputs(name)
    rows, columns = fixtures.GRID
    ids = torch.zeros(rows, columns, 3)
    ids[..., 1] += torch.arange(rows)[:, None]
    ids[..., 2] += torch.arange(columns)[None]
    found = {}

    def store(key):
        def hook(module, args, kwargs, output):
            for part, value in {
                **kwargs,
                **dict(zip(("text_out", "image_out"), output, strict=True)),
            }.items():
                if isinstance(value, torch.Tensor):
                    found[f"{key}.{part}"] = value.detach().float().numpy().copy()

        return hook

    for kind in ("transformer_blocks", "single_transformer_blocks"):
        getattr(model, kind)[0].register_forward_hook(store(kind), with_kwargs=True)
    tensor = lambda key: torch.from_numpy(inputs[key]).to(dtype)
    tokens = tensor("tokens").requires_grad_()
    output = model(
        hidden_states=tokens,
        encoder_hidden_states=tensor("text"),
        pooled_projections=tensor("pooled"),
        timestep=torch.from_numpy(inputs["sigma"]),
        img_ids=ids.reshape(-1, 3),
        txt_ids=torch.zeros(inputs["text"].shape[1], 3),
        guidance=torch.from_numpy(inputs["guidance"]) if config["guidance_embeds"] else None,
        return_dict=False,
    )[0]
    (output * tensor("cotangent")).sum().backward()
    assert tokens.grad is not None
    return shapes, {
        "output": output.detach().float().numpy(),
        "gradient": tokens.grad.float().numpy(),
        **found,
    }


def times():
    """The scheduler's sigmas of FLUX.1-dev, for some sizes and numbers of steps."""
    settings = {
        "base_image_seq_len": 256,
        "max_image_seq_len": 4096,
        "base_shift": 0.5,
        "max_shift": 1.15,
    }
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, **settings)
    found = {}
    for size in (512, 1024):
        for steps in (4, 28):
            mu = calculate_shift((size // 16) ** 2, *settings.values())
            scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
            found[f"{size}_{steps}"] = scheduler.sigmas.numpy()
    return found


if __name__ == "__main__":
    np.savez_compressed(fixtures.FIXTURES / "times.npz", **times())
    fixtures.FIXTURES.mkdir(parents=True, exist_ok=True)
    for which in fixtures.TRANSFORMERS:
        np.savez_compressed(fixtures.FIXTURES / f"transformer_{which}.npz", **transformer(which)[1])
