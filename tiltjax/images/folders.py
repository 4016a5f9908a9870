r"""A folder of numbered images. An interrupted run can continue: each image is made once.

    folder/  settings.json   rewards.json   0000.png   0001.png   ...

`settings.json` holds the settings that determine the images, and notes on the versions and the
device that made them. All images of a folder have the same settings: other settings raise an error
that lists the differences. An image counts as made when its file and its reward exist. A file is
written completely or not at all.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np


def pillow() -> Any:
    """The module `PIL.Image`. **Raises:** `ImportError` that names the extra to install."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("images are written by Pillow: pip install 'tiltjax[images]'") from error
    return Image


class ImageFolder:
    """A folder of numbered images with the same settings.

    **Arguments:**

    - `folder`: its path. The folder is created if it does not exist.
    - `settings`: what determines the images, as numbers, strings, lists and dictionaries.
    - `notes`: what else to record, such as versions.

    **Raises:** `ValueError` that lists the differences, for a folder with other settings;
    `ImportError` without Pillow.
    """

    def __init__(
        self, folder: str | os.PathLike, settings: Mapping[str, Any], notes: Mapping[str, Any]
    ):
        self.folder = Path(folder)
        pillow()
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"{self.folder} is a file: images need a folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        settings = json.loads(json.dumps(settings))  # tuples become lists, as in the file
        earlier = self._read("settings.json").get("settings")
        if earlier is not None and earlier != settings:
            differ = ", ".join(
                f"{name} {earlier.get(name)!r}, now {settings.get(name)!r}"
                for name in sorted({*earlier, *settings})
                if earlier.get(name) != settings.get(name)
            )
            raise ValueError(
                f"{self.folder} holds images of other settings ({differ}): give another folder"
            )
        strays = sorted(path.name for path in self.folder.glob("[0-9]*.png"))
        if earlier is None and strays:
            raise ValueError(
                f"{self.folder} holds {', '.join(strays[:4])} and no settings.json: give another "
                "folder"
            )
        self._record = {"settings": settings, "made": dict(notes)}

    @property
    def rewards(self) -> dict[int, float]:
        """The rewards of the images that exist, by their numbers."""
        found = {int(name): value for name, value in self._read("rewards.json").items()}
        return {number: found[number] for number in sorted(found) if self.path(number).is_file()}

    def path(self, number: int) -> Path:
        """The path of an image, whether it exists or not."""
        return self.folder / f"{number:04d}.png"

    def image(self, number: int) -> np.ndarray:
        """An image that exists, `(height, width, 3)` of 8-bit integers."""
        with pillow().open(self.path(number)) as file:
            return np.asarray(file.convert("RGB"))

    def missing(self, num: int) -> list[int]:
        """The numbers of those among the first `num` images that do not exist."""
        made = self.rewards
        return [number for number in range(num) if number not in made]

    def add(self, number: int, image: np.ndarray, reward: float) -> Path:
        """Write an image `(height, width, 3)`, clipped to [0, 1], and its reward.

        **Raises:** `FloatingPointError` for an image or a reward that is NaN or infinite.
        """
        image = np.asarray(image, np.float64)
        if bad := int(np.sum(~np.isfinite(image))):
            raise FloatingPointError(
                f"image {number}: {bad} of {image.size} values are not finite though its "
                "latent is finite: the decoder overflows"
            )
        if not math.isfinite(reward):
            raise FloatingPointError(
                f"image {number} is finite and its reward is {reward}: check the reward"
            )
        levels = np.round(255 * np.clip(image, 0, 1)).astype(np.uint8)
        # Written with the first image: a command that fails earlier leaves the folder free.
        if not (self.folder / "settings.json").is_file():
            self._write("settings.json", self._record)
        path, part = self.path(number), self.folder / f".{number:04d}.part"
        pillow().fromarray(levels).save(part, format="PNG")
        os.replace(part, path)
        rewards = {**self._read("rewards.json"), f"{number:04d}": reward}
        self._write("rewards.json", dict(sorted(rewards.items())))
        return path

    def _read(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        if not path.is_file():
            return {}
        try:
            return json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path} is not valid JSON ({error}): give another folder") from error

    def _write(self, name: str, content: Mapping[str, Any]) -> None:
        part = self.folder / f".{name}.part"
        part.write_text(json.dumps(content, indent=2) + "\n")
        os.replace(part, self.folder / name)
