"""The rendezvous of p2p-llm-forge: what it reports instead of accelerate's long silence."""

import contextlib
import socket
import sys
import time

import pytest
from commands import QUIET, SHORT, Finished

from forge_lib.launch import rendezvous, supervisor
from forge_lib.launch.rendezvous_store import RendezvousStore

FLAGS = [*SHORT, *QUIET]
REPORT = RendezvousStore.report_mistake


def machine(rank: int, port: int, num_nodes: int = 2, address: str = "127.0.0.1") -> list:
    """Returns the flags of machine number `rank`."""
    return ["--num-nodes", num_nodes, "--node-rank", rank, "--master-addr", address, "--master-port", port]


def assert_refused(ended: Finished, message: str) -> None:
    """Checks for one message, exit code 2 and no traceback within 30 s."""
    assert ended.code == 2, ended.output
    assert ended.output.count("error: ") == 1, ended.output
    assert "Traceback" not in ended.output
    assert message in ended.output
    assert ended.seconds < 30


@contextlib.contextmanager
def port_of_another_program():
    """A port whose program accepts connections and never answers, as many services do."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def test_a_port_in_use_is_reported(forge):
    with port_of_another_program() as port:
        ended = forge(*machine(0, port)).finish()
    assert_refused(ended, f"--master-port {port} is in use")
    assert "give another port" in ended.output


def test_a_port_of_another_program_is_not_taken_for_a_main_machine(forge, monkeypatch):
    monkeypatch.setattr(rendezvous, "REACH_SECONDS", 4)
    with port_of_another_program() as port:
        assert_refused(forge(*machine(1, port)).finish(), "answers, but not as a main machine does")


def test_a_main_machine_that_does_not_listen_is_reported(forge, monkeypatch, free_port):
    monkeypatch.setattr(rendezvous, "REACH_SECONDS", 2)
    ended = forge(*machine(1, free_port)).finish()
    assert_refused(ended, f"cannot reach the main machine 127.0.0.1:{free_port} for 2 s: connection refused")
    assert "start the main machine (--node-rank 0) first" in ended.output


@pytest.mark.netns
def test_a_main_machine_that_nothing_answers_for_is_reported(run, tmp_path, hosts):
    program = (
        "import sys\n"
        "from forge_lib.launch import command, rendezvous\n"
        "rendezvous.REACH_SECONDS = 4\n"
        "command.main(sys.argv[1:])"
    )
    words = [sys.executable, "-c", program, *FLAGS, *machine(1, 29500, address="10.77.0.9")]
    ended = run([*words, "--output-dir", tmp_path / "run"], prefix=hosts(2).on(2))
    assert_refused(ended, "cannot reach the main machine 10.77.0.9:29500 for 4 s: no route to host")


@pytest.mark.parametrize("ranks", [(0, 0), (0, 1, 1)])
def test_two_machines_with_one_number_are_reported_to_all(forge, free_port, ranks):
    """Of three machines two have the same number; each machine that was started prints that."""
    running = [forge(*machine(rank, free_port, 3), folder=str(n)) for n, rank in enumerate(ranks)]
    for each in running:
        assert_refused(each.finish(60), f"two machines were started as --node-rank {ranks[-1]}")


def report_late(store: RendezvousStore, mistake: str) -> None:
    time.sleep(2)
    REPORT(store, mistake)


@pytest.mark.parametrize("report", [REPORT, report_late])
def test_different_numbers_of_machines_are_reported_to_all(forge, free_port, monkeypatch, report):
    """Also if the main machine finds all registered before the other one has reported the mistake."""
    monkeypatch.setattr(RendezvousStore, "report_mistake", report)
    running = [forge(*machine(rank, free_port, 2 + rank), folder=str(rank)) for rank in (0, 1)]
    for each in running:
        assert_refused(each.finish(60), "was started with --num-nodes 3, the main machine")


def test_a_missing_machine_is_named_by_its_number_until_the_time_is_over(forge, monkeypatch, free_port):
    monkeypatch.setattr(supervisor, "STATUS_SECONDS", 1)
    ended = forge(*machine(0, free_port), "--join-timeout", 3).finish()
    assert "waits for machine 1 of 2" in ended.output
    assert_refused(ended, "machine 1 of 2 did not start within --join-timeout 3 s")
