"""The defaults of `tiltjax images` that depend on the model, the method and the reward.

FLUX.1 has those of the published runs. Those of the small model were measured: with them, images
follow the prompt as often as unguided ones do, and their mean reward is visibly larger.
"""

import warnings
from types import SimpleNamespace

from tiltjax.images import flux, shapes

# One weighted particle, or one candidate of best-of-n, is an unguided sample: use a few.
_PARTICLES = {"best-of-n": 4, "weighted": 4}
_PUBLISHED = {"steps": 28, "scale": 1.0, "length": 10.0, "sigma": 1.0}
_TINY_PARTICLES = {"best-of-n": 16, "weighted": 16}
_TINY = {"steps": 12, "length": 3.0, "sigma": 0.3}
# Four standard deviations of the reward among the images of "a circle" count as one unit.
_TINY_SCALES = {
    "blue": 10.0,
    "blue-channel": 12.0,
    "blue-minus-red-green": 6.5,
    "brightness": 50.0,
    "symmetry": 150.0,
    "antisymmetry": 150.0,
    "rotation": 150.0,
    "palette": 12.0,
    "clip": 20.0,
}


def is_tiny(options: SimpleNamespace) -> bool:
    """Whether the model is the small one that comes with tiltjax."""
    return str(options.model) == flux.TINY


def complete(options: SimpleNamespace) -> None:
    """Replace each option that is `None` by its default."""
    tiny = is_tiny(options)
    particles = _TINY_PARTICLES if tiny else _PARTICLES
    usual = {
        **(_TINY | {"scale": _TINY_SCALES[options.reward]} if tiny else _PUBLISHED),
        "particles": particles.get(options.method, 1),
        "compare": tiny and options.method != "none",
    }
    for name, value in usual.items():
        if getattr(options, name) is None:
            setattr(options, name, value)


def warn(options: SimpleNamespace) -> None:
    """Warn of options that are allowed and do not do what they seem to."""
    if options.particles == 1 and options.method in _PARTICLES:
        warnings.warn(
            f"--method {options.method} with one particle makes unguided images: use more "
            f"--particles, such as {_TINY_PARTICLES[options.method]}",
            stacklevel=2,
        )
    if not is_tiny(options):
        return
    if (options.height, options.width) != (shapes.SIDE, shapes.SIDE):
        warnings.warn(
            f"the small model was trained on images of {shapes.SIDE} x {shapes.SIDE} pixels, and "
            f"images of {options.height} x {options.width} will look wrong: leave --size out",
            stacklevel=2,
        )
    if unknown := shapes.unknown_words(options.prompt):
        warnings.warn(
            f"the small model does not know the words {', '.join(map(repr, unknown))}: use a "
            "prompt such as 'a red circle in the top left on a blue background'",
            stacklevel=2,
        )
