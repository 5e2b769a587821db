"""What a run survives: faults injected into runs of several machines, each held to what the README promises.

A run ends or goes on within a stated time (a); its exit code and a line name the peer and the reason (b); all
machines then hold the same weights (c), which are those of a run that nothing disturbed, bit for bit (d); no process
is left (e) and the newest checkpoint verifies (f). `Rig.hold` checks (c) to (f).
"""

import contextlib
import json
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterable
from pathlib import Path

import pytest
from conftest import (
    ROOT,
    TINY,
    Finished,
    Running,
    is_running,
    lock_of,
    losses,
    processes,
    processes_with,
    rows,
    sha256,
    tmpfs,
    until,
    wait_for_step,
    workers,
)

from forge_lib.checkpoints import format as checkpoint

FAULTY = ROOT / "tests" / "faults" / "faulty.py"
STEPS = 30
FLAGS = [*TINY, "--eval-fraction", 0.05, "--sequence-length", 64, "--batch-size", 12, "--learning-rate", 1e-3]
FLAGS += ["--mixed-precision", "no", "--eval-every", 0, "--checkpoint-every", 5, "--log-every", 1]
FLAGS += ["--check-replicas-every", 10, "--keep-checkpoints", 3]
FLAGS = [str(word) for word in FLAGS]
SLOW = {"do": "sleep", "at": "computing", "seconds": 0.2}
TIMEOUT = 6  # --timeout-seconds of runs in which somebody falls silent
DEATH_SECONDS = 6  # in which the others know of a process that was killed in a step
REACTION_SECONDS = 4  # and, beyond the time-out, of one that is silent
ONE_THREAD = {"OMP_NUM_THREADS": 1}  # as two processes on one machine have: other numbers round otherwise
netns = pytest.mark.netns


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory, home):
    """Returns the folder of a run that nothing disturbs: `undisturbed(num_steps, num_processes)`."""
    made = {}

    def undisturbed(num_steps: int = STEPS, num_processes: int = 2) -> Path:
        key = (num_steps, num_processes)
        if key not in made:
            folder = tmp_path_factory.mktemp("undisturbed")
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            launcher = processes(folder, port, num_processes=num_processes)
            words = [*launcher, "scripts/train.py", *FLAGS, "--max-steps", num_steps, "--output-dir", folder / "run"]
            ended = Running(words, folder / "log").finish()
            assert ended.code == 0, ended.output
            made[key] = folder / "run"
        return made[key]

    return undisturbed


def gone(ending: Iterable, seconds: float, what: str) -> None:
    """Waits until none of these processes lives."""
    until(lambda: not any(map(is_running, ending)), seconds, what)


class Mark:
    """A line that faulty.py has written: which fault, where and when."""

    def __init__(self, line: str):
        found = re.fullmatch(r"FAULT (\w+): (.*), step (\d+), rank (\d+), pid (\d+), time ([\d.]+)", line)
        self.do, self.at = found[1], found[2]
        self.step, self.rank, self.pid = map(int, found.group(3, 4, 5))
        self.time = float(found[6])

    def ago(self) -> float:
        """Seconds since then."""
        return time.time() - self.time


class Rig:
    """Machines, from 1, that train one run through faulty.py, each in a folder of its own.

    With `hosts` they have network namespaces and names of their own, else all are this one.
    """

    def __init__(self, start, folder: Path, port: int, hosts=None, count: int = 2):
        self.start, self.folder, self.port, self.hosts, self.count = start, folder, port, hosts, count
        self.word = f"rig-{uuid.uuid4().hex}"  # in the environment of all that it starts
        self.running: list[Running] = []

    def run_folder(self, n: int) -> Path:
        return self.folder / f"machine{n}"

    def name(self, n: int) -> str:
        return f"machine{n}" if self.hosts else socket.gethostname()

    def prefix(self, n: int, faults: list, environment: dict) -> list[str]:
        words = []
        if self.hosts:
            named = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', self.name(n)]
            words = [*self.hosts.on(n), *named]
        settings = {"FAULTS": json.dumps(faults), "RIG": self.word, **ONE_THREAD, **environment}
        return [*words, "env", *(f"{name}={value}" for name, value in settings.items())]

    def machine(
        self,
        n: int,
        *flags,
        faults: list = (),
        launcher: str = "forge",
        rank: int | None = None,
        count: int = 0,
        main: int = 1,
        environment: dict | None = None,
        **options,
    ) -> Running:
        """Starts machine n, as the one with this `rank` of `count`; `main` is the number of the main machine."""
        rank, count = n - 1 if rank is None else rank, count or self.count
        address = f"10.77.0.{main}" if self.hosts else "127.0.0.1"
        if launcher == "forge":
            words = [sys.executable, FAULTY, "p2p-llm-forge", "--num-nodes", count, "--node-rank", rank]
            words += ["--master-addr", address, "--master-port", self.port, "--processes-per-node", 1]
        else:
            topology = {"num_machines": count, "machine_rank": rank, "num_processes": count}
            words = [*processes(self.folder, self.port, main_process_ip=address, **topology), FAULTY]
        words += ["--output-dir", self.run_folder(n), *FLAGS, "--max-steps", STEPS, *flags]
        options["prefix"] = self.prefix(n, list(faults), environment or {})
        self.running.append(self.start(words, **options))
        return self.running[-1]

    def begin(self, *flags, **options) -> list[Running]:
        """Starts all machines."""
        return [self.machine(n, *flags, **options) for n in range(1, self.count + 1)]

    def output(self) -> str:
        """All that all of them have written."""
        return "\n".join(each.log.read_text(errors="replace") for each in self.running)

    def marks(self) -> list[Mark]:
        """The faults that have happened, in order."""
        found = [Mark(line) for line in self.output().splitlines() if line.startswith("FAULT ")]
        return sorted(found, key=lambda mark: mark.time)

    def mark(self, number: int = 0, seconds: float = 90) -> Mark:
        """Waits for the fault of this number."""

        def found() -> Mark | None:
            marks = self.marks()
            if len(marks) <= number and all(each.process.poll() is not None for each in self.running):
                pytest.fail(f"all ended before fault {number}:\n{self.output()[-6000:]}")
            return marks[number] if len(marks) > number else None

        return until(found, seconds, f"fault {number} in\n{self.output()[-6000:]}")

    def workers(self) -> dict:
        """The living training processes, by rank."""
        return workers(self.word)

    def finish(self, running: list[Running], *codes: int, timeout: float = 120) -> list[Finished]:
        """Waits for the machines' end, and holds them to their exit codes."""
        ended = [each.finish(timeout) for each in running]
        assert [each.code for each in ended] == list(codes), "\n=====\n".join(each.output[-4000:] for each in ended)
        return ended

    def no_process_is_left(self, seconds: float = 10) -> None:
        until(lambda: not processes_with(self.word), seconds, f"no process left, but {processes_with(self.word)}")

    def newest(self, n: int) -> Path:
        """The newest checkpoint of machine n."""
        return max((self.run_folder(n) / "checkpoints").glob("step-*"))

    def hold(self, expected: Path | None, machines: range | None = None) -> None:
        """Holds a run that is over to points c to f; `expected` is the undisturbed one, if it is at its end."""
        self.no_process_is_left()
        newest = [self.newest(n) for n in machines or range(1, self.count + 1)]
        assert {path.name for path in newest} == {newest[0].name}
        assert len({(path / "manifest.json").read_text() for path in newest}) == 1
        for path in newest:
            assert checkpoint.verify(path) is None
            assert not list(path.parent.glob(".*")), "something is left of a save"
        if expected:
            final = self.run_folder(1) / "final" / "model.safetensors"
            assert sha256(final) == sha256(expected / "final" / "model.safetensors")


@pytest.fixture
def rig(start, tmp_path, free_port):
    """Makes a rig: `rig()` on this machine, `rig(hosts(2))` on machines of their own."""
    made = []

    def rig(hosts=None, count: int = 2) -> Rig:
        made.append(Rig(start, tmp_path, free_port, hosts, count))
        return made[-1]

    yield rig
    for each in made:
        for process in processes_with(each.word):
            if is_running(process):
                process.kill()


# The quick ones.


def test_a_loss_that_is_not_finite_is_skipped_by_all_and_a_changed_weight_is_named(run, tmp_path, free_port, table):
    """Process 1's loss is NaN in step 4, for which no weight changes; one of its weights is another from step 8 on."""
    faults = [{"do": "nan", "at": "computing", "step": 4, "rank": 1}]
    faults += [{"do": "weight", "at": "computing", "step": 8, "rank": 1}]
    words = [sys.executable, FAULTY, "p2p-llm-forge", "--processes-per-node", 2, "--master-port", free_port, *FLAGS]
    words += ["--max-steps", STEPS, "--on-nonfinite", "skip", "--output-dir", tmp_path / "run"]
    ended = run(words, prefix=["env", f"FAULTS={json.dumps(faults)}"])
    assert ended.code == 4, ended.output
    assert "step 4 is skipped: not finite: process 1, samples" in ended.output
    line = next(line for line in ended.output.splitlines() if "the replica of process 1 on" in line)
    assert "step 10: " in line, "the first comparison after step 8"
    assert f"process 1 on {socket.gethostname()} differs from process 0" in line
    assert [row["step"] for row in rows(tmp_path / "run", "where")] == [4]
    folder = tmp_path / "run" / "checkpoints"
    assert [path.name for path in folder.iterdir()] == ["step-00000005"]
    assert checkpoint.verify(folder / "step-00000005") is None
    table.add("NaN loss on one rank", "all skip the step, weights unchanged")
    table.add("one weight changed by 1e-3 on one rank", "exit 4 at the next comparison, rank and host named")


def test_a_worker_that_is_told_to_stop_has_all_save_and_goes_on_to_the_same_weights(
    start, tmp_path, two_processes, undisturbed, table
):
    """SIGTERM to one of the two processes that accelerate has launched."""
    folder, word = tmp_path / "run", uuid.uuid4().hex
    words = [*two_processes, FAULTY, *FLAGS, "--max-steps", STEPS, "--output-dir", folder]
    faults = [{"do": "term", "at": "computing", "step": 7, "rank": 1}]
    ended = start(words, prefix=["env", f"FAULTS={json.dumps(faults)}", f"RIG={word}"]).finish()
    assert ended.code == 0, ended.output
    assert re.search(r"stopping after step \d+: SIGTERM on", ended.output)
    step = rows(folder, "reason")[0]["step"]
    assert 7 <= step <= 8
    assert checkpoint.verify(folder / "checkpoints" / f"step-{step:08d}") is None
    assert not (folder / "final").exists()
    until(lambda: not processes_with(word), 10, "no process left")
    ended = start(words).finish()
    assert ended.code == 0, ended.output
    assert f"resuming after step {step}" in ended.output
    final = undisturbed() / "final" / "model.safetensors"
    assert sha256(folder / "final" / "model.safetensors") == sha256(final)
    table.add("SIGTERM to a worker", "all save, exit 0; resumed bit for bit")


def test_a_killed_process_ends_the_other_machine_with_its_name(rig, table):
    """Without restarts: exit code 3 of the one that is left, which says who is lost and what to do."""
    cluster = rig()
    faults = [{"do": "kill", "at": "computing", "step": 7, "rank": 1}, {**SLOW, "seconds": 0.1}]
    first, second = cluster.begin("--timeout-seconds", TIMEOUT, faults=faults)
    mark = cluster.mark()
    output = first.finish().output
    seconds = mark.ago()
    assert first.process.returncode == 3, output
    assert seconds < DEATH_SECONDS + 3, "with the launcher's end"
    line = next(line for line in output.splitlines() if line.startswith("train.py: error: "))
    assert f"lost process 1 on {cluster.name(2)}" in line
    assert "Start the same command again on every machine" in line
    assert second.finish().code == 128 + signal.SIGKILL
    assert "was killed by SIGKILL at step 6" in second.log.read_text()
    cluster.no_process_is_left()
    assert rows(cluster.run_folder(1), "message")[0]["event"] == "peer_lost"
    table.add("kill -9 of a worker, no restarts", "exit 3, peer named", seconds)


def test_the_main_machine_says_which_checkpoints_another_one_could_not_write(rig):
    cluster = rig()
    cluster.run_folder(2).mkdir(parents=True)
    (cluster.run_folder(2) / "checkpoints").touch()
    ended = cluster.finish(cluster.begin("--max-steps", 10, "--checkpoint-every", 5), 0, 0)
    failed = [row for row in rows(cluster.run_folder(1), "error") if row["event"] == "checkpoint_failed"]
    assert [(row["step"], row["host"]) for row in failed] == [(5, cluster.name(2)), (10, cluster.name(2))]
    for row in failed:
        assert "File exists" in row["error"]
        assert f"the checkpoint of step {row['step']} was not written: {row['error']}" in ended[0].output


# The long ones.

PHASES = {"start": ("loading the model", None), "step": ("computing", 8), "save": ("writing", 10)}
PHASES |= {"evaluation": ("evaluating", 20)}


def in_each_phase(folder: Path, do: str, ranks: list[int], **options) -> list[dict]:
    """The same fault once in each phase."""
    return [
        {"do": do, "at": at, "rank": rank, "once": str(folder / f"once_{phase}"), **options}
        | ({} if step is None else {"step": step})
        for (phase, (at, step)), rank in zip(PHASES.items(), ranks, strict=True)
    ]


@netns
@pytest.mark.faults
@pytest.mark.timeout(500)
@pytest.mark.parametrize("do", ["kill", "kill_launcher", "stop", "cut"])
def test_a_fault_in_each_phase_is_named_and_the_run_comes_back(rig, hosts, tmp_path, table, undisturbed, do):
    """At the start, in a step, in a save and in an evaluation, each by another attempt of the same two commands."""
    machines = hosts(2)
    cluster = rig(machines)
    ranks = [1, 1, 1, 1] if do == "cut" else [1, 0, 1, 0] if do == "kill" else [0, 1, 0, 1]
    faults = in_each_phase(tmp_path, "sleep" if do == "cut" else do, ranks, seconds=2)
    flags = ["--timeout-seconds", TIMEOUT, "--eval-every", 10, "--max-restarts", 10]
    running = cluster.begin(*flags, faults=[*faults, SLOW])
    for number, phase in enumerate(PHASES):
        mark = cluster.mark(number)
        before = {worker.pid: worker for worker in cluster.workers().values()}
        others = [worker for pid, worker in before.items() if pid != mark.pid]  # if they are not gone already
        if do == "cut":
            machines.cut(2)
        silent = do in ("stop", "cut")
        limit = TIMEOUT + REACTION_SECONDS if silent or phase in ("start", "evaluation") else DEATH_SECONDS
        gone(others, limit + 30, f"the other leaves, {phase}\n{cluster.output()[-5000:]}")
        seconds = mark.ago()
        if do == "cut":
            gone([before[mark.pid]], 30, f"both sides leave, {phase}")
            machines.heal(2)
        if do == "stop":
            time.sleep(1)
            before[mark.pid].send_signal(signal.SIGCONT)
            gone([before[mark.pid]], 30, f"the woken one leaves, {phase}")
        table.add(f"{do} in {phase}", "others leave, run comes back bit for bit", seconds)
        assert seconds < limit, f"{phase}\n{cluster.output()[-5000:]}"
    ended = cluster.finish(running, 0, 0, timeout=480)
    for each in ended:
        assert each.output.count("starting again in") == 4, each.output[-8000:]
    named = [line for each in ended for line in each.output.splitlines() if "error: " in line and "lost" in line]
    for rank in set(ranks):
        assert any(
            f"process {rank} on {cluster.name(rank + 1)}" in line or (rank == 0 and "main machine" in line)
            for line in named
        ), named
    cluster.hold(undisturbed())


@netns
@pytest.mark.faults
def test_a_link_that_is_cut_for_five_seconds_only_pauses_the_run(rig, hosts, tmp_path, table, undisturbed):
    """In each phase; the connections of a stranger who sends garbage to every port change nothing either."""
    machines = hosts(3)
    cluster = rig(machines)
    faults = in_each_phase(tmp_path, "sleep", [1, 1, 1, 1], seconds=2)
    running = cluster.begin("--timeout-seconds", 20, "--eval-every", 10, faults=[*faults, SLOW])
    for number, phase in enumerate(PHASES):
        cluster.mark(number)
        begun, step = time.monotonic(), lock_of(cluster.run_folder(1)).get("step", -1)
        machines.cut(2)
        time.sleep(5)
        machines.heal(2)
        until(
            lambda: lock_of(cluster.run_folder(1)).get("step", -1) > step + (1 if step >= 0 else 0),  # noqa: B023
            30,
            f"it goes on after {phase}\n{cluster.output()[-5000:]}",
        )
        table.add(f"link cut for 5 s in {phase}", "pauses, goes on", time.monotonic() - begun)
        if phase == "step":
            throw_garbage(machines, 3, ["10.77.0.1", "10.77.0.2"])
    cluster.finish(running, 0, 0)
    assert "lost" not in cluster.output()
    table.add("stranger sends garbage to all ports", "no effect")
    cluster.hold(undisturbed())


GARBAGE = """
import os, socket, subprocess, sys
for address, ports in zip(sys.argv[1::2], sys.argv[2::2]):
    for port in map(int, ports.split(",")):
        for data in (os.urandom(1000), b"GET / HTTP/1.0\\r\\n\\r\\n", b""):
            try:
                with socket.create_connection((address, port), timeout=1) as link:
                    link.sendall(data)
                    print("sent", address, port, len(data))
            except OSError as error:
                print(address, port, error)
"""


def throw_garbage(machines, stranger: int, addresses: list[str]) -> None:
    """From a machine that takes no part, to every port that the others listen on."""
    words = []
    for n, address in enumerate(addresses, 1):
        listed = subprocess.run([*machines.on(n), "ss", "-Htln"], capture_output=True, text=True, check=True).stdout
        ports = {line.split()[3].rpartition(":")[2] for line in listed.splitlines()}
        words += [address, ",".join(sorted(ports))]
    command = [*machines.on(stranger), sys.executable, "-c", GARBAGE, *words]
    sent = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert "sent 10.77.0.1" in sent, sent


@netns
@pytest.mark.faults
@pytest.mark.timeout(400)
def test_the_run_goes_on_from_the_newest_checkpoint_that_any_machine_holds(rig, hosts, table, tmp_path, undisturbed):
    """Of three: the main machine's folder is gone, another's newest is damaged, the third's is one behind."""
    cluster = rig(hosts(3), count=3)
    # To the end of step 20, on all; stopped there by a file.
    faults = [SLOW]
    running = cluster.begin("--timeout-seconds", 20, faults=faults)
    wait_for_step(cluster.run_folder(2), 17)
    (cluster.run_folder(3) / "stop").touch()
    cluster.finish(running, 0, 0, 0)
    cluster.hold(None)
    newest = cluster.newest(1).name
    older = sorted(path.name for path in (cluster.run_folder(3) / "checkpoints").glob("step-*"))[-2]

    def disturb() -> None:
        shutil.rmtree(cluster.run_folder(1))
        path = cluster.newest(2) / "model.safetensors"
        content = bytearray(path.read_bytes())
        content[len(content) * 6 // 10] ^= 1
        path.write_bytes(content)

    # The newest is whole on machine 3 alone.
    shutil.copytree(tmp_path, tmp_path.with_name(f"{tmp_path.name}_copy"))
    disturb()
    ended = cluster.finish(cluster.begin("--timeout-seconds", 20), 0, 0, 0)
    assert f"machine2: checkpoint {newest} is passed over: model.safetensors is not the file" in ended[0].output
    assert f"resuming after step {int(newest[5:])}" in ended[0].output
    cluster.hold(undisturbed(num_processes=3))
    table.add("main's folder gone, another's newest damaged", "newest fetched from the third, bit for bit")

    # The newest is whole nowhere but on machine 1, which is away; machine 3 is one behind: 3 and 2 go on, 3 is main.
    for n in (1, 2, 3):
        shutil.rmtree(cluster.run_folder(n))
        shutil.copytree(tmp_path.with_name(f"{tmp_path.name}_copy") / f"machine{n}", cluster.run_folder(n))
    disturb()
    shutil.rmtree(cluster.newest(3))
    running = [cluster.machine(3, rank=0, count=2, main=3), cluster.machine(2, rank=1, count=2, main=3)]
    ended = cluster.finish(running, 0, 0)
    assert f"machine2: checkpoint {newest} is passed over" in ended[0].output
    assert f"resuming after step {int(older[5:])}" in ended[0].output
    cluster.no_process_is_left()
    expected = losses(undisturbed(num_processes=3))[int(older[5:]) :]
    assert losses(cluster.run_folder(3)) == pytest.approx(expected, rel=1e-4)
    table.add("the same, two of three with another main", "older one taken, losses within 1e-4")


@netns
@pytest.mark.faults
@pytest.mark.timeout(400)
def test_restarts_bring_a_run_to_its_end_whoever_fails(rig, hosts, table, tmp_path, undisturbed):
    """A worker of one machine is killed, then of the other, then the main machine's link is cut for 30 s."""
    machines = hosts(2)
    cluster = rig(machines)
    faults = [
        {"do": "kill", "at": "computing", "step": 7, "rank": 1, "once": str(tmp_path / "once_1")},
        {"do": "kill", "at": "computing", "step": 13, "rank": 0, "once": str(tmp_path / "once_2")},
        {"do": "sleep", "at": "computing", "step": 19, "rank": 0, "once": str(tmp_path / "once_3")},
        SLOW,
    ]
    running = cluster.begin("--timeout-seconds", TIMEOUT, "--max-restarts", 5, faults=faults)
    for number in (0, 1):
        begun = cluster.mark(number)
        step = lock_of(cluster.run_folder(1))["step"]
        before = lock_of(cluster.run_folder(2))["pid"]
        until(
            lambda: (
                lock_of(cluster.run_folder(2)).get("pid", before) != before  # noqa: B023
                and lock_of(cluster.run_folder(2))["step"] >= 1
            ),
            90,
            f"trains again\n{cluster.output()[-6000:]}",
        )
        table.add(f"worker {1 - number} killed (step {step}), --max-restarts", "trains again", begun.ago())
    mark = cluster.mark(2)
    machines.cut(1)
    time.sleep(30)
    machines.heal(1)
    cluster.finish(running, 0, 0, timeout=360)
    cluster.hold(undisturbed())
    table.add("main machine cut off for 30 s, --max-restarts", "comes back, ends bit for bit", mark.ago())


@netns
@pytest.mark.faults
@pytest.mark.timeout(900)
def test_workers_killed_at_twenty_random_steps_cost_nothing(rig, hosts, table, tmp_path, undisturbed):
    """Ten on each machine, the one with the store too, at moments drawn by a seed."""
    draw = random.Random(20)
    num_steps, moments = 60, ["reading its batch", "computing", "saving"]
    cluster = rig(hosts(2))
    faults = []
    for number, step in enumerate(sorted(draw.sample(range(2, num_steps), 20))):
        at = moments[draw.randrange(2 if step % 5 else 3)]  # it saves after each fifth
        once = str(tmp_path / f"once_{number}")
        faults.append({"do": "kill", "at": at, "step": step, "rank": number % 2, "once": once})
    flags = ["--timeout-seconds", TIMEOUT, "--max-restarts", 30, "--max-steps", num_steps]
    running = cluster.begin(*flags, faults=[*faults, {**SLOW, "seconds": 0.05}])
    cluster.finish(running, 0, 0, timeout=880)
    marks = cluster.marks()
    assert len(marks) == 20
    for rank in (0, 1):
        count = sum(mark.rank == rank for mark in marks)
        table.add(f"kill -9 of worker {rank} at random steps, --max-restarts", f"{count} times, bit for bit")
    cluster.hold(undisturbed(num_steps))


@netns
@pytest.mark.faults
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("launcher", "n"), [("forge", 1), ("forge", 2), ("accelerate", 1), ("accelerate", 2)])
def test_sigterm_to_one_launcher_stops_all_machines_with_a_checkpoint(rig, hosts, table, undisturbed, launcher, n):
    cluster = rig(hosts(2))
    running = cluster.begin("--timeout-seconds", TIMEOUT, faults=[SLOW], launcher=launcher)
    wait_for_step(cluster.run_folder(n), 7)
    begun = time.monotonic()
    running[n - 1].process.send_signal(signal.SIGTERM)
    ended = [each.finish(60) for each in running]
    seconds = time.monotonic() - begun
    if launcher == "forge":
        assert [each.code for each in ended] == [0, 0], cluster.output()[-6000:]
    assert re.search(r"stopping after step \d+: SIGTERM on " + cluster.name(n), ended[0].output), ended[0].output
    assert "lost" not in cluster.output()
    cluster.hold(None)
    assert int(cluster.newest(1).name[5:]) not in (5, 10)
    codes = " and ".join(str(each.code) for each in ended)
    table.add(f"SIGTERM to the launcher ({launcher}) of machine {n}", f"all save, exit codes {codes}", seconds)
    cluster.finish(cluster.begin(launcher=launcher), 0, 0)
    cluster.hold(undisturbed())


@netns
@pytest.mark.faults
@pytest.mark.parametrize("n", [1, 2])
def test_a_disk_that_is_full_read_only_or_gone_costs_checkpoints_alone(rig, hosts, table, undisturbed, n):
    """One after the other on one machine, with room and rights again in between; the run goes on all the while."""
    cluster = rig(hosts(2))
    folder = cluster.run_folder(n)
    checkpoints = folder / "checkpoints"

    def steps() -> list[int]:
        return sorted(int(path.name[5:]) for path in checkpoints.glob("step-*"))

    def whole() -> bool:
        return all(checkpoint.verify(checkpoints / f"step-{step:08d}") is None for step in steps())

    with tmpfs(folder, "100m"):
        limits = [{"do": "limit", "at": "computing", "step": 32, "rank": n - 1, "bytes": 1_000_000}]
        limits += [{"do": "limit", "at": "computing", "step": 37, "rank": n - 1}]
        flags = ["--timeout-seconds", 20, "--max-steps", 45]
        running = cluster.begin(*flags, faults=[{**SLOW, "seconds": 0.4}, *limits])
        wait_for_step(folder, 6)
        until(lambda: steps() == [5], 5, "the first checkpoint")
        with open(folder / "filler", "wb") as filler, pytest.raises(OSError, match="No space"):
            while True:
                filler.write(bytes(1 << 16))
                filler.flush()
        wait_for_step(folder, 12)
        assert steps() == [5] and whole(), "full disk"
        (folder / "filler").unlink()
        wait_for_step(folder, 17)
        assert steps() == [5, 15] and whole(), "room again"
        subprocess.run(["mount", "-o", "remount,ro", folder], check=False)
        read_only = "ro," in next(
            line for line in Path("/proc/mounts").read_text().splitlines() if str(folder) in line
        )
        if not read_only:  # files are open for writing: a read-only folder, made by a mount over it
            subprocess.run(["mount", "--bind", checkpoints, checkpoints], check=True)
            subprocess.run(["mount", "-o", "remount,ro,bind", checkpoints], check=True)
        wait_for_step(folder, 22)
        assert steps() == [5, 15] and whole(), "read-only"
        if not read_only:
            subprocess.run(["umount", checkpoints], check=True)
        subprocess.run(["mount", "-o", "remount,rw", folder], check=True)
        wait_for_step(folder, 24)
        checkpoints.rename(folder / "moved")
        wait_for_step(folder, 27)
        assert steps() == [25] and whole(), "the folder is gone: it is made anew"
        wait_for_step(folder, 36)
        assert steps() == [25, 30] and whole(), "files may have a megabyte"
        ended = cluster.finish(running, 0, 0)
        assert steps() == [30, 40, 45] and whole()
        failed = [row for row in rows(cluster.run_folder(1), "error") if row["event"] == "checkpoint_failed"]
        assert {20, 35} <= {row["step"] for row in failed} and {row["host"] for row in failed} == {cluster.name(n)}
        for step in (10, 20, 35):
            for output in (ended[0].output, ended[n - 1].output):
                assert f"{cluster.name(n)}: the checkpoint of step {step} was not written: " in output
        cluster.hold(undisturbed(45))
    for fault in ("full disk", "read-only disk", "checkpoint folder renamed", "file-size limit"):
        table.add(f"{fault} on machine {n}", "training goes on, older ones whole, next save succeeds")


def shape(machines, n: int, rate: str) -> None:
    """Gives the link of machine n a rate both ways."""
    words = f"tc qdisc replace dev e0 root tbf rate {rate} burst 32kb latency 200ms".split()
    subprocess.run([*machines.on(n), *words], check=True)
    words = f"tc qdisc replace dev v{n} root tbf rate {rate} burst 32kb latency 200ms".split()
    subprocess.run([*machines.on(0), *words], check=True)


@netns
@pytest.mark.faults
@pytest.mark.timeout(400)
@pytest.mark.parametrize("source", ["text", "store"])
def test_an_empty_machine_gets_all_from_its_peer_through_a_cut_link(
    rig, hosts, run, table, tmp_path, undisturbed, source
):
    """Machine 2 has the program alone, caches and working folder of its own; its link is cut for 10 s meanwhile."""
    machines = hosts(2)
    cluster = rig(machines)
    homes = [tmp_path / f"home{n}" for n in (1, 2)]
    for n, home in enumerate(homes, 1):
        (home / "work").mkdir(parents=True)
        cluster.run_folder(n).mkdir()
    shutil.copytree(ROOT / "data", homes[0] / "work" / "data")
    flags = ["--timeout-seconds", 20]
    if source == "store":
        words = [sys.executable, "scripts/prepare_data.py", *TINY, "--output-dir", homes[0] / "work" / "store"]
        prepared = run(words)
        assert prepared.code == 0, prepared.output
        flags += ["--dataset-path", "store"]
    shape(machines, 2, "1mbit")
    running = []
    for n, home in enumerate(homes, 1):
        environment = {"HOME": home, "HF_HOME": home / "hf", "PYTHONPATH": ROOT}
        running.append(cluster.machine(n, *flags, environment=environment, cwd=home / "work"))

    def travels() -> bool:
        with contextlib.suppress(FileNotFoundError):  # it gets its name meanwhile
            return any(path.stat().st_size > 50_000 for path in homes[1].rglob("tokens.bin"))
        return False

    until(travels, 90, "something arrives")
    begun = time.monotonic()
    machines.cut(2)
    time.sleep(10)
    machines.heal(2)
    shape(machines, 2, "1gbit")
    cluster.finish(running, 0, 0)
    table.add(
        f"second machine empty ({source}), link cut 10 s", "gets all, undisturbed weights", time.monotonic() - begun
    )
    cluster.hold(undisturbed())
    ours, theirs = (home / "work" / "data" / "tiny_gpt2" / "tokenizer.json" for home in homes)
    assert sha256(ours) == sha256(theirs)
    stores = [
        sorted((path.name, sha256(path)) for path in next(home.rglob("tokens.bin")).parent.iterdir() if path.is_file())
        for home in homes
    ]
    assert stores[0] == stores[1]


@netns
@pytest.mark.faults
@pytest.mark.timeout(300)
def test_the_others_wait_for_a_main_machine_that_lost_its_power(rig, hosts, table, tmp_path, undisturbed):
    """All its processes are killed and its link is down; it comes back later, with an empty disk."""
    machines = hosts(2)
    cluster = rig(machines)
    flags = ["--timeout-seconds", TIMEOUT, "--max-restarts", 5]
    faults = [SLOW]
    first, second = cluster.begin(*flags, faults=faults)
    wait_for_step(cluster.run_folder(1), 12)
    worker = cluster.workers()[1]
    machines.cut(1)
    begun = time.monotonic()
    first.kill()
    gone([worker], TIMEOUT + REACTION_SECONDS, "machine 2 leaves")
    table.add("power loss of the main machine", "the other leaves and waits for it by name", time.monotonic() - begun)
    line = "machine2 waits for the main machine machine1 at 10.77.0.1"
    until(lambda: line in second.log.read_text(), 60, f"it says for whom it waits\n{second.log.read_text()}")
    shutil.rmtree(cluster.run_folder(1))
    machines.heal(1)
    first = cluster.machine(1, *flags, faults=faults)
    cluster.finish([first, second], 0, 0, timeout=200)
    assert re.search(r"resuming after step 1\d", first.log.read_text())
    cluster.hold(undisturbed())


@netns
@pytest.mark.faults
@pytest.mark.timeout(200)
def test_a_link_that_is_cut_at_the_very_end_costs_nothing(rig, hosts, table, undisturbed):
    """All have met for the last time; machine 2 has only to leave."""
    machines = hosts(2)
    cluster = rig(machines)
    faults = [{"do": "sleep", "at": "leaving", "step": STEPS, "rank": 1, "seconds": 3}]
    faults += [{"do": "sleep", "at": "finalizing", "rank": 1, "seconds": 15}]
    running = cluster.begin("--timeout-seconds", 20, "--max-restarts", 2, faults=faults)
    mark = cluster.mark()
    machines.cut(2)
    time.sleep(6)
    machines.heal(2)
    cluster.finish(running, 0, 0, timeout=120)
    assert "starting again" not in cluster.output()
    table.add("link cut for 6 s at the very end", "exit 0", mark.ago())
    cluster.hold(undisturbed())


@netns
@pytest.mark.faults
@pytest.mark.timeout(300)
def test_a_flapping_link_brings_no_storm_of_restarts(rig, hosts, table, undisturbed):
    """Down for 4 s of each 10 s, with a time-out above that."""
    machines = hosts(2)
    cluster = rig(machines)
    running = cluster.begin("--timeout-seconds", 10, "--max-restarts", 5, faults=[{**SLOW, "seconds": 1.0}])
    wait_for_step(cluster.run_folder(1), 2)
    begun = time.monotonic()
    while any(each.process.poll() is None for each in running) and time.monotonic() < begun + 200:
        machines.cut(2)
        time.sleep(4)
        machines.heal(2)
        time.sleep(6)
    cluster.finish(running, 0, 0, timeout=290)
    restarts = max(each.log.read_text().count("starting again") for each in running)
    table.add("link down 4 s of every 10 s", f"ends bit for bit, {restarts} restarts", time.monotonic() - begun)
    assert restarts <= 2
    cluster.hold(undisturbed())


@netns
@pytest.mark.faults
def test_two_machines_that_lose_each_other_alone_end_all_three(rig, hosts, table):
    """The main machine reaches both, 2 and 3 do not reach each other any more."""
    machines = hosts(3)
    cluster = rig(machines, count=3)
    running = cluster.begin("--timeout-seconds", TIMEOUT, faults=[SLOW])
    wait_for_step(cluster.run_folder(1), 4)
    begun = time.monotonic()
    for n, other in ((2, 3), (3, 2)):
        subprocess.run([*machines.on(n), *f"ip route add blackhole 10.77.0.{other}/32".split()], check=True)
    ended = [each.finish(60) for each in running]
    seconds = time.monotonic() - begun
    assert [each.code for each in ended] == [3, 3, 3], cluster.output()[-6000:]
    assert re.search(r"machine[23] \(process [12]\) cannot reach process [12] on machine[32]", cluster.output())
    assert seconds < TIMEOUT + 12, seconds
    table.add("pair partition of three", "exit 3 on all, the pair named", seconds)
    cluster.no_process_is_left()


@netns
@pytest.mark.faults
def test_connections_that_are_reset_end_both_machines(rig, hosts, table):
    machines = hosts(2)
    cluster = rig(machines)
    running = cluster.begin("--timeout-seconds", TIMEOUT, faults=[SLOW])
    wait_for_step(cluster.run_folder(1), 4)
    begun = time.monotonic()
    subprocess.run([*machines.on(1), "ss", "-K", "dst", "10.77.0.2"], check=True, capture_output=True)
    ended = [each.finish(60) for each in running]
    seconds = time.monotonic() - begun
    assert [each.code for each in ended] == [3, 3], cluster.output()[-6000:]
    table.add("live connections reset (ss -K)", "exit 3 on both", seconds)
    assert seconds < TIMEOUT + REACTION_SECONDS + 3
    cluster.no_process_is_left()


@netns
@pytest.mark.faults
@pytest.mark.timeout(400)
@pytest.mark.parametrize(("rate", "steps", "timeout"), [("20mbit", 8, 3), ("5mbit", 6, 3), ("1mbit", 2, 20)])
def test_a_slow_link_is_no_lost_peer(rig, hosts, table, undisturbed, rate, steps, timeout):
    """A step sends more than the time-out's floor allows for; on 1 Mbit/s a word may need more than 3 s."""
    machines = hosts(2)
    cluster = rig(machines)
    shape(machines, 2, rate)
    running = cluster.begin("--timeout-seconds", timeout, "--max-steps", steps)
    cluster.finish(running, 0, 0, timeout=380)
    seconds = [row["step_seconds"] for row in rows(cluster.run_folder(1))]
    timeout = json.loads((cluster.run_folder(1) / "run.json").read_text())["process_group_timeout"]
    happened = f"steps of {max(seconds):.1f} s, time-out {timeout['seconds']:.0f} s, no false alarm"
    table.add(f"link of {rate}", happened, running[0].finish().seconds)
    cluster.hold(undisturbed(steps))


@netns
@pytest.mark.faults
@pytest.mark.skipif(not shutil.which("nft"), reason="needs nftables")
@pytest.mark.parametrize("percent", [1, 5])
def test_lost_packets_cost_time_alone(rig, hosts, table, undisturbed, percent):
    machines = hosts(2)
    cluster = rig(machines)
    rule = f"numgen random mod 100 < {percent} drop"
    for words in (
        "add table ip t",
        "add chain ip t c { type filter hook input priority 0 ; }",
        f"add rule ip t c {rule}",
    ):
        subprocess.run([*machines.on(2), "nft", *words.split()], check=True)
    ended = cluster.finish(cluster.begin("--timeout-seconds", TIMEOUT), 0, 0)
    table.add(f"{percent} % of packets lost", "slower, bit for bit", ended[0].seconds)
    cluster.hold(undisturbed())


@pytest.mark.faults
def test_a_slow_machine_and_a_save_above_the_time_out_are_no_lost_peers(rig, table, undisturbed):
    """Machine 2 runs a quarter of the time and needs 8 s for a save; a second run in its folder is refused."""
    cluster = rig()
    save = {"do": "sleep", "at": "writing", "step": 10, "rank": 1, "seconds": TIMEOUT + 2}
    running = cluster.begin("--timeout-seconds", TIMEOUT, faults=[{**SLOW, "seconds": 0.1}, save])
    wait_for_step(cluster.run_folder(1), 2)
    worker = cluster.workers()[1]
    done = threading.Event()

    def slow_down() -> None:
        while not done.is_set() and is_running(worker):
            worker.suspend()
            time.sleep(0.75)
            worker.resume()
            time.sleep(0.25)

    thread = threading.Thread(target=slow_down)
    thread.start()
    try:
        words = [sys.executable, "scripts/train.py", *FLAGS, "--output-dir", cluster.run_folder(2)]
        second = cluster.start(words).finish(60)
        assert second.code == 2, second.output
        assert "is in use by another run" in second.output
    finally:
        done.set()
        thread.join()
    cluster.finish(running, 0, 0)
    seconds = [row["step_seconds"] for row in rows(cluster.run_folder(1))]
    table.add("one machine at 25 % of its time", f"steps of up to {max(seconds):.1f} s, bit for bit", sum(seconds))
    table.add(f"save of {TIMEOUT + 2} s, longer than the time-out", "the others wait for it, bit for bit")
    table.add("a second run in the same folder", "exit 2, refused", second.seconds)
    cluster.hold(undisturbed())


@pytest.mark.faults
@pytest.mark.timeout(200)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_dies_before_it_has_met_the_others_holds_up_nobody(rig, tmp_path, table, undisturbed, rank):
    """Its launcher has met the other's, itself it has said nothing yet."""
    cluster = rig()
    fault = {"do": "kill", "at": "importing", "rank": rank, "once": str(tmp_path / "once")}
    running = cluster.begin("--timeout-seconds", TIMEOUT, "--max-restarts", 2, faults=[fault])
    mark = cluster.mark()
    cluster.finish(running, 0, 0, timeout=150)
    table.add(f"kill -9 of process {rank} before its first word", "comes back bit for bit", mark.ago())
    cluster.hold(undisturbed())


@pytest.mark.faults
@pytest.mark.timeout(300)
def test_a_run_that_always_fails_at_one_step_is_given_up(rig, table):
    """Both machines restart, and give up after the third time; the reason is told to both."""
    cluster = rig()
    faults = [{"do": "raise", "at": "computing", "step": 7, "rank": 1}]
    begun = time.monotonic()
    running = cluster.begin("--timeout-seconds", TIMEOUT, "--max-restarts", 10, faults=faults)
    ended = [each.finish(200) for each in running]
    seconds = time.monotonic() - begun
    assert [each.code for each in ended] == [3, 1], cluster.output()[-6000:]
    for each in ended:
        assert "the same failure at step 6 three times: not starting again; its checkpoints are kept" in each.output
        assert "RuntimeError: injected" in each.output
    cluster.hold(None)
    table.add("exception always at one step, --max-restarts 10", "given up after three, reason on both", seconds)


@netns
@pytest.mark.faults
def test_a_killed_accelerate_launcher_takes_its_worker_along(rig, hosts, table, undisturbed):
    """And a port and a folder are free at once for the next start."""
    cluster = rig(hosts(2))
    running = cluster.begin("--timeout-seconds", TIMEOUT, faults=[SLOW], launcher="accelerate")
    wait_for_step(cluster.run_folder(2), 7)
    both = cluster.workers().values()
    begun = time.monotonic()
    running[0].process.kill()
    gone(both, DEATH_SECONDS, "both workers end")
    seconds = time.monotonic() - begun
    assert running[1].finish(30).code == 1, "accelerate's own"
    assert re.search("lost (process 0 on|the main machine) machine1", running[1].log.read_text())
    cluster.no_process_is_left()
    cluster.finish(cluster.begin(launcher="accelerate"), 0, 0)
    cluster.hold(undisturbed())
    table.add("kill -9 of accelerate launch", "its worker dies, the other names it", seconds)


@pytest.mark.faults
def test_a_token_store_that_changes_under_a_run_is_named(start, run, tmp_path, table):
    words = [sys.executable, "scripts/prepare_data.py", *TINY, "--output-dir", tmp_path / "store"]
    prepared = run(words)
    assert prepared.code == 0, prepared.output
    flags = [*FLAGS, "--dataset-path", tmp_path / "store", "--max-steps", STEPS, "--output-dir", tmp_path / "run"]
    faults = json.dumps([SLOW])
    running = start([sys.executable, FAULTY, "p2p-llm-forge", *flags], prefix=["env", f"FAULTS={faults}"])
    wait_for_step(tmp_path / "run", 4)
    tokens = tmp_path / "store" / "tokens.bin"
    with open(tokens, "r+b") as file:
        file.truncate(tokens.stat().st_size // 2)
    begun = time.monotonic()
    ended = running.finish(30)
    table.add("token store truncated under a run", f"exit {ended.code}", time.monotonic() - begun)
    assert ended.code == 2, ended.output
    assert "tokens.bin" in ended.output
