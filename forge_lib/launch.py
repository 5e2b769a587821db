"""The p2p-llm-forge command: scripts/train.py by accelerate's own launcher, with the topology on the command line.

Before it starts the launcher, the machines call the roll over the main machine's port: who is missing, whose number is
taken, which port is in use and which machine cannot be reached are said at once. accelerate itself waits for ten
minutes in silence.
"""

import errno
import json
import logging
import queue
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
import yaml
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from forge_lib.config import LaunchConfig, TrainConfig, UserError, parse_config, to_flags

SCRIPT = Path(__file__).parents[1] / "scripts" / "train.py"
REACH_SECONDS = 20  # how long a machine tries to reach the main machine
POLL_SECONDS = 0.25
FAREWELL_SECONDS = 3


@dataclass(kw_only=True)
class ForgeConfig(LaunchConfig, TrainConfig):
    """All flags of the command: train.py's, and the topology."""


def main(argv: list[str] | None = None) -> None:
    """Runs the command; exits with 2 on a person's mistake, else with the code of the first process that failed."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        config = parse_config(ForgeConfig, argv, __doc__, prog="p2p-llm-forge")
        _check(config)
        if config.num_nodes > 1:
            try:
                call_roll(config)
            except (dist.DistError, OSError) as error:
                where = f"the main machine {config.master_addr}:{config.master_port}"
                raise UserError(f"lost {where}: {str(error).splitlines()[0]}; see its message there") from None
    except UserError as error:
        print(f"p2p-llm-forge: error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    sys.exit(_launch(config))


def _check(config: LaunchConfig) -> None:
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
    config.processes_per_node = config.processes_per_node or max(1, torch.cuda.device_count())
    config.master_addr = config.master_addr or "127.0.0.1"
    if config.node_rank == 0 and (config.num_nodes > 1 or config.processes_per_node > 1):
        _check_port(config)


def _check_port(config: LaunchConfig) -> None:
    """The main machine must own the main address, and the port must be free there."""
    try:
        family, _, _, _, address = socket.getaddrinfo(config.master_addr, config.master_port, type=socket.SOCK_STREAM)[
            0
        ]
    except socket.gaierror:
        raise UserError(f"--master-addr {config.master_addr}: the name does not resolve") from None
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        mistake = f"--master-port {config.master_port}: {error.strerror} on {socket.gethostname()}"
        if error.errno == errno.EADDRINUSE:
            mistake = (
                f"--master-port {config.master_port} is in use on {socket.gethostname()}, by another run or another "
                "program; give another port, the same on every machine"
            )
        if error.errno == errno.EADDRNOTAVAIL:
            own = sorted(a.address for nic in psutil.net_if_addrs().values() for a in nic if a.family == family)
            mistake = (
                f"this machine ({socket.gethostname()}: {', '.join(own)}) was started as --node-rank 0, but "
                f"--master-addr {config.master_addr} is not its address; number 0 is the main machine's, each other "
                "machine needs a number of its own"
            )
        if error.errno in (errno.EADDRINUSE, errno.EADDRNOTAVAIL) and config.num_nodes > 1:
            mistake = _tell_main_machine(config, mistake)
        raise UserError(mistake) from None


def _tell_main_machine(config: LaunchConfig, mistake: str) -> str:
    """Returns the mistake; a main machine that calls the roll already is told of it, as one of two with its number."""
    try:
        store = _open_store(config, timeout_seconds=3)
        store.wait(["node/0"], timedelta(seconds=3))
    except (UserError, dist.DistError):
        return mistake  # whatever is at that address, it calls no roll
    mistake = f"two machines were started as --node-rank 0: {mistake}"
    _tell(store, mistake)
    return mistake


def call_roll(config: LaunchConfig) -> None:
    """Waits until every machine is there, and leaves the main machine's port to accelerate's launcher.

    Raises:
        UserError: the main machine cannot be reached, a number is taken twice, a machine is missing after
            `join_timeout`, or another machine has failed.
    """
    link = _reach(config) if config.node_rank else None
    store = _open_store(config, timeout_seconds=REACH_SECONDS / 2, is_master=config.node_rank == 0)
    me = {"id": uuid.uuid4().hex, "host": socket.gethostname(), "num_nodes": config.num_nodes}
    mine = json.dumps(me)
    holder = json.loads(store.compare_set(f"node/{config.node_rank}", "", mine))
    main_machine = json.loads(store.get("node/0")) if config.node_rank else me
    mistake = ""
    if holder["id"] != me["id"]:
        mistake = f"two machines were started as --node-rank {config.node_rank}: {holder['host']} and {me['host']}"
    elif main_machine["num_nodes"] != config.num_nodes:
        mistake = (
            f"{me['host']} was started with --num-nodes {config.num_nodes}, the main machine "
            f"{main_machine['host']} with {main_machine['num_nodes']}"
        )
    if mistake:
        _tell(store, mistake)
        raise UserError(mistake)
    start = said = time.monotonic()
    while missing := [n for n in range(config.num_nodes) if not store.check([f"node/{n}"])]:
        _hear(store, config)
        now = time.monotonic()
        names = f"machine{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))} of {config.num_nodes}"
        if now - start > config.join_timeout:
            raise UserError(f"{names} did not come within --join-timeout {config.join_timeout:g} s; start them too")
        if now - said >= 5:
            said = now
            print(
                f"{me['host']} waits for {names} (--node-rank) at {config.master_addr}:{config.master_port}",
                flush=True,
            )
        time.sleep(POLL_SECONDS)
    _hear(store, config)
    store.set(f"ready/{config.node_rank}", "")
    if link:
        link.settimeout(REACH_SECONDS)
        link.recv(1)  # ends when the main machine has closed its store
        link.close()
    else:
        store.wait([f"ready/{n}" for n in range(config.num_nodes)], timedelta(seconds=REACH_SECONDS))


def _reach(config: LaunchConfig) -> socket.socket:
    """Returns a connection to the main machine, telling apart the ways in which that can fail."""
    until = time.monotonic() + REACH_SECONDS
    where = f"the main machine {config.master_addr}:{config.master_port}"
    while True:
        try:
            return socket.create_connection((config.master_addr, config.master_port), timeout=5)
        except socket.gaierror:
            raise UserError(f"--master-addr {config.master_addr}: the name does not resolve on this machine") from None
        except ConnectionRefusedError:
            reason = "it is there, but nothing listens on that port: start the main machine (--node-rank 0) first"
        except TimeoutError:
            reason = "no answer: it is off, or a firewall drops what is sent to that port"
        except OSError as error:
            reason = f"{error.strerror}: check --master-addr and the network"
        if time.monotonic() > until:
            raise UserError(f"cannot reach {where} for {REACH_SECONDS} s: {reason}")
        time.sleep(1)


def _open_store(config: LaunchConfig, timeout_seconds: float, is_master: bool = False) -> dist.Store:
    """Opens the store on the main machine's port; UserError where that cannot be.

    It runs in a thread that can be left behind, since torch waits for ever for a program that takes the connection and
    never answers.
    """
    outcome: queue.SimpleQueue[dist.Store | dist.DistError] = queue.SimpleQueue()

    def connect() -> None:
        try:
            outcome.put(
                dist.TCPStore(
                    config.master_addr,
                    config.master_port,
                    is_master=is_master,
                    timeout=timedelta(seconds=timeout_seconds),
                    wait_for_workers=False,
                )
            )
        except dist.DistError as error:
            outcome.put(error)

    threading.Thread(target=connect, daemon=True).start()
    try:
        store = outcome.get(timeout=timeout_seconds)
    except queue.Empty:
        store = TimeoutError("it takes the connection and says nothing")
    if isinstance(store, Exception):
        reason = str(store).splitlines()[0]
        where = f"{config.master_addr}:{config.master_port}"
        if is_master:
            raise UserError(f"cannot listen on {where}: {reason}; give another --master-port")
        raise UserError(f"{where} answers, but not as a main machine does: is it another program's port? ({reason})")
    return dist.PrefixStore("forge-roll", store)


def _tell(store: dist.Store, mistake: str) -> None:
    """Leaves a mistake for all machines, and gives them a moment to read it."""
    store.set("error", mistake)
    time.sleep(FAREWELL_SECONDS)


def _hear(store: dist.Store, config: LaunchConfig) -> None:
    """Raises the mistake that another machine has left."""
    try:
        if not store.check(["error"]):
            return
        mistake = store.get("error").decode()
    except dist.DistError:
        raise UserError(
            f"the main machine {config.master_addr}:{config.master_port} has stopped; see its message there"
        ) from None
    if config.node_rank == 0:
        time.sleep(FAREWELL_SECONDS)  # the store ends with this process: let the others read it first
    raise UserError(mistake)


def _launch(config: ForgeConfig) -> int:
    """Runs accelerate's launcher in this process; returns the exit code."""
    distributed = config.num_nodes > 1 or config.processes_per_node > 1
    topology = {
        "distributed_type": "MULTI_GPU" if distributed else "NO",
        "use_cpu": not torch.cuda.is_available(),
        "num_machines": config.num_nodes,
        "machine_rank": config.node_rank,
        "num_processes": config.processes_per_node * config.num_nodes,  # accelerate divides it by num_machines
        "main_process_ip": config.master_addr,
        "main_process_port": config.master_port,
        "mixed_precision": "no",
    }
    # Its own account of a failed process is a page long; the process has said what it had to say.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    logging.getLogger("accelerate.commands.launch").setLevel(logging.ERROR)
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(topology, file)
        file.flush()
        args = launch_command_parser().parse_args(
            ["--config_file", file.name, "--rdzv_conf", "timeout=60", str(SCRIPT), *to_flags(config, TrainConfig)]
        )
        try:
            launch_command(args)
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            return _failed(rank, failure.exitcode)
        except subprocess.CalledProcessError as error:
            return _failed(0, error.returncode)
    return 0


def _failed(rank: int, code: int) -> int:
    if code != 2:  # of 2 it has told the reason itself
        print(f"p2p-llm-forge: process {rank} ended with exit code {code}", file=sys.stderr, flush=True)
    return code if code > 0 else 128 - code


if __name__ == "__main__":
    main()
