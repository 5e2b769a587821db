"""Starts scripts/train.py with accelerate's launcher, with the topology on the command line or in a cluster.yaml.

With --ssh it starts itself on all machines of the cluster.yaml. `p2p-llm-forge status RUN` tells how a run is doing.
"""

import sys
from pathlib import Path

from forge_lib.cluster.cluster_file import find_machine, read_cluster
from forge_lib.errors import UserError, exit_code
from forge_lib.flags import parse_config
from forge_lib.launch import ssh
from forge_lib.launch.config import ForgeConfig, place
from forge_lib.launch.messages import PROGRAM, print_message
from forge_lib.process import ignore_output_errors


def main(words: list[str]) -> None:
    """Runs the command with these flags.

    Exits with 2 after a user mistake, else with the code of the first process that failed.
    """
    try:
        config = parse_config(ForgeConfig, words, __doc__, prog=PROGRAM)
        if config.cluster:
            cluster = read_cluster(Path(config.cluster).expanduser())
            if config.ssh:
                sys.exit(ssh.run(cluster, config))
            config = place(config, cluster, find_machine(cluster, config.machine))
    except UserError as error:
        print_message(f"error: {error}")
        sys.exit(exit_code(error))
    from forge_lib.launch.supervisor import Supervisor  # imports torch: slow

    config.master_addr = config.master_addr or "127.0.0.1"
    supervisor = Supervisor(config)
    with ignore_output_errors(), supervisor.handling_signals():
        sys.exit(supervisor.run())
