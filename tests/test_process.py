"""Output and signals of one process, and its place in the world that the launcher announces."""

import subprocess
import sys

import pytest

from forge_lib.errors import UserError
from forge_lib.process import World


def test_a_program_survives_when_its_output_cannot_be_written():
    """First the reader closes the pipe, then the disk is full."""
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


def test_a_launcher_that_gives_no_rank_is_refused_with_the_lines_to_change(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    with pytest.raises(UserError) as error:
        World.from_environment()
    assert "distributed_type: MULTI_GPU\n    use_cpu: true" in str(error.value)


def test_a_yaml_for_another_kind_of_training_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="asks for FSDP"):
        World.from_environment()
