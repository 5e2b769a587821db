"""The flags of p2p-llm-forge, and their values for a machine of a cluster.yaml."""

from dataclasses import dataclass, fields, replace

from forge_lib.cluster.addresses import bracketed
from forge_lib.cluster.cluster_file import Cluster, Machine
from forge_lib.config import LaunchConfig, TrainConfig, flag_name
from forge_lib.errors import UserError
from forge_lib.peers_config import PeersConfig


@dataclass(kw_only=True)
class ForgeConfig(LaunchConfig, PeersConfig, TrainConfig):
    """All flags of the command: those of train.py and of train_elastic.py, and the topology."""

    def find_mistakes(self) -> list[str]:
        """Returns a line for each pair of values that do not go together."""
        mistakes = super().find_mistakes()
        given = [each.name for each in fields(PeersConfig) if getattr(self, each.name) != each.default]
        if given and not self.elastic:
            mistakes.append(f"{', '.join(map(flag_name, given))}: only with --elastic")
        if self.elastic and not self.cluster:
            mistakes += self.find_peer_mistakes()
        if self.elastic and self.num_nodes > 1:
            mistakes.append("--num-nodes: with --elastic each machine is a peer of its own, and any number may come")
        if self.cluster:
            return mistakes
        if self.ssh or self.machine != "auto":
            mistakes.append("--ssh and --machine need --cluster, the file that names the machines")
        if 1 <= self.num_nodes <= self.node_rank:
            mistakes.append(
                f"--node-rank {self.node_rank} of --num-nodes {self.num_nodes}: machines are numbered from 0 to "
                f"{self.num_nodes - 1}"
            )
        if self.num_nodes > 1 and not self.master_addr and not self.elastic:
            mistakes.append(f"--num-nodes {self.num_nodes} needs --master-addr, the address of the main machine")
        return mistakes


def place(config: ForgeConfig, cluster: Cluster, machine: Machine) -> ForgeConfig:
    """Returns the configuration for one machine of a cluster, without --cluster, --machine and --ssh.

    Raises:
        UserError: a flag contradicts the cluster.
    """
    values = {"processes_per_node": machine.processes, "master_port": cluster.port}
    if config.elastic:
        first, *others = cluster.lighthouse_machines
        hosts = [bracketed(cluster.address(each)) for each in (first, *others)]
        values |= {
            "lighthouse": ",".join(f"http://{host}:{cluster.lighthouse_port}" for host in hosts),
            "serve_lighthouse": machine is first or (machine in others and config.serve_lighthouse),
            "peer_name": machine.name,
            "peer_port": cluster.peer_port,
            "peer_address": cluster.address(machine),
        }
    else:
        values |= {
            "num_nodes": len(cluster.machines),
            "node_rank": machine.rank,
            "master_addr": cluster.address(cluster.main),
        }
    defaults = {field.name: field.default for field in fields(config)}
    given = [flag_name(name) for name, value in values.items() if getattr(config, name) not in (defaults[name], value)]
    if given:
        raise UserError(f"{', '.join(given)}: not the value in --cluster {config.cluster}; give only one of the two")
    values["device"] = cluster.device_of(machine) if config.device == "auto" else config.device
    values["mixed_precision"] = cluster.mixed_precision if config.mixed_precision == "auto" else config.mixed_precision
    return replace(config, **values, cluster="", machine="auto", ssh=False)
