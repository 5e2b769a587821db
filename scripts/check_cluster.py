r"""Checks what the machines of a cluster can do together, before a long run: the same line on each of them.

    python scripts/check_cluster.py cluster.yaml
    python scripts/check_cluster.py cluster.yaml --model-name gpt2 --batch-size 64 --dataset-path corpus/

It says within seconds who has come, who is missing and why, and ends by itself. Then it compares the machines,
measures them and the links between them, and forecasts how fast they will train the model (forge_lib/forecast.py has
the formulas). It needs no launcher, and uses the port of cluster.yaml: end a run that is there first. Exit code 0: all
is well; 1: something is not.
"""

import dataclasses
import hashlib
import json
import math
import multiprocessing
import os
import platform
import shutil
import signal
import socket
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import MISSING, dataclass
from datetime import timedelta
from multiprocessing.pool import AsyncResult
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # torch reads it when it is imported: no stack for a lost link

import psutil
import torch
import torch.distributed as dist

from forge_lib.check import forecast, links
from forge_lib.check.arrival import Arrival, Outcome, Problem
from forge_lib.cluster import topology
from forge_lib.config import TrainConfig, flag, flag_name
from forge_lib.data import batches, corpus
from forge_lib.distributed.agreement import Agreement, agree
from forge_lib.distributed.device import choose_device
from forge_lib.distributed.facts import differing_versions, local_facts, versions
from forge_lib.distributed.network import interface_of, is_public, public_address_warning
from forge_lib.distributed.peers import Peers
from forge_lib.distributed.reporting import report_errors
from forge_lib.distributed.speed import all_reduce_seconds, copy_bandwidth
from forge_lib.errors import PeerLostError, Stopped, UserError
from forge_lib.flags import parse_config
from forge_lib.models import model as models
from forge_lib.process import World, die_with_parent

ALL_REDUCE_BYTES = (1 << 16, 1 << 20, 1 << 23)
FACTS = {"host", "address", "interface", "system", "versions", "processes", "device", "cores", "memory_bytes"}
FACTS |= {"free_bytes", "dataset", "flags", "is_public"}
SILENT_SECONDS, START_SECONDS = 15, 30  # a machine that has come, and says nothing for so long, is lost
LEAVE_SECONDS = 1.0
NETWORK_PART = 0.2  # of a step, from which on the network is worth a word
QUICK_SECONDS = 2.0  # an all-reduce that takes longer is done once, and no larger one follows
GROUP_SECONDS = 120
SUCH_MACHINES = (2, 4, 8, 16, 32, 64)
GAIN = 1.1  # from which on a flag is worth its words


@dataclass(kw_only=True)
class ClusterConfig:
    """Which machines, and how long they are waited for."""

    _argument_group_name = "cluster"

    cluster: str = flag(MISSING, "the cluster's file; the flag's name may be left out", "FILE")
    machine: str = flag("auto", "which machine this is: auto (by its addresses) or its name", "NAME")
    timeout: float = flag(60.0, "how long the machines are waited for", "SECONDS")
    output_dir: str = flag("runs", "where a run will write: is there room?", "FOLDER")
    dataset_path: str = flag("", "data of a run, to be compared between the machines", "PATH")
    json: bool = flag(False, "print JSON, for programs; lines for people go to stderr")


@dataclass(kw_only=True)
class RunConfig:
    """The run that is forecast; the flags are those of scripts/train.py."""

    _argument_group_name = "forecast"

    model_name: str = flag("", "model to forecast; without it, there is no forecast", "NAME")
    trust_remote_code: bool = flag(False, "run model code that comes with a Hub model")
    sequence_length: int = flag(512, "tokens per sequence", "TOKENS")
    batch_size: int = flag(32, "GLOBAL batch of a step, over all processes", "SEQUENCES")
    micro_batch_size: int = flag(8, "sequences of one forward pass on one device", "SEQUENCES")
    shares: str = flag("", "parts of the batch by process, as in 3:1; empty for equal parts", "A:B:…")
    mixed_precision: str = flag("auto", "auto (as in cluster.yaml), no, bf16, fp16", "TYPE")
    sync_every: int = flag(20, "steps between two averagings, for the forecast of that", "STEPS")


@dataclass(kw_only=True)
class CheckConfig(RunConfig, ClusterConfig):
    """Everything that this script reads."""

    def __post_init__(self):
        least = {"sequence_length": 2, "batch_size": 1, "micro_batch_size": 1, "sync_every": 1, "timeout": 1}
        wrong = [
            f"--{name.replace('_', '-')} is {getattr(self, name)}, but must be at least {at}"
            for name, at in least.items()
            if not getattr(self, name) >= at
        ]
        if self.mixed_precision not in topology.PRECISIONS:
            wrong.append(f"--mixed-precision {self.mixed_precision}: expected {', '.join(topology.PRECISIONS)}")
        if wrong:
            raise UserError("\n".join(wrong))


def main(config: CheckConfig) -> bool:
    """Prints what it finds, on each machine; returns whether all is well."""
    group = topology.read_cluster(Path(config.cluster).expanduser())
    own = topology.find_machine(group, config.machine)
    shares = batches.divide_batch(config.batch_size, config.shares, group.num_processes) if config.model_name else []
    addresses = {machine.name: group.address(machine) for machine in group.machines}
    fingerprint = hashlib.sha256(repr(dataclasses.astuple(group)).encode()).hexdigest()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end_by_signal)
    report: dict[str, Any] = {"cluster": group.name, "machine": own.name, "machines": {}, "clocks": {}}
    report |= {"problems": [], "warnings": []}
    try:
        with Arrival(own.name, addresses, group.port, fingerprint, compare_facts) as arrival:
            found = arrive(config, group, own, arrival)
        report["machines"] = {name: facts for name, facts in found.facts.items() if facts.keys() >= FACTS}
        report |= {"clocks": found.clocks, "problems": found.problems, "warnings": warnings_of(group, found.facts)}
        if found.complete:
            measure(config, group, own, shares, report)
    except (PeerLostError, Stopped) as error:
        report["problems"].append(Problem("", str(error), "fatal"))
    report["well"] = not report["problems"]
    report["problems"] = [dataclasses.asdict(problem) for problem in report["problems"]]
    print(json.dumps(report, indent=2) if config.json else describe(config, group, report), flush=True)
    return report["well"]


def end_by_signal(number: int, frame: Any) -> None:
    """Ends the check on all machines."""
    raise Stopped(f"the check was ended by {signal.Signals(number).name}")


def arrive(config: CheckConfig, group: topology.Cluster, own: topology.Machine, arrival: Arrival) -> Outcome:
    """Meets the other machines; a mistake that is found on this one ends the check on all of them."""
    stream = sys.stderr if config.json else sys.stdout
    try:
        arrival.tell("looking at itself and its data")
        arrival.tell("", own_facts(config, group, own, arrival.own_address()))
        return arrival.wait(config.timeout, say=lambda line: print(line, file=stream, flush=True))
    except (UserError, Stopped) as error:
        arrival.leave(" ".join(str(error).split()))
        raise


# What a machine says of itself


def own_facts(config: CheckConfig, group: topology.Cluster, own: topology.Machine, address: str) -> dict:
    """Returns the facts of this machine, with that address, of JSON types.

    Raises:
        UserError: --output-dir cannot be written to, or --dataset-path cannot be read.
    """
    on_gpu = group.device_of(own) != "cpu" and torch.cuda.is_available()
    memory = torch.cuda.get_device_properties(0).total_memory if on_gpu else psutil.virtual_memory().total
    folder = Path(config.output_dir).expanduser().absolute()
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"--output-dir {config.output_dir}: {folder} is no folder that can be written to")
    return {
        "host": socket.gethostname(),
        "address": address,
        "interface": interface_of(address),
        "system": f"{platform.system()} {platform.release()}",
        "versions": versions(),
        "processes": own.processes,
        "device": torch.cuda.get_device_name(0) if on_gpu else "cpu",
        "cores": psutil.cpu_count(logical=False) or psutil.cpu_count() or 1,
        "memory_bytes": memory,
        "free_bytes": shutil.disk_usage(folder).free,
        "dataset": corpus.content_fingerprint(config.dataset_path) if config.dataset_path else "",
        "flags": {field.name: getattr(config, field.name) for field in dataclasses.fields(RunConfig)},
        "is_public": own is group.main and is_public(address),
    }


def compare_facts(facts: dict[str, dict]) -> list[tuple[str, str]]:
    """Returns what a run would refuse, other minor versions of the libraries and other data, and what this check does:
    other flags; by machine.
    """
    found = []
    main = next(iter(facts), None)
    for name, theirs in facts.items():
        for flag_, value in theirs["flags"].items():
            if value != facts[main]["flags"].get(flag_):
                text = f"{name} has {flag_name(flag_)} {value!r}, {main} has {facts[main]['flags'].get(flag_)!r}"
                found.append((name, f"{text}: type the same line on each machine"))
        for library, is_harmless in differing_versions(facts[main]["versions"], theirs["versions"]).items():
            if not is_harmless:
                version, ours = theirs["versions"][library], facts[main]["versions"][library]
                found.append((name, f"{name} has {library} {version}, {main} has {ours}: install the same version"))
    with_data = {name: theirs["dataset"] for name, theirs in facts.items() if theirs.get("dataset")}
    first = next(iter(with_data), None)
    for name, fingerprint in with_data.items():
        if fingerprint != with_data[first]:
            text = f"the data at --dataset-path of {name} is not that of {first}: copy it, or remove it from {name}"
            found.append((name, f"{text} (it is then sent there)"))
    return found


def warnings_of(group: topology.Cluster, facts: dict[str, dict]) -> list[str]:
    """Returns what does no harm to a run, but should be known."""
    main = facts.get(group.main.name, {})
    return [public_address_warning(main["address"], group.port)] if main.get("is_public") else []


# What is measured


def measure(
    config: CheckConfig, group: topology.Cluster, own: topology.Machine, shares: list[int], report: dict
) -> None:
    """Measures machines, links and the process group; adds the figures and the forecast to the report. Call on all."""
    several = len(group.machines) > 1
    world = World(own.rank, len(group.machines), 0, 1, group.address(group.main) if several else "", group.port)
    limits = {"timeout_seconds": SILENT_SECONDS, "start_seconds": START_SECONDS}
    with Peers(world, hint="Run the check again on every machine", **limits) as peers:
        peers.host = own.name
        device = choose_device("cpu" if group.device_of(own) == "cpu" else "auto", world)
        precision = group.mixed_precision if config.mixed_precision == "auto" else config.mixed_precision
        run = TrainConfig(model_name="-", dataset_path="-", output_dir="-", mixed_precision=precision)
        peers.set_status("measuring its speed")
        facts = dataclasses.replace(local_facts(run, world, device), host=own.name)
        agreement = agree(peers.all_gather(facts), run)
        copies = peers.all_gather({"bandwidth": copy_bandwidth(device)}, "copies")
        for machine, process, copy in zip(group.machines, agreement.processes, copies, strict=True):
            report["machines"][machine.name] |= {"flops": process.flops, "copy_bandwidth": copy["bandwidth"]}
        report["warnings"] += [line for line in agreement.warnings if line not in report["warnings"]]
        report["mixed_precision"], report["backend"] = agreement.mixed_precision, agreement.backend
        report["links"] = measure_links([machine.name for machine in group.machines], agreement, world, peers)
        broken = [link for link in report["links"] if "error" in link]
        report["problems"] += [Problem(link["to"], describe_broken(link, group.port), "way") for link in broken]
        if not broken:
            first = sum(machine.processes for machine in group.machines[: own.rank])
            ranks = range(first, first + own.processes)  # of this machine's processes
            with Workers(ranks, group, device, agreement, peers) as workers:
                if group.num_processes > 1:
                    report["all_reduce_seconds"] = workers.run("measuring all-reduces", measure_all_reduce)[0]
                if config.model_name:
                    mine = workers.run("measuring the model", measure_model, config)
            if config.model_name:
                found = [each for facts in peers.all_gather({"found": mine}, "speeds") for each in facts["found"]]
                speeds = [forecast.Speed(**each["speed"]) for each in found]
                network = forecast.Network(0.0, math.inf)
                if group.num_processes > 1:
                    network = forecast.fit_network(group.num_processes, report["all_reduce_seconds"])
                report["forecast"] = make_forecast(
                    config, len(group.machines), shares, speeds, found[0]["sizes"], network
                )
        peers.barrier("end")
        if world.process_index:
            peers.set_first(f"leaves/{world.process_index}", "yes")
        else:  # the store ends with this process
            for rank in range(1, world.num_processes):
                peers.get_first(f"leaves/{rank}")
            time.sleep(LEAVE_SECONDS)


def measure_links(names: list[str], agreement: Agreement, world: World, peers: Peers) -> list[dict]:
    """Measures the links of all pairs, both ways, as many at a time as have no machine in common; call on all.

    Returns:
        For each `from` and `to`, and `round_trip_seconds` and `bytes_per_second`, or `error`.
    """
    if len(names) == 1:
        return []
    addresses = [process.address for process in agreement.processes]
    mine: dict[str, dict] = {}
    with links.listen(addresses[world.process_index]) as listener:
        ports = [facts["port"] for facts in peers.all_gather({"port": listener.getsockname()[1]}, "ports")]
        for number, pairs in enumerate(links.rounds(len(names))):
            for way, turn in enumerate((pairs, [(b, a) for a, b in pairs])):
                peers.set_status("measuring its links")
                peers.barrier(f"links/{number}/{way}")
                for sender, receiver in turn:
                    link = mine.setdefault(f"{sender}/{receiver}", {})
                    try:
                        if world.process_index == sender:
                            link["round_trip_seconds"] = links.send(addresses[receiver], ports[receiver])
                        elif world.process_index == receiver:
                            link["bytes_per_second"] = links.receive(listener)
                    except links.LinkError as error:
                        link["error"] = str(error)
        found = peers.all_gather(mine, "links")
    return [
        {"from": names[a], "to": names[b]} | found[b].get(f"{a}/{b}", {}) | found[a].get(f"{a}/{b}", {})
        for a in range(len(names))
        for b in range(len(names))
        if a != b
    ]


def describe_broken(link: dict, port: int) -> str:
    """Returns a sentence on a link that does not carry."""
    return (
        f"from {link['from']} to {link['to']}: {link['error']} at a port that the kernel chooses, though {port} is "
        "open: gloo and NCCL need all TCP ports between the machines"
    )


@dataclass(frozen=True)
class Place:
    """What one of the processes of a run has to know; all fields can be sent to it."""

    rank: int
    num_processes: int
    local_rank: int
    num_local_processes: int
    holds_store: bool
    address: str
    port: int
    backend: str
    device: str
    mixed_precision: str


class Workers:
    """The processes of this machine, as a run would have them; use it as a context manager, on all machines."""

    def __init__(self, ranks: range, group: topology.Cluster, device: str, agreement: Agreement, peers: Peers):
        main = (group.address(group.main), group.port, agreement.backend, device, agreement.mixed_precision)
        alone = len(group.machines) == 1  # else the main machine's check holds the store
        count = group.num_processes
        self.places = [Place(r, count, n, len(ranks), alone and r == 0, *main) for n, r in enumerate(ranks)]
        self.peers = peers

    def __enter__(self):
        self.peers.set_status("starting its processes")
        context = multiprocessing.get_context("spawn")
        self.ready = context.Barrier(len(self.places) + 1)
        self.pool = context.Pool(len(self.places), _begin, (self.ready,))
        return self

    def __exit__(self, *_):
        self.pool.terminate()

    def run(self, what: str, call: Callable[..., dict], *args: Any) -> list[dict]:
        """Makes a call in each process, with its place, at the same time on all machines; returns what they return."""
        self.peers.set_status(what)
        found = self.pool.map_async(_call_in_step, [(call, place, args) for place in self.places], chunksize=1)
        while self.ready.n_waiting < len(self.places) and not found.ready():
            self._look(found)
        if not found.ready():  # else one has failed
            self.peers.barrier(what)
            self.ready.wait()
        while not found.ready():
            self._look(found)
        try:
            return found.get()
        except RuntimeError as error:  # of gloo, NCCL or the store
            raise PeerLostError(f"{self.peers.host}: {what} has failed: {str(error).splitlines()[0]}") from None

    def _look(self, found: AsyncResult) -> None:
        found.wait(0.1)
        self.peers.check()


def _begin(ready: Any) -> None:
    """Keeps what cannot be sent to a process that has begun; a process ends with the check."""
    global _ready
    _ready = ready
    die_with_parent(signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C comes to all of a terminal; the check ends them


def _call_in_step(task: tuple[Callable[..., dict], Place, tuple]) -> dict:
    call, place, args = task
    try:
        if place.device == "cuda":
            torch.cuda.set_device(place.local_rank)
        elif "OMP_NUM_THREADS" not in os.environ:  # as accelerate's launcher sets it
            torch.set_num_threads(max(1, (psutil.cpu_count(logical=False) or 1) // place.num_local_processes))
        prepared = call(place, *args)
        _ready.wait()
    except BaseException:
        _ready.abort()
        raise
    return prepared()


def measure_all_reduce(place: Place) -> Callable[[], dict[int, float]]:
    """Joins the process group that a run would form; returns what measures the seconds of an all-reduce, by bytes."""
    seconds = timedelta(seconds=START_SECONDS)
    store = dist.TCPStore(place.address, place.port, None, place.holds_store, seconds, wait_for_workers=False)
    ranks = {"rank": place.rank, "world_size": place.num_processes}
    timeout = timedelta(seconds=GROUP_SECONDS)

    def measure() -> dict[int, float]:
        dist.init_process_group(place.backend, store=dist.PrefixStore("check", store), timeout=timeout, **ranks)
        found: dict[int, float] = {}
        for size in ALL_REDUCE_BYTES:
            tensor = torch.zeros(size // 4, device=place.device)
            seconds: list[float] = []
            while len(seconds) < 5 and sum(seconds) < 2 * QUICK_SECONDS:
                seconds.append(all_reduce_seconds(tensor))  # of the slowest process: so all stop at the same time
            found[size] = statistics.median(seconds[1:] or seconds)
            if found[size] > QUICK_SECONDS and len(found) > 1:
                break
        dist.destroy_process_group()
        return found

    return measure


def measure_model(place: Place, config: CheckConfig) -> Callable[[], dict]:
    """Loads the model; returns what measures it: the fields of forecast.Speed as `speed`, and `sizes`, the bytes of
    its parameters.
    """
    run = TrainConfig(
        model_name=config.model_name,
        trust_remote_code=config.trust_remote_code,
        from_scratch=True,  # as fast, and nothing is downloaded
        dataset_path="-",
        output_dir="-",
    )
    model = models.load_model(run, 0, config.sequence_length).to(place.device)
    optimizers = models.build_optimizers(model, run)
    sizes = [p.nbytes for p in model.parameters() if p.requires_grad]
    lengths = (config.sequence_length, config.micro_batch_size)

    def measure() -> dict:
        speed = forecast.measure_speed(
            model, optimizers, models.next_token_loss, *lengths, place.device, place.mixed_precision
        )
        return {"speed": dataclasses.asdict(speed), "sizes": sizes}

    return measure


# What follows from it


def make_forecast(
    config: CheckConfig,
    num_machines: int,
    shares: list[int],
    speeds: list[forecast.Speed],
    sizes: list[int],
    network: forecast.Network,
) -> dict:
    """Returns the forecast for the machines at hand, and for more or fewer such machines, and the flags to use."""
    bucket_bytes, num_tokens = forecast.buckets(sizes), config.batch_size * config.sequence_length

    def forecasts(speeds: list[forecast.Speed], shares: list[int]) -> dict[str, forecast.Step]:
        given = (speeds, shares, config.micro_batch_size, network)
        return {
            "ddp": forecast.forecast_ddp(*given, bucket_bytes),
            "ddp_fp16": forecast.forecast_ddp(*given, bucket_bytes, fp16=True),
            "every": forecast.forecast_every(*given, sum(sizes), config.sync_every),
        }

    def as_json(steps: dict[str, forecast.Step]) -> dict[str, dict]:
        return {
            name: dataclasses.asdict(step) | {"tokens_per_second": num_tokens / step.seconds}
            for name, step in steps.items()
        }

    here = forecasts(speeds, shares)
    such = {}
    processes = max(1, round(len(speeds) / num_machines))  # of such a machine
    for count in SUCH_MACHINES if num_machines > 1 else ():
        share = -(-config.batch_size // (count * processes))
        parts = [share] * count * processes
        such[count] = as_json(forecasts([forecast.mean_speed(speeds)] * len(parts), parts))
        if len(parts) > config.batch_size:
            such[count] = None
    flags = [f"--batch-size {config.batch_size}", f"--micro-batch-size {config.micro_batch_size}"]
    notes = []
    best = here["ddp"]
    fitting = forecast.fitting_shares(speeds, config.batch_size)
    if forecasts(speeds, fitting)["ddp"].seconds * GAIN < best.seconds:
        parts = [share // math.gcd(*fitting) for share in fitting]
        flags.append(f"--shares {':'.join(map(str, parts))}")
        shares, best = fitting, forecasts(speeds, fitting)["ddp"]
    elif config.shares:
        flags.append(f"--shares {config.shares}")
    smaller = forecasts(speeds, shares)["ddp_fp16"]
    if smaller.seconds * GAIN < best.seconds:
        flags.append("--gradient-compression fp16")
        best = smaller
    if best.sync > NETWORK_PART * best.seconds:
        notes.append(
            f"{best.sync / best.seconds:.0%} of a step is spent on the network: a larger --batch-size gives the "
            "machines more to do between two exchanges"
        )
    return {
        "here": as_json(here),
        "such_machines": such,
        "sync_every": config.sync_every,
        "flags": " ".join(flags),
        "with_flags": dataclasses.asdict(best) | {"tokens_per_second": num_tokens / best.seconds},
        "notes": notes,
    }


# How it is said to people


def describe(config: CheckConfig, group: topology.Cluster, report: dict) -> str:
    """Returns the report as tables."""
    lines = ["", *describe_machines(report)]
    if report.get("links") or report.get("all_reduce_seconds"):
        lines += ["", *describe_links(group, report)]
    if "forecast" in report:
        lines += ["", *describe_forecast(config, report)]
    elif report["well"]:
        lines += ["", "--model-name NAME and --batch-size COUNT forecast how fast a model will train."]
    lines += ["", *(f"warning: {line}" for line in report["warnings"])]
    lines += [f"problem: {problem['text']}" for problem in report["problems"]]
    lines += [f"{group.name}: all is well" if report["well"] else f"{group.name}: not all is well"]
    return "\n".join(lines)


def describe_machines(report: dict) -> list[str]:
    """Returns a table of the machines; what differs where it better did not is marked."""
    machines, clocks = report["machines"], report["clocks"]
    precise = {name: f"{clocks.get(name, 0.0):+.2f} s" for name in machines}
    rows = {
        "host": [facts["host"] for facts in machines.values()],
        "address": [f"{facts['address']} {facts['interface']}" for facts in machines.values()],
        "system": [facts["system"] for facts in machines.values()],
        **{name: [facts["versions"][name] for facts in machines.values()] for name in versions()},
        "device": [f"{facts['processes']} x {facts['device']}" for facts in machines.values()],
        "cores": [str(facts["cores"]) for facts in machines.values()],
        "memory": [gigabytes(facts["memory_bytes"]) for facts in machines.values()],
        "free disk": [gigabytes(facts["free_bytes"]) for facts in machines.values()],
        "clock": list(precise.values()),
        "data": [facts["dataset"][:12] or "none" for facts in machines.values()],
    }
    if all("flops" in facts for facts in machines.values()):
        for dtype in ("fp32", "bf16"):
            found = [facts["flops"].get(dtype) for facts in machines.values()]
            rows[f"{dtype} products"] = [f"{flops / 1e9:,.0f} GFLOP/s" if flops else "slow" for flops in found]
        rows["memory copies"] = [f"{gigabytes(facts['copy_bandwidth'])}/s" for facts in machines.values()]
    if set(rows["data"]) == {"none"}:
        del rows["data"]
    compared = {"system", *versions(), "device", "data"}
    marks = {name: "differs" if name in compared and len(set(values)) > 1 else "" for name, values in rows.items()}
    return table([["", *machines, ""], *([name, *values, marks[name]] for name, values in rows.items())])


def describe_links(group: topology.Cluster, report: dict) -> list[str]:
    """Returns tables of the links and of all-reduces."""
    rows = [["from", "to", "there and back", "bandwidth"]]
    for link in report["links"]:
        seconds, rate = link.get("round_trip_seconds"), link.get("bytes_per_second")
        delay = f"{1000 * seconds:.2f} ms" if seconds else ""
        speed = f"{8 * rate / 1e6:,.1f} Mbit/s" if rate else ""
        rows.append([link["from"], link["to"], delay, link.get("error") or speed])
    lines = table(rows)
    if "all_reduce_seconds" in report:
        found = ", ".join(f"{size >> 10:,} KiB {s:.4f} s" for size, s in report["all_reduce_seconds"].items())
        lines += ["", f"all-reduce over {group.num_processes} processes, {report['backend']}: {found}"]
    return lines


def describe_forecast(config: CheckConfig, report: dict) -> list[str]:
    """Returns tables of the forecast."""
    found = report["forecast"]
    names = {"ddp": "train.py", "ddp_fp16": "train.py, fp16 gradients", "every": f"every {config.sync_every} steps"}
    precision = "fp32" if report["mixed_precision"] == "no" else report["mixed_precision"]
    tokens = f"{config.batch_size} x {config.sequence_length} tokens a step"
    lines = [f"Forecast for {config.model_name}, {tokens}, {precision}:", ""]
    rows = [["synchronising", "tokens/s", "step", "computing", "waiting for the slowest", "network"]]
    for name, words in names.items():
        step = found["here"][name]
        parts = [f"{step[part]:.3f} s" for part in ("seconds", "compute", "waiting", "sync")]
        rows.append([words, f"{step['tokens_per_second']:,.0f}", *parts])
    lines += table(rows)
    if found["such_machines"]:
        rows = [["such machines", *(f"{words}, tokens/s" for words in names.values())]]
        for count, steps in found["such_machines"].items():
            speeds = [f"{steps[name]['tokens_per_second']:,.0f}" for name in names] if steps else ["batch too small"]
            rows.append([str(count), *speeds])
        lines += ["", *table(rows)]
    lines += ["", f"To use: {found['flags']}  ({found['with_flags']['tokens_per_second']:,.0f} tokens/s)"]
    lines += [f"Averaging every {config.sync_every} steps is a forecast alone: scripts/train.py does it every step."]
    return lines + found["notes"]


def table(rows: list[list[str]]) -> list[str]:
    """Returns rows with their columns aligned."""
    widths = [max(len(row[n]) for row in rows if n < len(row)) for n in range(max(map(len, rows)))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip() for row in rows]


def gigabytes(num_bytes: float) -> str:
    """Returns a number of bytes for people."""
    return f"{num_bytes / 1e9:,.1f} GB"


if __name__ == "__main__":
    with report_errors("check_cluster.py"):
        sys.exit(0 if main(parse_config(CheckConfig, sys.argv[1:], description=__doc__, positional="cluster")) else 1)
