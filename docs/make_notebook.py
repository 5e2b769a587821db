"""Writes scripts/prototype.ipynb: executes it in a copy of this repository, and keeps the outputs without local paths.

Run `make notebook` after each change of the notebook or of what it shows.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "scripts" / "prototype.ipynb"


def execute(folder: Path) -> nbformat.NotebookNode:
    """Returns the executed notebook; its runs are written into `folder`."""
    source = NOTEBOOK.read_text(encoding="utf-8").replace("runs/tour", folder.as_posix())
    (folder / "source.ipynb").write_text(source, encoding="utf-8")
    words = ["-m", "nbconvert", "--to", "notebook", "--execute", folder / "source.ipynb", "--output", "done.ipynb"]
    subprocess.run([sys.executable, *words], check=True, cwd=ROOT)
    return nbformat.read(folder / "done.ipynb", as_version=4)


def clean(notebook: nbformat.NotebookNode, folder: Path) -> str:
    """Returns the notebook as text, without times and paths of this machine."""
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    text = nbformat.writes(notebook) + "\n"
    text = text.replace(folder.as_posix(), "runs/tour").replace(f"{ROOT.as_posix()}/", "")
    return re.sub(re.escape(Path(sys.executable).as_posix()), "python", text)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        NOTEBOOK.write_text(clean(execute(Path(name)), Path(name)), encoding="utf-8")
