"""Helpers behind the scripts; see CONTRIBUTING.md."""

import sys
from pathlib import Path

# Python puts a script's own folder before the installed packages, where scripts/evaluate.py would hide the package
# `evaluate`. The scripts never import each other, so their folder has no business on the path.
_SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != _SCRIPTS]
