"""`python -m tools.hlo.executed_notebook`: execute the notebook as Jupyter would and print it with its outputs."""

import os
import sys
import tempfile
from pathlib import Path

import nbformat
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[2] / "compiled"
NOTEBOOK = FOLDER / "inspect_hlo.ipynb"
_TIMEOUT = 900  # seconds for a cell, after which something hangs; never reached otherwise


def main() -> int:
    """Print the executed notebook."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "MPLCONFIGDIR"):
            os.environ[name] = folder
        # Without kernel folders, the only kernel is ipykernel in sys.executable.
        manager = AsyncKernelManager(kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))
        resources = {"metadata": {"path": str(FOLDER)}}
        NotebookClient(notebook, km=manager, timeout=_TIMEOUT, resources=resources).execute(cleanup_kc=True)
    nbformat.write(notebook, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
