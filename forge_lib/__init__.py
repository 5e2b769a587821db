"""The library behind the scripts: data and model helpers, and the machinery for several machines."""

import os
import sys
from pathlib import Path

# torch reads this variable when it is imported: without it, every link that closes prints a C++ stack trace.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

# Python puts a script's own folder first on sys.path, where scripts/evaluate.py would hide the package `evaluate`.
# Scripts never import each other, so their folder is removed.
_SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != _SCRIPTS]
