"""scripts/make_configs.py as a user runs it, and a cluster.yaml for it."""

import shlex
import subprocess
import sys

from commands import ROOT

LAB = """
name: home-lab
device: cpu
machines:
  - {name: alice, address: 10.77.0.1, processes: 2}
  - {name: bob, address: 10.77.0.2, processes: 1}
"""


def make_configs(*flags, prefix=()) -> subprocess.CompletedProcess:
    """Runs the script to its end."""
    words = [*prefix, sys.executable, "scripts/make_configs.py", *map(str, flags)]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True)


def printed_commands(output: str) -> list[list[str]]:
    """Returns the words of each command that the script has printed."""
    return [shlex.split(line) for line in output.splitlines() if line and not line.startswith("#")]
