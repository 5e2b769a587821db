"""The p2p-llm-forge command, and the mistakes that it finds before accelerate would wait in silence."""

import json
import signal
import socket
import sys
import time

import psutil
import pytest
from commands import BIN, QUIET, SHORT
from run_folders import losses, rows

from forge_lib.launch import launch
from forge_lib.launch import rendezvous as rollcall

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
def refused(capfd, monkeypatch, tmp_path):
    """Runs the command in this process, with less patience, to its refusal; returns its message."""
    monkeypatch.setattr(rollcall, "REACH_SECONDS", 4)

    def refused(*flags) -> str:
        with pytest.raises(SystemExit) as ended:
            launch.main([*FLAGS, "--output-dir", str(tmp_path / "run"), *map(str, flags)])
        output = capfd.readouterr().err
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


# The supervisor, over a script that imports no torch and does what train.py promises: it holds run.lock, ends with its
# launcher, and ends with 0 on SIGTERM. It writes its process id to `pids` in the run folder, a line an attempt.
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
def forge(capfd, monkeypatch, tmp_path):
    """Runs the command over a script in this process, without its pauses; returns (exit code, its lines)."""
    monkeypatch.setattr(launch, "SCRIPT", tmp_path / "script.py")
    monkeypatch.setattr(launch, "FIRST_PAUSE", 0.01)

    def forge(script: str, *flags) -> tuple[int, list[str]]:
        launch.SCRIPT.write_text(SCRIPT + script)
        with pytest.raises(SystemExit) as ended:
            launch.main([*FLAGS, "--output-dir", str(tmp_path / "run"), *map(str, flags)])
        lines = capfd.readouterr().err.splitlines()
        return ended.value.code, [line for line in lines if line.startswith("p2p-llm-forge")]

    return forge


def attempts(folder) -> list[psutil.Process | None]:
    """The worker of each attempt, None where it is no more."""
    if not (folder / "pids").exists():
        return []
    numbers = map(int, (folder / "pids").read_text().split())
    return [psutil.Process(n) if psutil.pid_exists(n) else None for n in numbers]


def step_of(folder) -> int:
    path = folder / "run.lock"
    return json.loads(path.read_text())["step"] if path.exists() else 0


def runs(process: psutil.Process) -> bool:
    """A container's first process may leave those that have ended as they are."""
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def wait_for(condition, seconds: float = 40):
    """Returns what `condition` returns, as soon as it is true."""
    until = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.1)
    return found


def test_a_failed_launcher_is_started_again_until_it_works(forge, tmp_path):
    """Each restart has its line; the pause grows, and starts over when the run has come further."""
    code, lines = forge(
        "at_step([120, 120, 130, 140][attempt - 1])\n"
        "os.kill(os.getpid(), 9) if attempt == 1 else sys.exit([0, 0, 1, 3, 0][attempt])\n",
        "--max-restarts",
        5,
    )
    assert (code, len(attempts(tmp_path / "run"))) == (0, 4)
    assert lines == [
        "p2p-llm-forge: process 0 was killed by SIGKILL at step 120; starting again in 0.01 s (restart 1 of 5)",
        "p2p-llm-forge: process 0 ended with exit code 1 at step 120; starting again in 0.02 s (restart 2 of 5)",
        "p2p-llm-forge: starting again in 0.01 s (restart 3 of 5)",
    ]


def test_a_mistake_is_not_tried_again(forge, tmp_path):
    assert forge("sys.exit(2)", "--max-restarts", 5) == (2, [])
    assert len(attempts(tmp_path / "run")) == 1


def test_the_same_failure_at_the_same_step_is_given_up(forge, tmp_path):
    code, lines = forge("at_step(120)\nsys.exit(4)", "--max-restarts", 5)
    assert (code, len(attempts(tmp_path / "run"))) == (4, 3)
    assert lines[-1] == (
        "p2p-llm-forge: the same failure at step 120 three times: not starting again; its checkpoints are kept"
    )


def test_restarts_are_counted(forge, tmp_path):
    """Failures at different steps are not the same; a lock of an attempt before tells no step."""
    code, lines = forge("if attempt < 3: at_step(attempt)\nsys.exit(7)", "--max-restarts", 2)
    assert (code, len(attempts(tmp_path / "run"))) == (7, 3)
    assert lines[-1].startswith("p2p-llm-forge: process 0 ended with exit code 7; not starting again: 2 of 2 restarts")
    assert forge("sys.exit(1)") == (1, ["p2p-llm-forge: process 0 ended with exit code 1"])


@pytest.fixture
def driver(start, tmp_path):
    """Starts the command over a script, in a process of its own; returns it and its run folder."""

    def driver(script: str, *flags, folder: str = "run"):
        (tmp_path / f"{folder}.py").write_text(SCRIPT + script)
        program = (
            "import sys, pathlib, forge_lib.launch as launch\n"
            "launch.FIRST_PAUSE, launch.SAY_SECONDS = 0.1, 1\n"
            f"launch.SCRIPT = pathlib.Path({str(tmp_path / folder)!r} + '.py')\n"
            "launch.main(sys.argv[1:])"
        )
        words = [sys.executable, "-c", program, *FLAGS, "--output-dir", tmp_path / folder, *flags]
        return start(words), tmp_path / folder

    return driver


@pytest.mark.parametrize("processes", [1, 2])
def test_a_stop_lets_the_workers_save(driver, free_port, processes):
    """They end by themselves, whichever launcher they have; so does the launcher, and nothing is started again."""
    flags = ["--processes-per-node", processes, "--master-port", free_port, "--max-restarts", 5]
    running, folder = driver(SLEEP, *flags)
    workers = wait_for(lambda: len(found := attempts(folder)) == processes and found)
    running.process.send_signal(signal.SIGTERM)
    ended = running.finish()
    assert ended.code == 0, ended.output
    assert ended.output.count("saves") == processes
    assert ended.output.count("p2p-llm-forge: stopping: the step is finished and saved on all machines") == 1
    assert not any(map(runs, workers))


def test_a_second_interrupt_ends_at_once(driver):
    running, folder = driver("signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + SLEEP, "--max-restarts", 5)
    worker = wait_for(lambda: attempts(folder))[0]
    for _ in range(2):
        assert runs(worker)
        running.process.send_signal(signal.SIGINT)
        time.sleep(1)
    ended = running.finish()
    assert ended.code == 130, ended.output
    assert "Ctrl-C again ends at once" in ended.output
    assert not runs(worker)


def test_a_killed_launcher_is_started_again_and_a_killed_supervisor_leaves_no_process(driver):
    running, folder = driver(SLEEP, "--max-restarts", 5)
    worker = wait_for(lambda: attempts(folder))[0]
    worker.parent().kill()
    second = wait_for(lambda: len(found := attempts(folder)) == 2 and found[1])
    assert not runs(worker)
    assert "the launcher was killed by SIGKILL; starting again in 0.1 s (restart 1 of 5)" in running.log.read_text()
    launcher = second.parent()
    running.process.kill()
    wait_for(lambda: not runs(second) and not runs(launcher), 10)


def test_two_machines_start_again_together(driver, free_port):
    """A worker of each is killed in turn: the other's tells of a lost peer; then both are told to stop."""
    script = (
        "at_step(attempt)\n"
        "while attempt < 3:\n"
        "    time.sleep(0.2)\n"
        "    if Path(sys.argv[0]).with_name(f'dead_{attempt}').exists(): sys.exit(3)\n"
    ) + SLEEP
    flags = ["--master-addr", "127.0.0.1", "--master-port", free_port, "--num-nodes", 2, "--max-restarts", 3]
    machines = [driver(script, *flags, "--node-rank", rank, folder=f"m{rank}") for rank in range(2)]
    for attempt in (1, 2):
        for _, folder in machines:
            wait_for(lambda folder=folder, attempt=attempt: step_of(folder) == attempt)
        attempts(machines[attempt - 1][1])[-1].kill()
        (machines[0][1].parent / f"dead_{attempt}").touch()
    for running, folder in machines:
        wait_for(lambda folder=folder: step_of(folder) == 3)
        running.process.send_signal(signal.SIGTERM)
    for rank, (running, _) in enumerate(machines):
        ended = running.finish()
        assert ended.code == 0, ended.output
        killed = f"process {rank} was killed by SIGKILL at step {rank + 1}; starting again in 0.1 s"
        assert killed in ended.output
        assert ended.output.count("starting again") == 2


def test_a_machine_that_is_away_is_waited_for_by_name(driver, free_port):
    """Killed with all it has, it comes back after a while; until then the other says for whom it waits."""
    flags = ["--master-addr", "127.0.0.1", "--master-port", free_port, "--num-nodes", 2, "--max-restarts", 3]
    script = "at_step(attempt)\nif rank == 1 and attempt == 1: time.sleep(2); sys.exit(3)\nif attempt == 1: " + SLEEP
    main, main_folder = driver(script, *flags, "--node-rank", 0, folder="m0")
    other, _ = driver(script, *flags, "--node-rank", 1, folder="m1")
    first = wait_for(lambda: attempts(main_folder))[0]
    main.process.kill()
    host = socket.gethostname()
    wait_for(
        lambda: f"{host} waits for the main machine {host} at 127.0.0.1:{free_port}: refused" in other.log.read_text()
    )
    assert not runs(first)
    again, _ = driver(script, *flags, "--node-rank", 0, folder="m0")
    assert [each.finish().code for each in (again, other)] == [0, 0]


def test_a_stop_ends_a_roll_call(driver, free_port):
    flags = ["--master-addr", "127.0.0.1", "--master-port", free_port, "--num-nodes", 2]
    running, _ = driver(SLEEP, *flags)
    wait_for(lambda: "waits for machine 1 of 2" in running.log.read_text())
    running.process.send_signal(signal.SIGHUP)
    ended = running.finish()
    assert (ended.code, "stopped before training began" in ended.output) == (0, True)
