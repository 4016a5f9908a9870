"""Contact sheets. Tier: exact."""

import numpy as np
import pytest

from tiltjax.images import sheets
from tiltjax.images.sheets import Row


def plain(red, side=32):
    return np.full((side, side, 3), (red, 0, 255), np.uint8)


def tiles(sheet):
    """The colors of the pure tiles on a sheet, row by row."""
    pixels = np.asarray(sheet)
    blue = (pixels[..., 1] == 0) & (pixels[..., 2] == 255)
    rows = np.flatnonzero(blue.mean(axis=1) > 0.1)
    tops = rows[np.diff(rows, prepend=-2) > 1]
    found = []
    for top in tops:
        columns = np.flatnonzero(blue[top])
        found.append(
            [int(pixels[top, left, 0]) for left in columns[np.diff(columns, prepend=-2) > 1]]
        )
    return found, blue.sum()


def test_rows_stand_below_each_other_and_small_images_are_enlarged():
    rows = [
        Row("unguided", [plain(i) for i in (1, 2, 3)], ["+0.1", "+0.2", "+0.3"]),
        Row("guided", [plain(i) for i in (4, 5, 6)], ["+0.4", "+0.5", "+0.6"]),
    ]
    sheet = sheets.contact_sheet(rows, "a red circle")
    found, area = tiles(sheet)
    assert found == [[1, 2, 3], [4, 5, 6]]
    assert area == 6 * 128**2
    # A caption changes the sheet below its own image, and nowhere else.
    changed = rows[1]._replace(captions=["+0.4", "+9.9", "+0.6"])
    other = np.asarray(sheets.contact_sheet([rows[0], changed], "a red circle"))
    y, x = np.nonzero(np.any(other != np.asarray(sheet), axis=-1))
    assert y.min() > sheet.height - 30
    assert sheet.width - 2 * 136 - 10 < x.min() <= x.max() < sheet.width - 136


def test_pixels_stay_squares_and_large_images_are_reduced():
    image = plain(0)
    image[10, 20] = 1, 0, 255
    pixels = np.asarray(sheets.contact_sheet([Row("", [image], [""])], ""))
    assert np.sum(np.all(pixels == (1, 0, 255), axis=-1)) == 16
    assert tiles(sheets.contact_sheet([Row("", [plain(7, 1024)], [""])], ""))[1] == 256**2


def test_a_sheet_shows_the_first_columns_and_refuses_what_does_not_fit():
    many = [plain(i) for i in range(12)]
    found, _ = tiles(sheets.contact_sheet([Row("", many, [""] * 12)], "t"))
    assert found == [list(range(sheets.COLUMNS))]
    with pytest.raises(ValueError, match="2 images and 1 captions"):
        sheets.contact_sheet([Row("guided", many[:2], ["1"])], "t")
    with pytest.raises(ValueError, match="one shape"):
        sheets.contact_sheet([Row("", [plain(1), plain(1, 16)], ["", ""])], "t")
    with pytest.raises(ValueError, match=r"shape \(height, width, 3\)"):
        sheets.contact_sheet([Row("", [np.zeros((4, 4), np.uint8)], [""])], "t")
