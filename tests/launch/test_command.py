"""The command p2p-llm-forge as a user types it."""

import sys

import pytest
from commands import BIN, QUIET, SHORT
from run_folders import losses, rows

FLAGS = [*SHORT, *QUIET, "--max-steps", "3"]


def test_one_machine_needs_no_topology(run, tmp_path, trained):
    ended = run([BIN / "p2p-llm-forge", *FLAGS, "--output-dir", tmp_path / "run"])
    assert ended.code == 0, ended.output
    assert losses(tmp_path / "run")[0] == pytest.approx(losses(trained)[0], rel=1e-6)


def test_two_machines_train_with_two_and_one_processes(forge, tmp_path, free_port, trained):
    """The second machine starts first, and waits until the main machine listens on its port."""
    flags = ["--shares", "2:1:1", "--num-nodes", 2, "--master-addr", "127.0.0.1", "--master-port", free_port]
    second = forge(*flags, "--node-rank", 1, folder="1")
    first = forge(*flags, "--processes-per-node", 2, folder="0")
    ended = [first.finish(), second.finish()]
    assert [each.code for each in ended] == [0, 0], ended[0].output + ended[1].output
    assert rows(tmp_path / "0")[-1]["num_processes"] == 3
    assert losses(tmp_path / "0")[0] == pytest.approx(losses(trained)[0], rel=1e-6)


def test_the_exit_code_and_the_message_of_train_py_are_passed_on(forge):
    ended = forge("--dataset-path", "nowhere.txt").finish()
    assert (ended.code, ended.output.count("error: ")) == (2, 1), ended.output
    assert "train.py: error: --dataset-path nowhere.txt: no such file" in ended.output
    assert "Traceback" not in ended.output


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num-nodes", "2"], "needs --master-addr"),
        (["--num-nodes", "2", "--node-rank", "2", "--master-addr", "a"], "machines are numbered from 0 to 1"),
        (["--master-port", "99999"], "--master-port is 99999, but must be below 65536"),
        (["--num-node", "2"], "unknown flag --num-node; did you mean --num-nodes?"),
        (["--num-nodes", "two"], "--num-nodes: invalid int value: 'two'"),
        (["--machine", "bob"], "--ssh and --machine need --cluster"),
        (["--num-nodes", "2", "--node-rank", "1", "--master-addr", "no-such.invalid"], "does not resolve"),
        (["--num-nodes", "2", "--master-addr", "192.0.2.1"], "192.0.2.1 is not its address"),
    ],
)
def test_a_topology_that_cannot_work_is_reported(forge, flags, message):
    ended = forge(*flags).finish(30)
    assert (ended.code, ended.output.count("p2p-llm-forge: error: ")) == (2, 1), ended.output
    assert message in ended.output


def test_help_shows_both_kinds_of_flags_and_imports_no_torch(run):
    program = (
        "import sys\n"
        "from forge_lib.launch.command import main\n"
        "try:\n    main(['--help'])\n"
        "finally:\n    print('torch was imported:', 'torch' in sys.modules)"
    )
    ended = run([sys.executable, "-c", program])
    assert ended.code == 0
    assert "--master-addr ADDRESS" in ended.output
    assert "--learning-rate RATE" in ended.output
    assert "torch was imported: False" in ended.output
