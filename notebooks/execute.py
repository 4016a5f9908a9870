"""Run notebooks from top to bottom in a fresh kernel and, from the command line, write their
outputs into them.

    python notebooks/execute.py notebooks/*.ipynb

The kernel is this interpreter, runs in an empty folder and imports the packages of this checkout
before installed ones. A notebook may read `NOTEBOOK_SIZE` from its environment: `reduced` asks for
fewer samples, with what it asserts still true.
"""

import base64
import io
import os
import sys
import tempfile
from pathlib import Path
from unittest import mock

import nbformat
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from PIL import Image
from traitlets import default
from traitlets.config import Config

ROOT = Path(__file__).resolve().parent.parent
_COLORS = 256  # of a figure: a palette keeps the file small


class _Kernel(AsyncKernelManager):
    """Kernels of this interpreter alone: without folders to search there is no other."""

    @default("kernel_spec_manager")
    def _this_interpreter(self) -> KernelSpecManager:
        return KernelSpecManager(kernel_dirs=[])


def execute(
    notebook: nbformat.NotebookNode, timeout: float = 600, size: str = "full"
) -> nbformat.NotebookNode:
    """The same notebook with the outputs of a fresh run.

    **Arguments:** `timeout` of one cell, in seconds; `size`, `full` or `reduced`.

    **Raises:** `nbclient.exceptions.CellExecutionError` or `CellTimeoutError`, with the source of
    the cell that failed.
    """
    notebook = nbformat.from_dict(notebook)
    # A short name of its own: the kernel's sockets are files in this folder, whose paths may have
    # 107 characters. Settings and start-up files of whoever runs this stay out.
    with tempfile.TemporaryDirectory(prefix="nb") as folder:
        places = dict.fromkeys(
            ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "MPLCONFIGDIR"), folder
        )
        places["NOTEBOOK_SIZE"] = size
        if size == "reduced":  # most of the time goes into compiling
            places["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "true"
            flags = (os.environ.get("XLA_FLAGS", ""), "--xla_cpu_use_fusion_emitters=false")
            places["XLA_FLAGS"] = " ".join(filter(None, flags))
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        with mock.patch.dict(os.environ, places | {"PYTHONPATH": path}):
            client = NotebookClient(
                notebook,
                kernel_manager_class=_Kernel,
                config=Config(AsyncKernelManager={"transport": "ipc", "ip": f"{folder}/kernel"}),
                timeout=timeout,
                record_timing=False,
                resources={"metadata": {"path": folder}},
            )
            return client.execute()


def shrink(notebook: nbformat.NotebookNode) -> None:
    """Reduce the figures among the outputs to a palette."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                figure = Image.open(io.BytesIO(base64.b64decode(output.data["image/png"]))).convert(
                    "RGB"
                )
                content = io.BytesIO()
                figure.quantize(_COLORS, dither=Image.Dither.NONE).save(
                    content, format="png", optimize=True
                )
                output.data["image/png"] = base64.b64encode(content.getvalue()).decode()


def main(names: list[str]) -> None:
    for name in names:
        notebook = execute(nbformat.read(name, as_version=4))
        shrink(notebook)
        nbformat.write(notebook, name)
        print(f"{name}: {Path(name).stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
