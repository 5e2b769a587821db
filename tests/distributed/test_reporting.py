"""How a program ends: one message, and the exit code of its error."""

import subprocess
import sys

import pytest

from forge_lib.distributed.reporting import report_errors
from forge_lib.errors import DivergedError, PeerLostError, Stopped, UserError


@pytest.mark.parametrize(
    ("error", "code", "output"),
    [
        (UserError("a wrong flag"), 2, "x.py: error: a wrong flag\n"),
        (FileNotFoundError(2, "No such file or directory", "corpus.txt"), 2, "x.py: error: corpus.txt: No such file"),
        (PeerLostError("lost process 1"), 3, "x.py: error: lost process 1\n"),
        (DivergedError("process 1 differs"), 4, "x.py: error: process 1 differs\n"),
        (Stopped("SIGTERM; saved"), 0, "x.py: SIGTERM; saved\n"),
    ],
)
def test_an_error_that_a_user_can_act_on_is_one_message_and_its_exit_code(capsys, error, code, output):
    with pytest.raises(SystemExit) as ended, report_errors("x.py"):
        raise error
    assert ended.value.code == code
    assert capsys.readouterr().err.startswith(output)


def test_any_other_error_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError), report_errors("x.py"):
        raise ZeroDivisionError


def test_sigterm_during_the_exit_for_a_mistake_does_not_hide_the_mistake(capsys):
    with pytest.raises(SystemExit, match="2"), report_errors("x.py"):
        try:
            raise UserError("a wrong flag")
        except UserError:
            raise Stopped("SIGTERM before the first step")  # noqa: B904 (as a signal does)
    assert capsys.readouterr().err == "x.py: error: a wrong flag\n"


def test_a_program_without_torch_reports_a_mistake_without_importing_it():
    program = (
        "import sys\n"
        "from forge_lib.distributed.reporting import report_errors\n"
        "from forge_lib.errors import UserError\n"
        "try:\n"
        "    with report_errors('x.py'):\n"
        "        raise UserError('a wrong flag')\n"
        "finally:\n"
        "    print([name for name in ('torch', 'transformers', 'accelerate') if name in sys.modules])\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "[]\n", "x.py: error: a wrong flag\n")
