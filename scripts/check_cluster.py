r"""Checks a cluster before a long run. Run the same command on each machine.

    python scripts/check_cluster.py cluster.yaml
    python scripts/check_cluster.py cluster.yaml --model-name gpt2 --batch-size 64 --dataset-path corpus/

Within seconds it prints which machines are up, which are missing, and which links fail and why. Then it compares the
machines, measures them and the links between them, and forecasts how fast they will train the model. It needs no
launcher. It uses the port of cluster.yaml, so end other runs there first. The exit code is 0 only if there is no
problem.
"""

import dataclasses
import hashlib
import json
import math
import os
import signal
import sys
import time
from dataclasses import MISSING, dataclass
from pathlib import Path
from types import FrameType
from typing import Literal

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # no C++ stack for a lost link; torch reads it at import

from forge_lib.check.arrival import Arrival, Outcome, Problem
from forge_lib.check.exchange import Exchange
from forge_lib.check.forecast import Network, fit_network, fitting_shares
from forge_lib.check.links import describe_failure, measure_links
from forge_lib.check.machine_facts import MachineSpeed, machine_facts
from forge_lib.check.recommend import Forecast, Workload, make_forecast
from forge_lib.check.report import Report, describe
from forge_lib.check.training_speed import ModelSpeeds, join_speeds, measure_model
from forge_lib.check.workers import Workers, measure_all_reduce
from forge_lib.cluster.cluster_file import Cluster, Machine, find_machine, read_cluster
from forge_lib.cluster.ports import used_ports
from forge_lib.config import RangeChecked, TrainConfig, flag
from forge_lib.data.batches import divide_batch
from forge_lib.distributed.agreement import Agreement, agree
from forge_lib.distributed.device import choose_device, choose_micro_batch_size
from forge_lib.distributed.facts import local_facts
from forge_lib.distributed.network import public_address_warning
from forge_lib.distributed.peers import Peers
from forge_lib.distributed.reporting import report_errors
from forge_lib.distributed.speed import copy_bandwidth
from forge_lib.errors import PeerLostError, Stopped, UserError
from forge_lib.flags import parse_config
from forge_lib.process import World

SILENT_SECONDS, START_SECONDS = 15, 30  # a machine that sends no heartbeat for this time is lost
LEAVE_SECONDS = 1.0


@dataclass(kw_only=True)
class ClusterConfig:
    """Which machines, and how long to wait for them."""

    _argument_group_name = "cluster"

    cluster: str = flag(MISSING, "cluster.yaml; may be given without the flag's name", "FILE")
    machine: str = flag("auto", "which machine this is: auto (by its addresses) or its name", "NAME")
    timeout: float = flag(60.0, "how long to wait for the machines", "SECONDS", at_least=1)
    output_dir: str = flag("runs", "where a run will write: must be writable", "FOLDER")
    dataset_path: str = flag("", "data of a run, which is compared between the machines", "PATH")
    json: bool = flag(False, "print JSON for programs; lines for people go to stderr")


@dataclass(kw_only=True)
class RunConfig:
    """The run to forecast; the flags are those of scripts/train.py; --sync-every is that of train_elastic.py."""

    _argument_group_name = "forecast"

    model_name: str = flag("", "model to forecast; empty: no forecast", "NAME")
    trust_remote_code: bool = flag(False, "run the Python code that is part of a Hub model")
    sequence_length: int = flag(512, "tokens per sequence", "TOKENS", at_least=2)
    batch_size: int = flag(32, "GLOBAL batch of one step, over all processes", "SEQUENCES", at_least=1)
    micro_batch_size: int = flag(0, "sequences per forward pass; 0: chosen as in train.py", "SEQUENCES", at_least=0)
    shares: str = flag("", "the processes' shares of the batch, as in 3:1; empty: as in train.py", "A:B:…")
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = flag(
        "auto", "auto, no, bf16 or fp16; auto: as in cluster.yaml", "TYPE"
    )
    sync_every: int = flag(
        0, "steps of a round of train_elastic.py, more than 1; 0: from the time of an exchange", "STEPS", at_least=0
    )


@dataclass(kw_only=True)
class CheckConfig(RangeChecked, RunConfig, ClusterConfig):
    """Every flag of scripts/check_cluster.py."""

    def find_mistakes(self) -> list[str]:
        """Returns a line for each value that is not possible."""
        one = "--sync-every 1 is not forecast: it sends each gradient, like train.py; expected 0, or 2 and more"
        return super().find_mistakes() + ([one] if self.sync_every == 1 else [])


def main(config: CheckConfig) -> bool:
    """Checks the cluster and prints the report, the same on each machine; returns whether there is no problem."""
    cluster = read_cluster(Path(config.cluster).expanduser())
    own = find_machine(cluster, config.machine)
    run = make_run(config, cluster)
    report = Report(cluster.name, own.name, ports=used_ports(cluster))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    try:
        outcome = arrive(config, cluster, own)
        report.machines, report.clocks, report.problems = outcome.facts, outcome.clocks, outcome.problems
        main_facts = outcome.facts.get(cluster.main.name)
        if main_facts and main_facts.is_public:
            report.warnings.append(public_address_warning(main_facts.address, cluster.port))
        if outcome.complete:
            measure(config, run, cluster, own, report)
    except (PeerLostError, Stopped) as error:
        report.problems.append(Problem("", str(error), "fatal"))
    text = json.dumps(report.as_json(), indent=2) if config.json else f"\n{describe(report, cluster, run)}"
    print(text, flush=True)
    return report.well


def stop(number: int, frame: FrameType | None) -> None:
    """Ends the check on all machines after a signal."""
    raise Stopped(f"the check was ended by {signal.Signals(number).name}")


def make_run(config: CheckConfig, cluster: Cluster) -> TrainConfig:
    """Returns the run to forecast. Its model has random weights, which are as fast, so nothing is downloaded.

    Raises:
        UserError: --batch-size cannot be divided by --shares.
    """
    if config.model_name and is_fixed(config, cluster):
        divide_batch(config.batch_size, config.shares, cluster.num_processes)
    precision = cluster.mixed_precision if config.mixed_precision == "auto" else config.mixed_precision
    return TrainConfig(
        model_name=config.model_name,
        trust_remote_code=config.trust_remote_code,
        from_scratch=True,
        dataset_path="",
        output_dir="",
        sequence_length=config.sequence_length,
        batch_size=config.batch_size,
        micro_batch_size=config.micro_batch_size,
        shares=config.shares,
        mixed_precision=precision,
    )


def arrive(config: CheckConfig, cluster: Cluster, own: Machine) -> Outcome:
    """Waits for the other machines. A mistake on this machine ends the check on all of them."""
    addresses = {machine.name: cluster.address(machine) for machine in cluster.machines}
    fingerprint = hashlib.sha256(repr(dataclasses.astuple(cluster)).encode()).hexdigest()
    flags = {field.name: getattr(config, field.name) for field in dataclasses.fields(RunConfig)}
    stream = sys.stderr if config.json else sys.stdout
    with Exchange(own.name, addresses, cluster.port, fingerprint) as exchange:
        arrival = Arrival(exchange)
        try:
            exchange.update(status="reading its data")
            address = exchange.own_address()
            facts = machine_facts(cluster, own, address, config.output_dir, config.dataset_path, flags)
            exchange.update(status="", facts=facts)
            return arrival.wait(config.timeout, print_line=lambda line: print(line, file=stream, flush=True))
        except (UserError, Stopped) as error:
            arrival.leave(" ".join(str(error).split()))
            raise


def measure(config: CheckConfig, run: TrainConfig, cluster: Cluster, own: Machine, report: Report) -> None:
    """Measures machines, links, process group and model, and adds them to the report. Call on all machines."""
    names = [machine.name for machine in cluster.machines]
    address = cluster.address(cluster.main) if len(names) > 1 else ""
    world = World(own.rank, len(names), main_address=address, main_port=cluster.port)
    hint = "Run the check again on every machine"
    with Peers(world, timeout_seconds=SILENT_SECONDS, start_seconds=START_SECONDS, hint=hint) as peers:
        peers.host = own.name
        device = choose_device("cpu" if cluster.device_of(own) == "cpu" else "auto", world)
        agreement = measure_machines(run, names, device, peers, report)
        size = run.micro_batch_size or choose_micro_batch_size(
            agreement.processes[0].device, run.sequence_length, agreement.mixed_precision, len(names)
        )
        report.links = measure_links(names, [process.address for process in agreement.processes], peers)
        broken = [link for link in report.links if link.error]
        report.problems += [Problem(link.receiver, describe_failure(link, cluster.port), "way") for link in broken]
        if not broken:
            with Workers(cluster, own, device, agreement, peers) as workers:
                if cluster.num_processes > 1:
                    report.all_reduce_seconds = workers.run("measuring all-reduces", measure_all_reduce)[0]
                if config.model_name:
                    model_speeds = join_speeds(workers.run("measuring the model", measure_model, run, size))
            if config.model_name:
                model_speeds = join_speeds(peers.all_gather(model_speeds, "speeds of the model"))
                report.forecast = forecast(config, run, size, cluster, report, model_speeds)
        end_together(peers)


def measure_machines(run: TrainConfig, names: list[str], device: str, peers: Peers, report: Report) -> Agreement:
    """Measures one process of each machine; returns what a run would agree on. Call on all machines."""
    peers.set_status("measuring its speed")
    facts = dataclasses.replace(local_facts(run, peers.world, device), host=peers.host)
    agreement = agree(peers.all_gather(facts, "facts"), run)
    speeds = peers.all_gather(MachineSpeed(facts.flops, copy_bandwidth(device)), "speeds of the machines")
    report.speeds = dict(zip(names, speeds, strict=True))
    report.warnings += [line for line in agreement.warnings if line not in report.warnings]
    report.mixed_precision, report.backend = agreement.mixed_precision, agreement.backend
    return agreement


def forecast(
    config: CheckConfig, run: TrainConfig, size: int, cluster: Cluster, report: Report, model_speeds: ModelSpeeds
) -> Forecast:
    """Forecasts the run from what was measured, with micro-batches of a size."""
    network = Network(latency=0.0, bandwidth=math.inf)
    if report.all_reduce_seconds:
        network = fit_network(cluster.num_processes, report.all_reduce_seconds)
    workload = Workload(run, size, network, model_speeds.parameter_bytes, config.sync_every)
    speeds = model_speeds.speeds
    shares = divide_batch(run.batch_size, run.shares, cluster.num_processes) if is_fixed(run, cluster) else None
    return make_forecast(workload, len(cluster.machines), speeds, shares or fitting_shares(speeds, run.batch_size))


def is_fixed(run: CheckConfig | TrainConfig, cluster: Cluster) -> bool:
    """Returns whether the shares are fixed; else train.py makes them follow the speeds, as with `--balance auto`."""
    return bool(run.shares) or len(cluster.machines) == 1 or run.batch_size < cluster.num_processes


def end_together(peers: Peers) -> None:
    """Waits until all machines have finished. The store ends with the main machine, so that leaves last."""
    world = peers.world
    peers.barrier("end")
    if world.process_index:
        peers.set_first(f"leaves/{world.process_index}", "yes")
    else:
        for rank in range(1, world.num_processes):
            peers.get_first(f"leaves/{rank}")
        time.sleep(LEAVE_SECONDS)


if __name__ == "__main__":
    with report_errors("check_cluster.py"):
        is_well = main(parse_config(CheckConfig, sys.argv[1:], description=__doc__, positional="cluster"))
        sys.exit(0 if is_well else 1)
