"""The run on all machines from one terminal, over ssh."""

import multiprocessing
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import yaml
from commands import BIN, QUIET, ROOT, SHORT, TINY, Finished, until
from marked_processes import processes_with
from run_folders import rows, wait_for_step

from forge_lib.cluster.topology import Cluster, Machine
from forge_lib.errors import UserError
from forge_lib.flags import parse_config
from forge_lib.launch import guard, launch
from forge_lib.launch import ssh as remote
from forge_lib.process import is_running

FLAGS = [str(ROOT / word) if word.startswith("data/") else word for word in [*SHORT, *QUIET]]
FLAGS += ["--batch-size", "6"]
ALICE, BOB = Machine("alice", "10.77.0.1"), Machine("bob", "10.77.0.2")
SSHD = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
NAMES = ("alice", "bob", "carol")


def test_a_machine_is_told_where_the_program_lies_and_what_to_run(monkeypatch, tmp_path):
    program = ["-m", "forge_lib.guard", "90", "--sample-prompt=it's $HOME"]
    monkeypatch.setattr(remote, "ROOT", tmp_path / "some where")
    words = remote.ssh_command(BOB, program)
    assert words[:3] == ["ssh", "-T", "-oBatchMode=yes"]
    assert words[-3:-1] == ["--", "10.77.0.2"]
    run = """exec .venv/bin/python -m forge_lib.guard 90 '--sample-prompt=it'"'"'s $HOME'"""
    assert words[-1] == f"cd '{tmp_path}/some where' && {run}"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert remote.ssh_command(BOB, program)[-1] == f"cd ~/'some where' && {run}"
    there = Machine("bob", "10.77.0.2", ssh="ssh://me@bob:2222", folder="forge", python="~/a b/python")
    assert remote.ssh_command(there, ["-V"])[-2:] == ["ssh://me@bob:2222", "cd ~/forge && exec ~/'a b/python' -V"]


def test_each_machine_gets_its_place_and_all_other_flags(monkeypatch):
    """Those of the command too, and none that would make it read a file there."""
    commands = {}
    monkeypatch.setattr(remote.Terminal, "run", lambda self, found: commands.update(found) or 0)
    monkeypatch.setattr(remote, "find_machine", lambda cluster, wanted: cluster.machines[0])
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
    config = parse_config(launch.ForgeConfig, [*given, "--cluster", "cluster.yaml", "--ssh"])
    assert remote.run(cluster, config, launch.place) == 0
    here, there = commands[machines[0]], shlex.split(commands[machines[1]][-1])[4:]
    for rank, words in enumerate((here, there)):
        assert words[1:4] == ["-m", "forge_lib.guard", "50"]
        topology = {"num_nodes": 2, "node_rank": rank, "processes_per_node": 2 - rank, "master_addr": "10.77.0.1"}
        topology |= {"master_port": 29501, "device": "cpu", "mixed_precision": "bf16", "cluster": "", "ssh": False}
        assert parse_config(launch.ForgeConfig, words[4:]) == replace(config, **topology)
    assert here[0] == sys.executable


def test_a_missing_ssh_is_named(monkeypatch):
    monkeypatch.setattr(remote.shutil, "which", lambda program: None)
    config = parse_config(launch.ForgeConfig, [*TINY, "--output-dir", "run", "--cluster", "cluster.yaml", "--ssh"])
    with pytest.raises(UserError, match="--ssh needs the program `ssh`"):
        remote.run(Cluster("lab", [replace(ALICE, rank=0), replace(BOB, rank=1)]), config, launch.place)


@pytest.mark.parametrize("destination", ["-oProxyCommand=date", "-p 2222 bob", "bob -v", "bob\n"])
def test_a_destination_is_no_option_and_one_word(destination):
    with pytest.raises(UserError, match=r"machine 'bob': ssh is .*, expected user@host, ssh://user@host:port"):
        remote.ssh_command(Machine("bob", "10.77.0.2", ssh=destination), [])


@pytest.mark.parametrize(
    ("line", "shown"),
    [(b"one\n", b"one"), (b"one\r\n", b"one"), (b"\r 10%\r 20%\r      \rtwo\n", b"two"), (b"\r 10%\r 99%", b" 99%")],
)
def test_of_a_progress_bar_the_last_state_is_shown(line, shown):
    assert remote.plain(line) == shown


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
def test_the_most_telling_exit_code_is_chosen(codes, code):
    assert remote.choose_code(codes) == code


@pytest.fixture
def terminal(capfdbinary, monkeypatch):
    """Follows shell scripts, by machine, as if they were the machines' parts; returns (code, stdout, stderr lines)."""
    monkeypatch.setattr(remote, "FOLLOW_SECONDS", 1)

    def terminal(scripts: dict[Machine, str]) -> tuple[int, bytes, list[str]]:
        code = remote.Terminal(1).run({machine: ["sh", "-c", script] for machine, script in scripts.items()})
        output = capfdbinary.readouterr()
        return code, output.out, output.err.decode().splitlines()

    return terminal


def test_each_line_has_the_name_of_its_machine(terminal):
    """Whole lines alone are written, also of bytes that are no text, and all of them before the end."""
    script = "printf '1%%\\r2%%\\rone\\ntw'; sleep 0.3; printf 'o\\377'"
    code, output, errors = terminal({ALICE: script, BOB: "echo x"})
    assert (code, errors) == (0, [])
    assert sorted(output.splitlines()) == [b"alice | one", b"alice | two\xff", b"bob   | x"]


def test_a_machine_that_cannot_be_reached_ends_the_others_at_once(terminal):
    """They get one byte, for the end; the reason is the last line that ssh says."""
    refused = "echo 'a warning' >&2; echo 'me@bob: Permission denied (publickey).' >&2; exit 255"
    code, output, errors = terminal({ALICE: "echo begun; head -c 1; echo", BOB: refused})
    assert code == 2
    assert output.splitlines() == [b"alice | begun", b"alice | e"]
    assert errors == [
        "p2p-llm-forge: error: bob: ssh 10.77.0.2: me@bob: Permission denied (publickey); let your key in there "
        "(ssh-copy-id)"
    ]


def test_a_program_that_is_not_there_is_named(terminal):
    code, output, errors = terminal({ALICE: "head -c 1", BOB: "cd /no/where && exec python"})
    assert (code, output) == (2, b"alice | e\n")
    assert len(errors) == 1
    assert "error: bob: " in errors[0]
    assert errors[0].endswith("; correct `folder` or `python` of bob in cluster.yaml")
    assert "no-such-program" in terminal({BOB: "echo motd; exec no-such-program"})[2][0]


def test_a_lost_connection_is_named_and_the_others_are_stopped_when_they_do_not_end(terminal):
    lost = "echo step 1; echo 'Timeout, server bob not responding.' >&2; exit 255"
    code, output, errors = terminal({ALICE: "head -c 1; echo ' is what I was told'; exit 3", BOB: lost})
    assert code == 3
    assert b"alice | s is what I was told\n" in output
    assert errors == [
        "p2p-llm-forge: bob: the connection is lost (Timeout, server bob not responding); it is stopped there when "
        "that is noticed",
        "p2p-llm-forge: bob has failed, and the others run on",
        "p2p-llm-forge: stopping all machines; Ctrl-C again ends at once",
        "p2p-llm-forge: alice ended with exit code 3, bob ended with exit code 255",
    ]


def test_a_connection_that_hangs_is_closed(terminal, monkeypatch):
    monkeypatch.setattr(remote, "CLOSE_SECONDS", 0.5)
    begun = time.monotonic()
    code, _, errors = terminal({ALICE: "sleep 60", BOB: "exit 255"})
    assert (code, len(errors)) == (2, 2)
    assert errors[1].startswith("p2p-llm-forge: alice did not end within 0.5 s: the connection is closed")
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize(
    ("signals", "told", "code"),
    [([signal.SIGINT, signal.SIGINT], "se", 130), ([signal.SIGHUP, signal.SIGHUP, signal.SIGTERM], "s", 0)],
)
def test_a_second_ctrl_c_ends_at_once(capfd, signals, told, code):
    """But the second SIGHUP of a window that is closed is the same wish again."""

    def send() -> None:
        for number in signals:
            time.sleep(2 * remote.POLL_SECONDS)
            os.kill(os.getpid(), number)

    terminal = remote.Terminal(60)
    with terminal.handling_signals():
        threading.Thread(target=send).start()
        script = f"head -c {len(told)}; sleep 2; echo; exit {code}"
        assert terminal.run({ALICE: ["sh", "-c", script]}) == code
    output = capfd.readouterr()
    assert output.out == f"alice | {told}\n"
    assert output.err.count("stopping all machines; Ctrl-C again ends at once") == 1


@pytest.mark.parametrize(("patience", "wish"), [("1", b"s"), ("1", b""), ("60", b"se")])
def test_a_program_that_hangs_is_killed_where_it_runs(monkeypatch, patience, wish):
    """It is told to stop, or that nobody is left; or to end at once."""

    def hang(flags: list, output: int, guard: int) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        os.write(output, b"hangs\n")
        time.sleep(60)

    monkeypatch.setattr(guard, "_launch", hang)
    monkeypatch.setattr(guard, "END_SECONDS", 1)
    (stdin, wishes), (shown, stdout) = os.pipe(), os.pipe()

    def serve() -> None:
        os.dup2(stdin, 0)
        os.dup2(stdout, 1)
        os.close(wishes)
        sys.exit(guard.serve([patience]))

    watcher = multiprocessing.get_context("fork").Process(target=serve)
    watcher.start()
    assert os.read(shown, 99) == b"hangs\n"
    begun = time.monotonic()
    os.write(wishes, wish) if wish else os.close(wishes)
    watcher.join(30)
    assert watcher.exitcode == 137
    assert 0.9 < time.monotonic() - begun < 5


def test_a_wish_to_stop_is_heard_before_the_program_listens():
    """Its imports take seconds."""
    words = [sys.executable, "-m", "forge_lib.guard", "60", *FLAGS, "--output-dir", "nowhere"]
    ended = subprocess.run(words, input=b"s", capture_output=True, cwd=ROOT, timeout=60)
    assert ended.returncode == 0
    assert ended.stdout == b"p2p-llm-forge: stopped before training began\n"


@dataclass
class Lab:
    """Three machines with an sshd each, and what a person at one of them does."""

    hosts: object
    start: object
    folder: Path
    word: str

    def terminal(self, n: int, *flags):
        """Starts the command on machine n, in a folder of its own."""
        words = [BIN / "p2p-llm-forge", "--cluster", self.folder / "cluster.yaml", "--ssh", *FLAGS, *flags]
        return self.start(
            [*words, "--output-dir", "run"],
            prefix=[*self.hosts.on(n), "env", *self.environment()],
            cwd=self.folder / "alice",
        )

    def environment(self) -> list[str]:
        names = ("HOME", "HF_HOME", "HF_HUB_OFFLINE")
        settings = {name: os.environ[name] for name in names} | {"OMP_NUM_THREADS": 1, "RIG": self.word}
        return [f"{name}={value}" for name, value in (settings | {"PYTHONPATH": ROOT}).items()]

    def run_folder(self, name: str) -> Path:
        return self.folder / name / "run"

    def processes(self) -> list:
        """What runs on the machines; their ssh and sshd are no part of it."""
        return [process for process in processes_with(self.word) if "ssh" not in process.name()]


@pytest.fixture
def lab(hosts, start, tmp_path, monkeypatch):
    """Makes the machines, and a fourth that is none of them; this machine's own ssh stays as it is."""
    if not SSHD or not shutil.which("ssh"):
        (pytest.fail if os.environ.get("CI") else pytest.skip)("needs openssh-server and openssh-client")
    machines, ports = hosts(4), {"alice": 22, "bob": 22, "carol": 2222}
    Path("/run/sshd").mkdir(exist_ok=True)
    for name in ("host_key", "key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / name], check=True)
    host_key = (tmp_path / "host_key.pub").read_text()
    known = [f"10.77.0.1,10.77.0.2,[10.77.0.3]:2222 {host_key}"]
    (tmp_path / "known_hosts").write_text("".join(known))
    (tmp_path / "ssh_config").write_text(
        f"IdentityFile {tmp_path}/key\nIdentitiesOnly yes\nIdentityAgent none\n"
        f"UserKnownHostsFile {tmp_path}/known_hosts\nGlobalKnownHostsFile /dev/null\n"
    )
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ssh").write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {tmp_path}/ssh_config "$@"\n')
    (tmp_path / "bin" / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    made = Lab(machines, start, tmp_path, uuid.uuid4().hex)
    for n, (name, port) in enumerate(ports.items(), 1):
        (tmp_path / name).mkdir()
        shutil.copy(tmp_path / "key.pub", tmp_path / f"{name}_keys")
        (tmp_path / f"{name}_sshd").write_text(
            f"Port {port}\nHostKey {tmp_path}/host_key\nAuthorizedKeysFile {tmp_path}/{name}_keys\nPidFile none\n"
            "StrictModes no\nUsePAM no\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n"
            f"SetEnv {' '.join(made.environment())}\n"
        )
        sshd = start([SSHD, "-D", "-e", "-f", tmp_path / f"{name}_sshd"], prefix=machines.on(n))
        until(lambda sshd=sshd: "listening" in sshd.log.read_text(), 10, "sshd")
    there = {name: {"folder": str(tmp_path / name), "python": sys.executable} for name in NAMES}
    there["carol"]["ssh"] = "ssh://root@10.77.0.3:2222"
    listed = [{"name": name, "address": f"10.77.0.{n}", **there[name]} for n, name in enumerate(NAMES, 1)]
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump({"name": "lab", "device": "cpu", "machines": listed}))
    yield made
    for process in made.processes():
        process.kill()


def assert_prefixed(ended: Finished, *names: str) -> None:
    """Every line is a machine's, or the command's own; each of the machines has one."""
    begins = {line.split(" | ")[0].rstrip() for line in ended.output.splitlines() if " | " in line}
    assert begins == set(names), ended.output
    assert all(" | " in line or line.startswith("p2p-llm-forge: ") for line in ended.output.splitlines())


@pytest.mark.netns
@pytest.mark.timeout(120)
def test_one_command_trains_on_three_machines(lab):
    """The one where it is typed needs no ssh."""
    (lab.folder / "alice_keys").write_text("")
    ended = lab.terminal(1, "--max-steps", 3).finish(100)
    assert ended.code == 0, ended.output
    assert rows(lab.run_folder("alice"))[-1]["num_processes"] == 3
    assert {line.split(" | ")[0].rstrip() for line in ended.output.splitlines()} <= set(NAMES), ended.output
    assert "\r" not in ended.output
    assert not lab.processes()


@pytest.mark.netns
@pytest.mark.timeout(120)
def test_ctrl_c_saves_and_stops_all_machines(lab):
    """From a machine that is none of them."""
    running = lab.terminal(4, "--max-steps", 100000)
    wait_for_step(lab.run_folder("alice"), 3)
    running.process.send_signal(signal.SIGINT)
    ended = running.finish(110)
    assert ended.code == 0, ended.output
    assert_prefixed(ended, *NAMES)
    assert ended.output.count("p2p-llm-forge: stopping all machines; Ctrl-C again ends at once\n") == 1
    for name in NAMES:
        assert list(lab.run_folder(name).glob("checkpoint*")), ended.output
    assert not lab.processes()


@pytest.mark.netns
@pytest.mark.timeout(120)
def test_a_command_that_is_killed_leaves_no_process(lab):
    """Not here, and not on the others, which save before they end."""
    running = lab.terminal(1, "--max-steps", 100000)
    wait_for_step(lab.run_folder("alice"), 3)
    left = lab.processes()
    running.process.kill()
    until(lambda: not any(map(is_running, left)) and not lab.processes(), 20, "their end")
    assert list(lab.run_folder("bob").glob("checkpoint*"))


@pytest.mark.netns
@pytest.mark.timeout(120)
@pytest.mark.parametrize("fault", ["cut", "key", "host key", "folder"])
def test_a_machine_that_cannot_be_started_ends_all_with_report_errors(lab, fault):
    if fault == "cut":
        lab.hosts.cut(2)
        message = "bob: ssh 10.77.0.2: connect to host 10.77.0.2 port 22: "
    elif fault == "key":
        (lab.folder / "bob_keys").write_text("")
        message = "bob: ssh 10.77.0.2: root@10.77.0.2: Permission denied (publickey); let your key in there"
    elif fault == "host key":
        (lab.folder / "known_hosts").write_text("")
        message = "; run `ssh "
    else:
        (lab.folder / "bob").rmdir()
        message = f"{lab.folder}/bob: No such file or directory; correct `folder` or `python` of bob in cluster.yaml"
    ended = lab.terminal(1).finish(60)
    assert ended.code == 2, ended.output
    assert message in ended.output
    assert ended.output.count("error: ") == (2 if fault == "host key" else 1), ended.output
    assert ended.seconds < 30
    assert not lab.processes()
