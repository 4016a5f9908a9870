"""Contact sheets: rows of images on one page, each image with a caption below it.

    rows = [Row("unguided", images, captions), Row("guided", others, their_captions)]
    contact_sheet(rows, title="a red circle").save("sheet.png")

Small images are enlarged by a whole factor, without interpolation: a pixel stays a square. Large
images are reduced.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from tiltjax.images.folders import pillow

COLUMNS = 8
_SMALLEST, _LARGEST = 128, 256  # of the longer side of an image on the sheet, in pixels
_MARGIN, _LABEL, _CAPTION, _TITLE = 8, 96, 18, 24
_INK, _PAPER = (20, 20, 20), (255, 255, 255)


class Row(NamedTuple):
    """One row: its label, which may have several lines; images `(height, width, 3)` of 8-bit
    integers; a caption for each image.
    """

    label: str
    images: Sequence[np.ndarray]
    captions: Sequence[str]


def contact_sheet(rows: Sequence[Row], title: str) -> Any:
    """The sheet, as an image of Pillow. It shows the first `COLUMNS` images of each row.

    **Arguments:** `rows`, whose images all have one shape; `title`, above the first row.

    **Raises:** `ValueError` without images, for images of several shapes, and for a row that does
    not have one caption for each image.
    """
    height, width = _shape(rows)
    scale = _scale(height, width)
    tile = max(1, round(scale * width)), max(1, round(scale * height))
    pillow()
    from PIL import Image, ImageDraw, ImageFont

    columns = min(COLUMNS, max(len(row.images) for row in rows))
    step = tile[0] + _MARGIN, tile[1] + _CAPTION + _MARGIN
    font, large = ImageFont.load_default(12), ImageFont.load_default(14)
    right = max(_LABEL + columns * step[0], _MARGIN + round(large.getlength(title))) + _MARGIN
    below = _MARGIN + _TITLE + len(rows) * step[1]
    sheet = Image.new("RGB", (right, below), _PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((_MARGIN, _MARGIN), title, _INK, large)
    resampling = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
    for i, row in enumerate(rows):
        top = _MARGIN + _TITLE + i * step[1]
        pen.text((_MARGIN, top + tile[1] // 2), row.label, _INK, font, anchor="lm")
        for j, (image, caption) in enumerate(zip(row.images, row.captions, strict=True)):
            if j < columns:
                left = _LABEL + j * step[0]
                sheet.paste(Image.fromarray(image).resize(tile, resampling), (left, top))
                pen.text((left + tile[0] // 2, top + tile[1] + 3), caption, _INK, font, anchor="ma")
    return sheet


def _shape(rows: Sequence[Row]) -> tuple[int, int]:
    """Height and width of all images."""
    for row in rows:
        if len(row.images) != len(row.captions):
            raise ValueError(
                f"row {row.label!r} has {len(row.images)} images and {len(row.captions)} captions: "
                "give one caption for each image"
            )
    shapes = {image.shape for row in rows for image in row.images}
    if len(shapes) != 1:
        raise ValueError(f"a sheet needs images of one shape, got {sorted(shapes)}")
    (shape,) = shapes
    if len(shape) != 3 or shape[-1] != 3:
        raise ValueError(f"images must have the shape (height, width, 3), got {shape}")
    return shape[:2]


def _scale(height: int, width: int) -> float:
    """The factor by which an image is enlarged, a whole number, or reduced."""
    longest = max(height, width)
    return _LARGEST / longest if longest > _LARGEST else max(1, _SMALLEST // longest)
