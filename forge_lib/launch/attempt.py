"""One attempt, in a child of the supervisor: the rendezvous, then accelerate's launcher.

This module imports torch and the launcher before the supervisor forks, so that an attempt starts at once.
"""

import contextlib
import logging
import os
import signal
import subprocess
import sys
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
import torch.distributed.run  # creates the loggers of torchrun, which are silenced below
import yaml
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from forge_lib.config import TrainConfig
from forge_lib.distributed.lock import RunLock
from forge_lib.errors import EXIT_PEER_LOST, EXIT_USER_ERROR, UserError, first_line
from forge_lib.flags import to_flags
from forge_lib.launch.config import ForgeConfig
from forge_lib.launch.messages import Joined, ProcessFailed, Unavailable, print_message
from forge_lib.launch.port import check_port
from forge_lib.launch.rendezvous import Rendezvous
from forge_lib.launch.rendezvous_store import UnavailableError
from forge_lib.peers_config import ElasticConfig
from forge_lib.process import die_with_parent, shell_exit_code

SCRIPT = Path(__file__).parents[2] / "scripts" / "train.py"
ELASTIC_SCRIPT = SCRIPT.with_name("train_elastic.py")
PORT_SECONDS = 10  # how long the previous attempt may still hold the port


def run_attempt(rendezvous: Rendezvous, supervisor: int) -> None:
    """Runs one attempt in this process and exits with its code.

    Args:
        rendezvous: has the configuration, and the pipe to the supervisor.
        supervisor: its process id.
    """
    _detach(supervisor)
    config, pipe = rendezvous.config, rendezvous.pipe
    unavailable_code = EXIT_PEER_LOST if rendezvous.keep_trying else EXIT_USER_ERROR
    try:
        RunLock(Path(config.output_dir).expanduser()).check_free()
        config.processes_per_node = config.processes_per_node or max(1, torch.cuda.device_count())
        if config.node_rank == 0 and (config.num_nodes > 1 or config.processes_per_node > 1):
            check_port(config, PORT_SECONDS if rendezvous.keep_trying else 0)
        if config.num_nodes > 1:
            pipe.send(Joined(rendezvous.join()))
        unavailable_code = EXIT_PEER_LOST
        code = _launch(config, pipe)
    except UnavailableError as error:
        code = unavailable_code
        if rendezvous.keep_trying:
            pipe.send(Unavailable(str(error)))  # the supervisor decides whether to try again
        else:
            print_message(f"error: {error}")
    except UserError as error:
        code = EXIT_USER_ERROR
        print_message(f"error: {error}")
    sys.exit(code)


def _detach(supervisor: int) -> None:
    """Moves this process to its own session, away from the terminal's signals; it is killed if the supervisor dies."""
    os.setsid()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    die_with_parent(signal.SIGKILL)
    if os.getppid() != supervisor:
        sys.exit(1)


def _launch(config: ForgeConfig, pipe: Connection) -> int:
    """Runs accelerate's launcher in this process; returns the exit code."""
    # torchrun prints a page about a failed process, which has already printed its own message.
    for name in logging.root.manager.loggerDict:
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    logging.getLogger("accelerate.commands.launch").setLevel(logging.ERROR)
    os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(int(config.grace_seconds) + 10)
    signal.signal(signal.SIGTERM, _stop_workers)
    script, flags = SCRIPT, to_flags(config, TrainConfig)
    if config.elastic:
        script, flags = ELASTIC_SCRIPT, to_flags(config, ElasticConfig)
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(_topology(config), file)
        file.flush()
        args = launch_command_parser().parse_args(
            ["--config_file", file.name, "--rdzv_conf", "timeout=60", str(script), *flags]
        )
        args.signals_to_handle = "SIGQUIT"  # of torchrun; SIGTERM is handled above
        try:
            launch_command(args)
        except ChildFailedError as error:
            failure = _first_failure(error)
        except subprocess.CalledProcessError as error:
            failure = ProcessFailed(0, error.returncode)
        except dist.DistError as error:  # before it has started any process
            raise UnavailableError(f"the launchers did not find each other: {first_line(error)}") from None
        else:
            return 0
    pipe.send(failure)
    return shell_exit_code(failure.exit_code)


def _topology(config: ForgeConfig) -> dict[str, Any]:
    """Returns the content of an accelerate YAML."""
    distributed = config.num_nodes > 1 or config.processes_per_node > 1
    return {
        "distributed_type": "MULTI_GPU" if distributed else "NO",
        "use_cpu": config.device == "cpu" or not torch.cuda.is_available(),
        "num_machines": config.num_nodes,
        "machine_rank": config.node_rank,
        "num_processes": config.processes_per_node * config.num_nodes,  # accelerate divides it by num_machines
        "main_process_ip": config.master_addr,
        "main_process_port": config.master_port,
        "mixed_precision": "no",
    }


def _stop_workers(number: int, frame: Any) -> None:
    """Passes SIGTERM on to the workers, which save and end; then the launcher ends by itself."""
    workers = psutil.Process().children()
    for worker in workers:
        with contextlib.suppress(psutil.NoSuchProcess):
            worker.terminate()
    if not workers:
        sys.exit(128 + number)


def _first_failure(error: ChildFailedError) -> ProcessFailed:
    """Returns the process that failed first, rather than one that failed because another one did."""
    failures = error.failures
    consequences = (EXIT_PEER_LOST, -signal.SIGTERM)
    rank = min(failures, key=lambda n: (failures[n].exitcode in consequences, failures[n].timestamp))
    return ProcessFailed(rank, failures[rank].exitcode)
