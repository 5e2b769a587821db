"""All machines of a cluster from one terminal: the ssh commands, the output, stop requests and exit codes."""

import os
import shlex
import signal
import sys
import threading
import time
from dataclasses import replace

import pytest
from commands import TINY

from forge_lib.cluster.cluster_file import Cluster, Machine
from forge_lib.errors import UserError
from forge_lib.flags import parse_config
from forge_lib.launch import ssh
from forge_lib.launch.config import ForgeConfig

ALICE, BOB = Machine("alice", "10.77.0.1"), Machine("bob", "10.77.0.2")


def test_ssh_runs_the_program_in_its_folder_on_the_machine(monkeypatch, tmp_path):
    program = ["-m", "forge_lib.launch.guard", "90", "--sample-prompt=it's $HOME"]
    monkeypatch.setattr(ssh, "ROOT", tmp_path / "some where")
    words = ssh.ssh_command(BOB, program)
    assert words[:3] == ["ssh", "-T", "-oBatchMode=yes"]
    assert words[-3:-1] == ["--", "10.77.0.2"]
    run = """exec .venv/bin/python -m forge_lib.launch.guard 90 '--sample-prompt=it'"'"'s $HOME'"""
    assert words[-1] == f"cd '{tmp_path}/some where' && {run}"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert ssh.ssh_command(BOB, program)[-1] == f"cd ~/'some where' && {run}"
    there = Machine("bob", "10.77.0.2", ssh="ssh://me@bob:2222", folder="forge", python="~/a b/python")
    assert ssh.ssh_command(there, ["-V"])[-2:] == ["ssh://me@bob:2222", "cd ~/forge && exec ~/'a b/python' -V"]


def test_each_machine_gets_its_place_and_all_other_flags(monkeypatch):
    """These include the flags of the command, but none that would make it read cluster.yaml on that machine."""
    commands = {}
    monkeypatch.setattr(ssh.ClusterRun, "run", lambda self, found: commands.update(found) or 0)
    monkeypatch.setattr(ssh, "find_machine", lambda cluster, wanted: cluster.machines[0])
    machines = [replace(ALICE, rank=0, processes=2), replace(BOB, rank=1)]
    cluster = Cluster("lab", machines, port=29501, device="cpu", mixed_precision="bf16")
    given = [
        *TINY,
        "--output-dir",
        "runs/it's one",
        "--grace-seconds",
        "20",
        "--max-restarts",
        "3",
        "--join-timeout",
        "9",
    ]
    config = parse_config(ForgeConfig, [*given, "--cluster", "cluster.yaml", "--ssh"])
    assert ssh.run(cluster, config) == 0
    here, there = commands[machines[0]], shlex.split(commands[machines[1]][-1])[4:]
    for rank, words in enumerate((here, there)):
        assert words[1:4] == ["-m", "forge_lib.launch.guard", "50"]
        topology = {"num_nodes": 2, "node_rank": rank, "processes_per_node": 2 - rank, "master_addr": "10.77.0.1"}
        topology |= {"master_port": 29501, "device": "cpu", "mixed_precision": "bf16", "cluster": "", "ssh": False}
        assert parse_config(ForgeConfig, words[4:]) == replace(config, **topology)
    assert here[0] == sys.executable


def test_a_missing_ssh_program_is_reported(monkeypatch):
    monkeypatch.setattr(ssh.shutil, "which", lambda program: None)
    config = parse_config(ForgeConfig, [*TINY, "--output-dir", "run", "--cluster", "cluster.yaml", "--ssh"])
    with pytest.raises(UserError, match="--ssh needs the program `ssh`"):
        ssh.run(Cluster("lab", [replace(ALICE, rank=0), replace(BOB, rank=1)]), config)


@pytest.mark.parametrize("destination", ["-oProxyCommand=date", "-p 2222 bob", "bob -v", "bob\n"])
def test_a_destination_that_ssh_would_misread_is_reported(destination):
    with pytest.raises(UserError, match=r"machine 'bob': ssh is .*, expected user@host, ssh://user@host:port"):
        ssh.ssh_command(Machine("bob", "10.77.0.2", ssh=destination), [])


@pytest.mark.parametrize(
    ("line", "shown"),
    [(b"one\n", b"one"), (b"one\r\n", b"one"), (b"\r 10%\r 20%\r      \rtwo\n", b"two"), (b"\r 10%\r 99%", b" 99%")],
)
def test_only_the_last_state_of_a_progress_bar_is_shown(line, shown):
    assert ssh.last_state(line) == shown


@pytest.mark.parametrize(
    ("codes", "code"),
    [
        ([0, 0], 0),
        ([0, 3, 2, 4, 1], 2),
        ([3, 4, 1], 4),
        ([3, 137, 1, 0], 137),
        ([0, 255], 3),
        ([130, 3, 0], 3),
        ([0, 130], 130),
    ],
)
def test_the_exit_code_is_that_of_the_machine_that_caused_the_end(codes, code):
    assert ssh.choose_code(codes) == code


@pytest.fixture
def run_scripts(capfdbinary, monkeypatch):
    """Runs shell scripts as if they were the machines' commands; returns (exit code, stdout, lines of stderr)."""
    monkeypatch.setattr(ssh, "FOLLOW_SECONDS", 1)

    def run_scripts(scripts: dict[Machine, str], are_independent: bool = False) -> tuple[int, bytes, list[str]]:
        cluster_run = ssh.ClusterRun(1, are_independent)
        code = cluster_run.run({machine: ["sh", "-c", script] for machine, script in scripts.items()})
        output = capfdbinary.readouterr()
        return code, output.out, output.err.decode().splitlines()

    return run_scripts


def test_each_line_starts_with_the_name_of_its_machine(run_scripts):
    """Only whole lines are written, even of bytes that are not text, and all of them before the end."""
    script = "printf '1%%\\r2%%\\rone\\ntw'; sleep 0.3; printf 'o\\377'"
    code, output, errors = run_scripts({ALICE: script, BOB: "echo x"})
    assert (code, errors) == (0, [])
    assert sorted(output.splitlines()) == [b"alice | one", b"alice | two\xff", b"bob   | x"]


def test_a_machine_that_cannot_be_reached_ends_the_others_at_once(run_scripts):
    """They get the request to end; the reason is the last line that ssh prints."""
    refused = "echo 'a warning' >&2; echo 'me@bob: Permission denied (publickey).' >&2; exit 255"
    code, output, errors = run_scripts({ALICE: "echo begun; head -c 1; echo", BOB: refused})
    assert code == 2
    assert output.splitlines() == [b"alice | begun", b"alice | e"]
    assert errors == [
        "p2p-llm-forge: error: bob: ssh 10.77.0.2: me@bob: Permission denied (publickey); let your key in there "
        "(ssh-copy-id)"
    ]


def test_peers_go_on_if_a_machine_fails_or_cannot_be_reached(run_scripts):
    """With --elastic; the exit code is still that of the failure."""
    refused = "echo 'me@bob: Permission denied (publickey).' >&2; exit 255"
    code, output, errors = run_scripts({ALICE: "sleep 2.5; echo end", BOB: refused}, are_independent=True)
    assert (code, output) == (3, b"alice | end\n")
    assert errors[1:] == [
        "p2p-llm-forge: bob has ended with exit code 255; the other peers go on",
        "p2p-llm-forge: alice ended with exit code 0, bob ended with exit code 255",
    ]


def test_a_program_that_is_not_there_is_reported(run_scripts):
    code, output, errors = run_scripts({ALICE: "head -c 1", BOB: "cd /no/where && exec python"})
    assert (code, output) == (2, b"alice | e\n")
    assert len(errors) == 1
    assert "error: bob: " in errors[0]
    assert errors[0].endswith("; correct `folder` or `python` of bob in cluster.yaml")
    assert "no-such-program" in run_scripts({BOB: "echo motd; exec no-such-program"})[2][0]


def test_a_lost_connection_is_reported_and_the_others_are_stopped_if_they_do_not_end(run_scripts):
    lost = "echo step 1; echo 'Timeout, server bob not responding.' >&2; exit 255"
    code, output, errors = run_scripts({ALICE: "head -c 1; echo ' was received'; exit 3", BOB: lost})
    assert code == 3
    assert b"alice | s was received\n" in output
    assert errors == [
        "p2p-llm-forge: bob: the connection is lost (Timeout, server bob not responding); it stops by itself when it "
        "notices that",
        "p2p-llm-forge: bob has failed, and the others still run",
        "p2p-llm-forge: stopping all machines; Ctrl-C again ends at once",
        "p2p-llm-forge: alice ended with exit code 3, bob ended with exit code 255",
    ]


def test_a_connection_that_hangs_is_closed(run_scripts, monkeypatch):
    monkeypatch.setattr(ssh, "CLOSE_SECONDS", 0.5)
    begun = time.monotonic()
    code, _, errors = run_scripts({ALICE: "sleep 60", BOB: "exit 255"})
    assert (code, len(errors)) == (2, 2)
    assert errors[1].startswith("p2p-llm-forge: alice did not end within 0.5 s: the connection is closed")
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize(
    ("signals", "requests", "code"),
    [([signal.SIGINT, signal.SIGINT], "se", 130), ([signal.SIGHUP, signal.SIGHUP, signal.SIGTERM], "s", 0)],
)
def test_a_second_ctrl_c_ends_at_once(capfd, signals, requests, code):
    """But a closed window sends SIGHUP twice, which is one request to stop."""

    def send() -> None:
        for number in signals:
            time.sleep(2 * ssh.POLL_SECONDS)
            os.kill(os.getpid(), number)

    cluster_run = ssh.ClusterRun(60)
    with cluster_run.handling_signals():
        threading.Thread(target=send).start()
        script = f"head -c {len(requests)}; sleep 2; echo; exit {code}"
        assert cluster_run.run({ALICE: ["sh", "-c", script]}) == code
    output = capfd.readouterr()
    assert output.out == f"alice | {requests}\n"
    assert output.err.count("stopping all machines; Ctrl-C again ends at once") == 1
