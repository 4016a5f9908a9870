"""Published weights: files, key names, adapters."""

from tiltjax.pretrained import adapters, files, key_names, state_dicts

__all__ = [
    "adapters",
    "files",
    "key_names",
    "state_dicts",
]
