"""The p2p-llm-forge command: scripts/train.py by accelerate's own launcher, with the topology on the command line.

Roll call and launcher run in a child, one an attempt. The supervisor above it opens no store and starts no thread: it
passes on the wish to stop, and with --max-restarts it begins the next attempt when one has failed. The launcher's own
restarts would read the addresses of the attempt before.
"""

import contextlib
import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from dataclasses import dataclass, fields
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
import torch.distributed.run  # all loggers of the launcher, which are silenced below
import yaml
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from forge_lib.cluster import topology
from forge_lib.config import LaunchConfig, TrainConfig, flag_name
from forge_lib.distributed.lock import RunLock
from forge_lib.errors import UserError
from forge_lib.flags import parse_config, to_flags
from forge_lib.launch import ssh as remote
from forge_lib.launch.rendezvous import AwayError, Roll, check_port
from forge_lib.process import StopSignals, die_with_parent, ignore_output_errors

SCRIPT = Path(__file__).parents[2] / "scripts" / "train.py"
FORK = multiprocessing.get_context("fork")  # a child begins with everything imported
POLL_SECONDS = 0.25
SAY_SECONDS = 5  # between two lines that say for whom a machine waits
PORT_SECONDS = 10  # a restart: how long the attempt before may hold the port still
FIRST_PAUSE = 1.0
LONGEST_PAUSE = 60.0
ROLL_PAUSE = 2.0  # between two roll calls of one restart
BARRIER_SECONDS = 10  # how long a launcher whose processes have ended well may wait for the other launchers
MARGIN_SECONDS = 15  # beyond --grace-seconds, before processes that should have stopped are killed
SAME_FAILURES = 3  # so often at the same step, and it is given up
MISTAKE, LOST, DIVERGED = 2, 3, 4  # exit codes of train.py whose reason it has told itself
TERMINATED = 128 + signal.SIGTERM


@dataclass(kw_only=True)
class ForgeConfig(LaunchConfig, TrainConfig):
    """All flags of the command: train.py's, and the topology."""


def main(argv: list[str] | None = None) -> None:
    """Runs the command; exits with 2 on a person's mistake, else with the code of the first process that failed."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        config = parse_config(ForgeConfig, argv, __doc__, prog="p2p-llm-forge")
        if config.cluster:
            cluster = topology.read_cluster(Path(config.cluster).expanduser())
            if config.ssh:
                sys.exit(remote.run(cluster, config, place))
            place(config, cluster, topology.find_machine(cluster, config.machine))
        _check(config)
    except UserError as error:
        sys.exit(_refuse(error))
    supervisor = Supervisor(config)
    with ignore_output_errors(), supervisor.handling_signals():
        sys.exit(supervisor.run())


def place(config: ForgeConfig, cluster: topology.Cluster, machine: topology.Machine) -> None:
    """Puts what the cluster says of a machine into `config`, in place; UserError where a flag says otherwise."""
    device, precision = cluster.device_of(machine), cluster.mixed_precision
    values = {
        "num_nodes": len(cluster.machines),
        "node_rank": machine.rank,
        "processes_per_node": machine.processes,
        "master_addr": cluster.address(cluster.main),
        "master_port": cluster.port,
    }
    defaults = {field.name: field.default for field in fields(config)}
    given = [flag_name(name) for name, value in values.items() if getattr(config, name) not in (defaults[name], value)]
    if given:
        raise UserError(f"{', '.join(given)} says otherwise than --cluster {config.cluster}; give one of the two")
    for name, value in values.items():
        setattr(config, name, value)
    config.cluster, config.machine = "", "auto"
    config.device = device if config.device == "auto" else config.device
    config.mixed_precision = precision if config.mixed_precision == "auto" else config.mixed_precision


def _check(config: LaunchConfig) -> None:
    if config.ssh or config.machine != "auto":
        raise UserError("--ssh and --machine need --cluster, the file that names the machines")
    if config.num_nodes < 1 or not 0 <= config.node_rank < config.num_nodes:
        raise UserError(
            f"--node-rank {config.node_rank} of --num-nodes {config.num_nodes}: machines are numbered from 0 to "
            f"{max(config.num_nodes - 1, 0)}"
        )
    if config.processes_per_node < 0:
        raise UserError(f"--processes-per-node {config.processes_per_node}: expected 1 or more, or 0 for one a GPU")
    if not 0 < config.master_port < 1 << 16:
        raise UserError(f"--master-port {config.master_port}: expected a number from 1 to 65535")
    if config.num_nodes > 1 and not config.master_addr:
        raise UserError(f"--num-nodes {config.num_nodes} needs --master-addr, the address of the main machine")
    if config.max_restarts < 0:
        raise UserError(f"--max-restarts {config.max_restarts}: expected 0 or more")
    config.master_addr = config.master_addr or "127.0.0.1"


def _say(*parts: str) -> None:
    if parts:
        print(f"p2p-llm-forge: {'; '.join(parts)}", file=sys.stderr, flush=True)


def _refuse(error: UserError) -> int:
    _say(f"error: {error}")
    return MISTAKE


class Supervisor(StopSignals):
    """Runs attempts, one after the other, until one ends well or another would be of no use."""

    def __init__(self, config: ForgeConfig):
        self.config = config
        self.machine_id = uuid.uuid4().hex
        self.hosts: dict[int, str] = {}  # by machine number, from the last roll call that was complete
        self.is_over = False  # the supervisor itself has ended the attempt, and said why
        self.said = 0.0

    def run(self) -> int:
        """Returns the exit code of the last attempt; 0 where a person stopped it and nothing else went wrong."""
        failures: list[tuple[int, int | None]] = []  # (exit code, step)
        farthest, pause = -1, FIRST_PAUSE
        while True:
            before = _read_lock(self.config)
            code = self._attempt(is_patient=bool(failures or self.config.max_restarts))
            if code == 0 or (self.stopping and code == TERMINATED):
                return 0
            if code == MISTAKE or self.is_over:
                return code
            lock = _read_lock(self.config)
            step = lock.get("step") if lock.get("pid") != before.get("pid") else None
            failures.append((code, step))
            if step:  # it has begun from where --resume says, and goes on from its own checkpoints
                self.config.resume = "auto"
            if step is not None and step > farthest:
                farthest, pause = step, FIRST_PAUSE
            account = [] if code in (LOST, DIVERGED) else [self._account(step)]
            reason = self._reason_to_end(failures)
            if reason is not None:
                _say(*account, *reason)
                return code
            _say(*account, f"starting again in {pause:g} s (restart {len(failures)} of {self.config.max_restarts})")
            self._pause(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
            if self.stopping:
                _say("stopped before it was started again")
                return 0

    def _account(self, step: int | None) -> str:
        """What happened to whom, and when."""
        who, code = self.heard.get("failed", ("the launcher", self.exitcode))
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return f"{who} {how}{'' if step is None else f' at step {step}'}"

    def _reason_to_end(self, failures: list[tuple[int, int | None]]) -> list[str] | None:
        """Returns what there is to say where no other attempt follows, None where one does."""
        step, most = failures[-1][1], self.config.max_restarts
        if self.stopping or not most:
            return []
        if failures[-SAME_FAILURES:] == [failures[-1]] * SAME_FAILURES:
            when = "before the first step" if step is None else f"at step {step}"
            return [f"the same failure {when} three times: not starting again", "its checkpoints are kept"]
        if len(failures) > most:
            return [f"not starting again: {most} of {most} restarts are used", "its checkpoints are kept"]
        return None

    def _attempt(self, is_patient: bool) -> int:
        """Runs children until one has come beyond the roll call; returns the exit code."""
        self.said = time.monotonic()
        until = self.said + self.config.join_timeout
        while True:
            code = self._run_child(is_patient, until)
            away = self.heard.get("away")
            if away is None:
                return code
            if self.stopping:
                _say("stopped before training began")
                return 0
            if time.monotonic() > until:
                self.is_over = True
                _say(f"error: {away}")
                return LOST
            self._say_now_and_then(f"{away}; trying again")
            self._pause(ROLL_PAUSE)

    def _run_child(self, is_patient: bool, until: float) -> int:
        """Runs a child to its end; returns its exit code. After a failure no process of it is left."""
        self.heard: dict[str, Any] = {}  # what the child has told
        self.family: set[psutil.Process] = set()  # all that it has started, and what those have
        self.told: set[psutil.Process] = set()  # the workers that were asked to stop
        self.stop_until = self.ended = 0.0
        ours, theirs = FORK.Pipe(duplex=False)
        roll = Roll(self.config, self.machine_id, self.hosts, is_patient, until, theirs)
        child = FORK.Process(target=_run_attempt, args=(roll, os.getpid()))
        child.start()
        theirs.close()
        code = 1
        try:
            code = self._watch(child, ours)
        finally:
            if code or child.is_alive():
                self._kill_family(child)
            ours.close()
        return code

    def _watch(self, child: BaseProcess, pipe: Connection) -> int:
        listed = 0.0
        while child.is_alive():
            if time.monotonic() - listed > 1:  # workers whose launcher is killed can be found no more
                listed = time.monotonic()
                self._list_family(child)
            if self.stopping and child.is_alive() and (code := self._stop(child)) is not None:
                self.is_over = True
                return code
            child.join(POLL_SECONDS)
            self._hear(pipe)
        self._hear(pipe)
        self.exitcode = child.exitcode or 0
        return self.exitcode if self.exitcode >= 0 else 128 - self.exitcode

    def _hear(self, pipe: Connection) -> None:
        with contextlib.suppress(EOFError, OSError):
            while pipe.poll():
                name, value = pipe.recv()
                self.heard[name] = value
                if name == "waits":
                    self._say_now_and_then(value)
                elif name == "hosts":
                    self.hosts = value

    def _say_now_and_then(self, line: str) -> None:
        if time.monotonic() - self.said >= SAY_SECONDS:
            self.said = time.monotonic()
            print(line, flush=True)

    def _pause(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while not self.stopping and time.monotonic() < until:
            time.sleep(min(POLL_SECONDS, seconds))

    def _stop(self, child: BaseProcess) -> int | None:
        """Asks the workers to stop, not the launcher, which would kill them; returns a code to end the attempt."""
        if self.quit_now:
            return 128 + signal.SIGINT
        workers = set(psutil.Process(child.pid).children())
        if not workers and not self.family:
            _say("stopped before training began")
            return 0
        for worker in workers - self.told:
            with contextlib.suppress(psutil.NoSuchProcess):
                worker.terminate()
        self.told |= workers
        self.family |= workers
        if not self.stop_until:
            self.stop_until = time.monotonic() + self.config.grace_seconds + MARGIN_SECONDS
            _say("stopping: the step is finished and saved on all machines; Ctrl-C again ends at once")
        if self.told and not any(map(_is_running, self.told)):
            self.ended = self.ended or time.monotonic()
            if time.monotonic() - self.ended > BARRIER_SECONDS:  # one that is gone already never comes
                return 0
        if time.monotonic() > self.stop_until:
            _say(f"not stopped within --grace-seconds {self.config.grace_seconds:g} and {MARGIN_SECONDS} s: killed")
            return 1
        return None

    def _list_family(self, child: BaseProcess) -> None:
        parents = [*self.family, *([psutil.Process(child.pid)] if child.is_alive() else [])]
        for process in parents:
            with contextlib.suppress(psutil.NoSuchProcess):
                self.family.update(process.children(recursive=True))

    def _kill_family(self, child: BaseProcess) -> None:
        """Kills the child and all that it has started, also what runs on without it in sessions of its own."""
        if child.is_alive():
            psutil.Process(child.pid).suspend()  # it starts no other meanwhile
        self._list_family(child)
        child.kill()
        child.join()
        for process in self.family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        until = time.monotonic() + 10
        while any(map(_is_running, self.family)) and time.monotonic() < until:
            time.sleep(0.05)


def _is_running(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _read_lock(config: TrainConfig) -> dict[str, Any]:
    """What train.py's local main process keeps in the run folder, {"pid": …, "step": …}; empty without it."""
    try:
        lock = json.loads((Path(config.output_dir).expanduser() / "run.lock").read_text())
    except (OSError, ValueError):
        return {}
    return lock if isinstance(lock, dict) else {}


# Here begins what runs in the child.


def _run_attempt(roll: Roll, supervisor: int) -> None:
    """One attempt: the roll call, then the launcher. Exits with the attempt's code."""
    _detach(supervisor)
    config = roll.config
    away_code = LOST if roll.is_patient else MISTAKE
    try:
        RunLock(Path(config.output_dir).expanduser()).check_free()
        config.processes_per_node = config.processes_per_node or max(1, torch.cuda.device_count())
        if config.node_rank == 0 and (config.num_nodes > 1 or config.processes_per_node > 1):
            check_port(config, patience_seconds=PORT_SECONDS if roll.is_patient else 0)
        if config.num_nodes > 1:
            roll.tell.send(("hosts", roll.call()))
        away_code = LOST
        code = _launch(config, roll.tell)
    except AwayError as error:
        if roll.is_patient:
            roll.tell.send(("away", str(error)))  # the supervisor decides whether to try again
            sys.exit(away_code)
        _refuse(error)
        code = away_code
    except UserError as error:
        code = _refuse(error)
    sys.exit(code)


def _detach(supervisor: int) -> None:
    """Leaves the terminal's signals to the supervisor, and dies with it."""
    os.setsid()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    die_with_parent(signal.SIGKILL)
    if os.getppid() != supervisor:
        sys.exit(1)


def _launch(config: ForgeConfig, tell: Connection) -> int:
    """Runs accelerate's launcher in this process; returns the exit code."""
    distributed = config.num_nodes > 1 or config.processes_per_node > 1
    topology = {
        "distributed_type": "MULTI_GPU" if distributed else "NO",
        "use_cpu": config.device == "cpu" or not torch.cuda.is_available(),
        "num_machines": config.num_nodes,
        "machine_rank": config.node_rank,
        "num_processes": config.processes_per_node * config.num_nodes,  # accelerate divides it by num_machines
        "main_process_ip": config.master_addr,
        "main_process_port": config.master_port,
        "mixed_precision": "no",
    }
    # Its own account of a failed process is a page long; the process has said what it had to say.
    for name in logging.root.manager.loggerDict:
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    logging.getLogger("accelerate.commands.launch").setLevel(logging.ERROR)
    os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(int(config.grace_seconds) + 10)
    signal.signal(signal.SIGTERM, _stop_workers)
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(topology, file)
        file.flush()
        args = launch_command_parser().parse_args(
            ["--config_file", file.name, "--rdzv_conf", "timeout=60", str(SCRIPT), *to_flags(config, TrainConfig)]
        )
        args.signals_to_handle = "SIGQUIT"  # of torchrun; SIGTERM is handled above
        try:
            launch_command(args)
        except ChildFailedError as error:
            return _failed(*_cause(error), tell)
        except subprocess.CalledProcessError as error:
            return _failed(0, error.returncode, tell)
        except dist.DistError as error:  # raised before there are workers
            raise AwayError(f"the machines' launchers did not meet: {str(error).splitlines()[0]}") from None
    return 0


def _stop_workers(number: int, frame: Any) -> None:
    """SIGTERM to the launcher is meant for its workers: they save and end, and then it ends by itself."""
    workers = psutil.Process().children()
    for worker in workers:
        with contextlib.suppress(psutil.NoSuchProcess):
            worker.terminate()
    if not workers:
        sys.exit(128 + number)


def _cause(error: ChildFailedError) -> tuple[int, int]:
    """Returns (rank, exit code) of the process that failed first, not of one that failed by its end."""
    failures = error.failures
    rank = min(failures, key=lambda n: (failures[n].exitcode in (LOST, -signal.SIGTERM), failures[n].timestamp))
    return rank, failures[rank].exitcode


def _failed(rank: int, code: int, tell: Connection) -> int:
    tell.send(("failed", (f"process {rank}", code)))
    return code if code > 0 else 128 - code


if __name__ == "__main__":
    main()
