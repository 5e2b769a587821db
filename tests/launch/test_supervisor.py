"""The supervisor of p2p-llm-forge: restarts, stop requests, and processes that are killed."""

import signal
import socket

import psutil
import pytest
from commands import until
from run_folders import wait_for_step

from forge_lib.launch import attempt, supervisor
from forge_lib.process import is_running

# Replaces train.py: it imports no torch, writes run.lock, dies with its launcher, and ends with 0 on SIGTERM. Each
# attempt appends its process id to the file `pids` in the run folder.
SCRIPT = """
import ctypes, json, os, signal, sys, time
from pathlib import Path

ctypes.CDLL(None).prctl(1, signal.SIGKILL)
rank = int(os.environ.get("RANK", 0))
folder = Path(next(word for word in sys.argv if word.startswith("--output-dir=")).split("=")[1])
folder.mkdir(exist_ok=True)

def at_step(step):
    lock = {"host": "", "pid": os.getpid(), "run_id": "", "step": step}
    (folder / "new.lock").write_text(json.dumps(lock) + "  ")
    os.replace(folder / "new.lock", folder / "run.lock")

def stop(*_):
    print(f"rank {rank} saves", flush=True)
    sys.exit(0)

signal.signal(signal.SIGTERM, stop)
with open(folder / "pids", "a") as file:
    file.write(f"{os.getpid()}\\n")
attempt = len((folder / "pids").read_text().splitlines())
"""
SLEEP = "time.sleep(60)"


@pytest.fixture
def supervise(forge, monkeypatch, tmp_path):
    """Starts the command with such a script instead of train.py, and short pauses; returns it and its run folder."""
    monkeypatch.setattr(supervisor, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(supervisor, "STATUS_SECONDS", 1)

    def supervise(script: str, *flags, folder: str = "run"):
        (tmp_path / f"{folder}.py").write_text(SCRIPT + script)
        monkeypatch.setattr(attempt, "SCRIPT", tmp_path / f"{folder}.py")
        return forge(*flags, folder=folder), tmp_path / folder

    return supervise


@pytest.fixture
def finish(supervise):
    """Runs the command to its end; returns its exit code and its own lines."""

    def finish(script: str, *flags) -> tuple[int, list[str]]:
        ended = supervise(script, *flags)[0].finish()
        return ended.code, [line for line in ended.output.splitlines() if line.startswith("p2p-llm-forge")]

    return finish


def workers_of(folder) -> list[psutil.Process | None]:
    """Returns the worker of each attempt; None if it no longer exists."""
    if not (folder / "pids").exists():
        return []
    numbers = map(int, (folder / "pids").read_text().split())
    return [psutil.Process(n) if psutil.pid_exists(n) else None for n in numbers]


def first_worker(folder) -> psutil.Process:
    """Waits for the worker of the first attempt."""
    return until(lambda: workers_of(folder), 40, "a worker")[0]


def wait_for_end(*processes: psutil.Process) -> None:
    """Waits until none of the processes runs."""
    until(lambda: not any(map(is_running, processes)), 10, "the end of the processes")


def test_a_failed_launcher_is_started_again_until_it_succeeds(finish, tmp_path):
    """Each restart prints a line. The pause grows, and is short again after an attempt that got further."""
    code, lines = finish(
        "at_step([120, 120, 130, 140][attempt - 1])\n"
        "os.kill(os.getpid(), 9) if attempt == 1 else sys.exit([0, 0, 1, 3, 0][attempt])\n",
        "--max-restarts",
        5,
    )
    assert (code, len(workers_of(tmp_path / "run"))) == (0, 4)
    assert lines == [
        "p2p-llm-forge: process 0 was killed by SIGKILL at step 120; starting again in 0.01 s (restart 1 of 5)",
        "p2p-llm-forge: process 0 ended with exit code 1 at step 120; starting again in 0.02 s (restart 2 of 5)",
        "p2p-llm-forge: starting again in 0.01 s (restart 3 of 5)",
    ]


def test_a_user_mistake_is_not_tried_again(finish, tmp_path):
    assert finish("sys.exit(2)", "--max-restarts", 5) == (2, [])
    assert len(workers_of(tmp_path / "run")) == 1


def test_three_equal_failures_at_one_step_end_the_run(finish, tmp_path):
    code, lines = finish("at_step(120)\nsys.exit(4)", "--max-restarts", 5)
    assert (code, len(workers_of(tmp_path / "run"))) == (4, 3)
    assert lines[-1] == (
        "p2p-llm-forge: the same failure at step 120 three times: not starting again; its checkpoints are kept"
    )


def test_restarts_are_counted(finish, tmp_path):
    """Failures at different steps are not equal; the run.lock of an earlier attempt does not count as a step."""
    code, lines = finish("if attempt < 3: at_step(attempt)\nsys.exit(7)", "--max-restarts", 2)
    assert (code, len(workers_of(tmp_path / "run"))) == (7, 3)
    assert lines[-1].startswith("p2p-llm-forge: process 0 ended with exit code 7; not starting again: 2 of 2 restarts")
    assert finish("sys.exit(1)") == (1, ["p2p-llm-forge: process 0 ended with exit code 1"])


@pytest.mark.parametrize("processes", [1, 2])
def test_a_stop_lets_the_workers_save(supervise, free_port, processes):
    """With either of accelerate's launchers: the workers end, then the launcher ends, and nothing is started again."""
    flags = ["--processes-per-node", processes, "--master-port", free_port, "--max-restarts", 5]
    command, folder = supervise(SLEEP, *flags)
    workers = until(lambda: len(found := workers_of(folder)) == processes and found, 40, "the workers")
    command.send_signal(signal.SIGTERM)
    ended = command.finish()
    assert ended.code == 0, ended.output
    assert ended.output.count("saves") == processes
    assert ended.output.count("p2p-llm-forge: stopping: all machines finish the step and save") == 1
    assert not any(map(is_running, workers))


def test_a_second_ctrl_c_ends_at_once(supervise):
    command, folder = supervise("signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + SLEEP, "--max-restarts", 5)
    worker = first_worker(folder)
    command.send_signal(signal.SIGINT)
    until(lambda: "Ctrl-C again ends at once" in command.output(), 10, "the reaction to Ctrl-C")
    assert is_running(worker)
    command.send_signal(signal.SIGINT)
    ended = command.finish()
    assert ended.code == 130, ended.output
    assert not is_running(worker)


def test_a_killed_launcher_is_started_again_and_a_killed_supervisor_leaves_no_process(supervise):
    command, folder = supervise(SLEEP, "--max-restarts", 5)
    worker = first_worker(folder)
    worker.parent().kill()
    second = until(lambda: len(found := workers_of(folder)) == 2 and found[1], 40, "a second worker")
    assert not is_running(worker)
    assert "the launcher was killed by SIGKILL; starting again in 0.01 s (restart 1 of 5)" in command.output()
    launcher = second.parent()
    command.send_signal(signal.SIGKILL)
    wait_for_end(second, launcher)


def two_machines(port: int) -> list:
    """Returns the flags that both machines have."""
    return ["--master-addr", "127.0.0.1", "--master-port", port, "--num-nodes", 2, "--max-restarts", 3]


def test_two_machines_start_again_together(supervise, free_port):
    """A worker of each is killed in turn, and the other one reports a lost peer. At the end both get SIGTERM."""
    script = (
        "at_step(attempt)\n"
        "while attempt < 3:\n"
        "    time.sleep(0.2)\n"
        "    if Path(sys.argv[0]).with_name(f'dead_{attempt}').exists(): sys.exit(3)\n"
    ) + SLEEP
    flags = two_machines(free_port)
    commands, folders = zip(
        *(supervise(script, *flags, "--node-rank", n, folder=f"m{n}") for n in (0, 1)), strict=True
    )
    for step in (1, 2):
        for folder in folders:
            wait_for_step(folder, step)
        workers_of(folders[step - 1])[-1].kill()
        (folders[0].parent / f"dead_{step}").touch()
    for command, folder in zip(commands, folders, strict=True):
        wait_for_step(folder, 3)
        command.send_signal(signal.SIGTERM)
    for rank, command in enumerate(commands):
        ended = command.finish()
        assert ended.code == 0, ended.output
        assert f"process {rank} was killed by SIGKILL at step {rank + 1}; starting again in 0.01 s" in ended.output
        assert ended.output.count("starting again") == 2


def test_a_missing_machine_is_waited_for_by_name(supervise, free_port):
    """The main machine is killed with all its processes and comes back later; the other one prints its name."""
    script = "at_step(attempt)\nif rank == 1 and attempt == 1: time.sleep(2); sys.exit(3)\nif attempt == 1: " + SLEEP
    main, main_folder = supervise(script, *two_machines(free_port), "--node-rank", 0, folder="m0")
    other, _ = supervise(script, *two_machines(free_port), "--node-rank", 1, folder="m1")
    worker = first_worker(main_folder)
    main.send_signal(signal.SIGKILL)
    host = socket.gethostname()
    line = f"{host} waits for the main machine {host} at 127.0.0.1:{free_port}: connection refused"
    until(lambda: line in other.output(), 40, line)
    assert not is_running(worker)
    again, _ = supervise(script, *two_machines(free_port), "--node-rank", 0, folder="m0")
    assert [each.finish().code for each in (again, other)] == [0, 0]


def test_a_stop_ends_the_rendezvous(supervise, free_port):
    command, _ = supervise(SLEEP, *two_machines(free_port))
    until(lambda: "waits for machine 1 of 2" in command.output(), 40, "the rendezvous")
    command.send_signal(signal.SIGHUP)
    ended = command.finish()
    assert (ended.code, "stopped before training began" in ended.output) == (0, True)
