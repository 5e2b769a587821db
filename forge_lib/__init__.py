"""Helpers behind the scripts; see CONTRIBUTING.md."""

import os
import sys
from pathlib import Path

# torch reads it when it is loaded: a link that ends, as each does in the end, is no reason for a stack trace.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

# Python puts a script's own folder before the installed packages, where scripts/evaluate.py would hide the package
# `evaluate`. The scripts never import each other, so their folder has no business on the path.
_SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != _SCRIPTS]
