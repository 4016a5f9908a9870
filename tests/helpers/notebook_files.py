"""The notebooks as the tests read them."""

from pathlib import Path

import nbformat

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
NOTEBOOKS = {"argvalues": sorted(FOLDER.glob("*.ipynb")), "ids": lambda path: path.stem}


def read(path):
    return nbformat.read(path, as_version=4)


def coded(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def refuse_noise(notebook):
    """Errors, warnings and whatever else went to stderr."""
    for cell in coded(notebook):
        for output in cell.outputs:
            assert output.output_type != "error", (
                f"In [{cell.execution_count}] failed: {output.evalue}"
            )
            assert output.get("name") != "stderr", (
                f"In [{cell.execution_count}] complains: {output.text}"
            )
