"""Output and signals of one process."""

import subprocess
import sys


def test_output_that_is_lost_costs_nothing_else():
    """The reader goes, then the disk is full; each later line is as good as written."""
    program = (
        "import os, sys; from forge_lib.process import ignore_output_errors\n"
        "with ignore_output_errors():\n"
        "    print('one', flush=True); sys.stdin.readline()\n"
        "    for _ in range(3): print('two' * 9999, flush=True)\n"
        "    os.dup2(os.open('/dev/full', os.O_WRONLY), 2)\n"
        "    for _ in range(3): print('three', file=sys.stderr, flush=True)\n"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", program], text=True, **pipes)
    assert process.stdout.readline() == "one\n"
    process.stdout.close()
    process.stdin.close()
    assert process.wait(50) == 0
