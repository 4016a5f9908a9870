"""Every notebook is committed as it ran. That it runs is tested by `make test-notebooks`,
tests/notebooks.
"""

import re

import nbformat
import pytest
from helpers.notebook_files import NOTEBOOKS, coded, read, refuse_noise

MACHINE = re.compile(r"/(?:home|work|tmp|root|Users|private|mnt|opt|var)/[\w.-]+")
LARGEST = 700_000


def texts(cell):
    """What of a cell is read as text: its source and its outputs without the pictures."""
    yield cell.source
    for output in cell.get("outputs", []):
        yield from (output[name] for name in ("text", "evalue") if name in output)
        yield from (
            value for kind, value in output.get("data", {}).items() if kind.startswith("text/")
        )


def test_there_are_notebooks():
    assert NOTEBOOKS["argvalues"]


@pytest.mark.parametrize("path", **NOTEBOOKS)
def test_a_notebook_is_committed_as_it_ran(path):
    notebook = read(path)
    nbformat.validate(notebook)
    cells = coded(notebook)
    counts = [cell.execution_count for cell in cells]
    assert counts == list(range(1, len(cells) + 1)), "run it from top to bottom: make notebooks"
    assert any("image/png" in output.get("data", {}) for cell in cells for output in cell.outputs)
    refuse_noise(notebook)
    assert path.stat().st_size < LARGEST


@pytest.mark.parametrize("path", **NOTEBOOKS)
def test_a_notebook_names_no_place_on_this_machine(path):
    for cell in read(path).cells:
        for text in texts(cell):
            assert not MACHINE.search(text), MACHINE.search(text).group()


def test_the_reader_finds_places_and_spares_pictures():
    cell = nbformat.v4.new_code_cell(
        "1",
        outputs=[
            nbformat.v4.new_output(
                "display_data", data={"image/png": "/tmp/abc", "text/plain": "<Figure>"}
            ),
            nbformat.v4.new_output("stream", text="File /home/someone/x.py"),
        ],
    )
    assert [bool(MACHINE.search(text)) for text in texts(cell)] == [False, False, True]
