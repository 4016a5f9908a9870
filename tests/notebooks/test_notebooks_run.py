"""Every notebook runs from top to bottom: its own asserts are the test of what it says.
`make test-notebooks`; `make test` leaves it out.
"""

import importlib.util
import re

import pytest
from helpers.notebook_files import FOLDER, NOTEBOOKS, read, refuse_noise
from nbclient.exceptions import CellExecutionError, CellTimeoutError


@pytest.mark.parametrize("path", **NOTEBOOKS)
def test_a_notebook_runs_in_a_fresh_kernel(path):
    spec = importlib.util.spec_from_file_location("execute", FOLDER / "execute.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        ran = module.execute(read(path), size="reduced")
    except (CellExecutionError, CellTimeoutError) as error:
        message = re.sub(r"\x1b\[[\d;]*m", "", str(error))
        pytest.fail(f"{path.name}: {message}", pytrace=False)
    refuse_noise(ran)
