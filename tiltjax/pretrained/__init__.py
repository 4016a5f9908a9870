"""Published weights: safetensors files and the Hugging Face hub, key names, low-rank adapters, and
Flax modules from PyTorch state dicts.
"""

from tiltjax.pretrained import adapters, files, key_names, state_dicts

__all__ = ["files", "state_dicts", "key_names", "adapters"]
