"""The p2p-llm-forge command, and the mistakes that it finds before accelerate would wait in silence."""

import socket
import sys

import pytest
from conftest import BIN, QUIET, SHORT, losses, rows

from forge_lib import launch

FORGE = [BIN / "p2p-llm-forge"]
FLAGS = [*SHORT, *QUIET, "--max-steps", "3"]


def machine(rank: int, address: str, port: int, *flags) -> list:
    return [*FORGE, "--num-nodes", 2, "--node-rank", rank, "--master-addr", address, "--master-port", port, *flags]


def assert_refused(ended, *messages: str) -> None:
    """One message, exit code 2, within 30 s, no traceback."""
    assert ended.code == 2, ended.output
    assert ended.output.count("error: ") == 1, ended.output
    assert "Traceback" not in ended.output
    for message in messages:
        assert message in ended.output
    assert ended.seconds < 30


def test_one_machine_needs_no_topology(run, tmp_path, trained):
    ended = run([*FORGE, *FLAGS, "--output-dir", tmp_path / "run"])
    assert ended.code == 0, ended.output
    assert losses(tmp_path / "run")[0] == pytest.approx(losses(trained)[0], rel=1e-6)


def test_two_machines_with_two_and_one_processes(start, tmp_path, free_port, trained):
    """The second is started first and waits for the main machine's port."""
    flags = [*FLAGS, "--shares", "2:1:1"]
    second = start([*machine(1, "127.0.0.1", free_port, *flags), "--output-dir", tmp_path / "1"])
    first = start(
        [*machine(0, "127.0.0.1", free_port, *flags), "--processes-per-node", 2, "--output-dir", tmp_path / "0"]
    )
    ended = [first.finish(), second.finish()]
    assert [each.code for each in ended] == [0, 0], ended[0].output + ended[1].output
    assert rows(tmp_path / "0")[-1]["num_processes"] == 3
    assert losses(tmp_path / "0")[0] == pytest.approx(losses(trained)[0], rel=1e-6)


def test_the_exit_code_of_the_script_comes_through(run, tmp_path):
    ended = run([*FORGE, *FLAGS, "--dataset-path", "nowhere.txt", "--output-dir", tmp_path / "run"])
    assert_refused(ended, "train.py: error: --dataset-path nowhere.txt: no such file")


@pytest.fixture
def refused(capsys, monkeypatch, tmp_path):
    """Runs the command in this process, with less patience, to its refusal; returns its message."""
    monkeypatch.setattr(launch, "REACH_SECONDS", 4)

    def refused(*flags) -> str:
        with pytest.raises(SystemExit) as ended:
            launch.main([*FLAGS, "--output-dir", str(tmp_path / "run"), *map(str, flags)])
        output = capsys.readouterr().err
        assert (ended.value.code, output.count("p2p-llm-forge: error: ")) == (2, 1)
        return output

    return refused


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num-nodes", "2"], "needs --master-addr"),
        (["--num-nodes", "2", "--node-rank", "2", "--master-addr", "a"], "machines are numbered from 0 to 1"),
        (["--master-port", "99999"], "expected a number from 1 to 65535"),
        (["--num-node", "2"], "unknown flag --num-node; did you mean --num-nodes?"),
        (["--num-nodes", "two"], "--num-nodes: invalid int value: 'two'"),
        (["--num-nodes", "2", "--node-rank", "1", "--master-addr", "no-such.invalid"], "does not resolve"),
        (["--num-nodes", "2", "--master-addr", "192.0.2.1"], "192.0.2.1 is not its address"),
    ],
)
def test_a_topology_that_cannot_be_is_named(refused, flags, message):
    assert message in refused(*flags)


def test_a_port_in_use_is_named(refused):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        output = refused(*machine(0, "127.0.0.1", port)[1:])
        assert f"--master-port {port} is in use" in output
        assert "give another port" in output


def test_a_port_that_another_program_holds_is_no_main_machine(refused):
    """It takes connections and never answers, as many services do."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert "answers, but not as a main machine does" in refused(*machine(1, "127.0.0.1", port)[1:])


def test_a_main_machine_that_does_not_listen_is_named(refused, free_port):
    output = refused(*machine(1, "127.0.0.1", free_port)[1:])
    assert f"cannot reach the main machine 127.0.0.1:{free_port}" in output
    assert "start the main machine (--node-rank 0) first" in output


@pytest.mark.netns
def test_a_main_machine_without_a_route_is_named(run, tmp_path, hosts):
    machines = hosts(2)
    words = [*machine(1, "10.77.0.9", 29500, *FLAGS), "--output-dir", tmp_path / "run"]
    assert_refused(run(words, prefix=machines.on(2)), "cannot reach the main machine 10.77.0.9:29500")


@pytest.mark.parametrize("rank", [0, 1])
def test_two_machines_with_one_number_are_told_so_all(start, tmp_path, free_port, rank):
    """Of three machines two have the same number: each of those that were started hears of it."""
    words = [[*FORGE, "--num-nodes", 3, "--master-addr", "127.0.0.1", "--master-port", free_port, *FLAGS]] * 3
    running = [
        start([*each, "--node-rank", number, "--output-dir", tmp_path / str(place)])
        for place, (each, number) in enumerate(zip(words, [0, rank, rank] if rank else [0, 0], strict=False))
    ]
    for each in running:
        assert_refused(each.finish(60), f"two machines were started as --node-rank {rank}")


def test_a_missing_machine_is_waited_for_by_number(run, tmp_path, free_port):
    words = [*machine(0, "127.0.0.1", free_port, *FLAGS), "--join-timeout", 6, "--output-dir", tmp_path / "run"]
    ended = run(words)
    assert "waits for machine 1 of 2" in ended.output
    assert_refused(ended, "machine 1 of 2 did not come within --join-timeout 6 s")


def test_help_shows_both_kinds_of_flags(run):
    ended = run([*FORGE, "--help"])
    assert ended.code == 0
    assert "--master-addr ADDRESS" in ended.output
    assert "--learning-rate RATE" in ended.output
    assert run([sys.executable, "scripts/train.py", "--help"]).code == 0
