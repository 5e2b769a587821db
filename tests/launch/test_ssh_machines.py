"""Training on three machines from one terminal, through real sshd servers in network namespaces."""

import os
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import yaml
from commands import BIN, QUIET, ROOT, SHORT, Finished, Running, until
from marked_processes import processes_with
from networks import Hosts
from run_folders import rows, wait_for_step

from forge_lib.process import is_running

FLAGS = [str(ROOT / word) if word.startswith("data/") else word for word in [*SHORT, *QUIET]]
FLAGS += ["--batch-size", "6"]
SSHD = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
NAMES = ("alice", "bob", "carol")


@dataclass
class Lab:
    """Three machines with an sshd each, and a terminal on any of them."""

    hosts: Hosts
    start: Callable[..., Running]
    folder: Path
    word: str

    def start_all(self, n: int, *flags) -> Running:
        """Starts the command for all machines in a terminal on machine n."""
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

    def processes(self) -> list[psutil.Process]:
        """Returns what runs on the machines, except ssh and sshd."""
        return [process for process in processes_with(self.word) if "ssh" not in process.name()]


@pytest.fixture
def lab(hosts, start, tmp_path, monkeypatch):
    """Makes the machines, and a fourth one outside the cluster. The ssh of the real machine is not changed."""
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
    """Every line starts with the name of a machine or of the command; each machine has at least one line."""
    starts = {line.split(" | ")[0].rstrip() for line in ended.output.splitlines() if " | " in line}
    assert starts == set(names), ended.output
    assert all(" | " in line or line.startswith("p2p-llm-forge: ") for line in ended.output.splitlines())


@pytest.mark.netns
@pytest.mark.timeout(120)
def test_one_command_trains_on_three_machines(lab):
    """The machine with the terminal needs no ssh."""
    (lab.folder / "alice_keys").write_text("")
    ended = lab.start_all(1, "--max-steps", 3).finish(100)
    assert ended.code == 0, ended.output
    assert rows(lab.run_folder("alice"))[-1]["num_processes"] == 3
    assert {line.split(" | ")[0].rstrip() for line in ended.output.splitlines()} <= set(NAMES), ended.output
    assert "\r" not in ended.output
    assert not lab.processes()


@pytest.mark.netns
@pytest.mark.timeout(120)
def test_ctrl_c_saves_and_stops_all_machines(lab):
    """The terminal is on a machine outside the cluster."""
    running = lab.start_all(4, "--max-steps", 100000)
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
def test_a_killed_command_leaves_no_process(lab):
    """The processes on all machines save before they end."""
    running = lab.start_all(1, "--max-steps", 100000)
    wait_for_step(lab.run_folder("alice"), 3)
    left = lab.processes()
    running.process.kill()
    until(lambda: not any(map(is_running, left)) and not lab.processes(), 20, "the end of all processes")
    assert list(lab.run_folder("bob").glob("checkpoint*"))


@pytest.mark.netns
@pytest.mark.timeout(120)
@pytest.mark.parametrize("fault", ["cut", "key", "host key", "folder"])
def test_a_machine_that_cannot_be_started_ends_all_with_one_message(lab, fault):
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
    ended = lab.start_all(1).finish(60)
    assert ended.code == 2, ended.output
    assert message in ended.output
    assert ended.output.count("error: ") == (2 if fault == "host key" else 1), ended.output
    assert ended.seconds < 30
    assert not lab.processes()
