"""The report of a check: as JSON for programs, and as tables for people."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from forge_lib.check.arrival import Problem
from forge_lib.check.links import Link
from forge_lib.check.machine_facts import MachineFacts, MachineSpeed
from forge_lib.check.recommend import Forecast
from forge_lib.cluster.cluster_file import Cluster
from forge_lib.cluster.ports import Port
from forge_lib.config import TrainConfig
from forge_lib.distributed.facts import LIBRARIES

COMPARED = {"system", "python", *LIBRARIES, "device", "data"}  # rows whose differences are marked


@dataclass
class Report:
    """What a check found. The names of the fields are keys of --json; a field that is None is left out.

    Attributes:
        cluster: its name.
        machine: name of this machine.
        machines: facts of the machines, by name; --json adds what `speeds` has.
        speeds: measured speed of the machines, by name.
        clocks: by how many seconds the clock of each machine is ahead of the main machine's.
        problems: reasons why a run would not work.
        warnings: sentences about what is harmless.
        mixed_precision: "no", "bf16" or "fp16", as a run would choose.
        backend: "nccl" or "gloo", as a run would choose.
        links: between all pairs of machines, in both directions.
        all_reduce_seconds: by bytes.
        forecast: with --model-name.
        ports: that runs use.
    """

    cluster: str
    machine: str
    machines: dict[str, MachineFacts] = field(default_factory=dict)
    speeds: dict[str, MachineSpeed] = field(default_factory=dict)
    clocks: dict[str, float] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    mixed_precision: str | None = None
    backend: str | None = None
    links: list[Link] | None = None
    all_reduce_seconds: dict[int, float] | None = None
    forecast: Forecast | None = None
    ports: list[Port] = field(default_factory=list)

    @property
    def well(self) -> bool:
        """Whether there is no problem."""
        return not self.problems

    def as_json(self) -> dict[str, Any]:
        """Returns the report as --json prints it."""
        content = asdict(self, dict_factory=lambda items: {key: value for key, value in items if value is not None})
        speeds = content.pop("speeds")
        content["machines"] = {name: facts | speeds.get(name, {}) for name, facts in content["machines"].items()}
        for link in content.get("links", []):
            link |= {"from": link.pop("sender"), "to": link.pop("receiver")}
        return content | {"well": self.well}


def describe(report: Report, cluster: Cluster, run: TrainConfig) -> str:
    """Returns a report as tables; `run` is the run that is forecast."""
    lines = describe_machines(report)
    if report.ports:
        lines += ["", *describe_ports(report.ports)]
    if report.links:
        lines += ["", *describe_links(report.links)]
    if report.all_reduce_seconds:
        sizes = [f"{size >> 10:,} KiB in {1000 * s:,.1f} ms" for size, s in report.all_reduce_seconds.items()]
        lines += ["", f"all-reduce over {cluster.num_processes} processes ({report.backend}): {', '.join(sizes)}"]
    if report.forecast:
        lines += ["", *describe_forecast(report.forecast, report, cluster, run)]
    elif report.well:
        lines += ["", "Add --model-name NAME and --batch-size COUNT to forecast how fast a model will train."]
    count = len(report.problems)
    lines += ["", *(f"warning: {line}" for line in report.warnings)]
    lines += [f"problem: {problem.text}" for problem in report.problems]
    lines += [f"{cluster.name}: {count or 'no'} problem{'' if count == 1 else 's'} found"]
    return "\n".join(lines)


def describe_machines(report: Report) -> list[str]:
    """Returns a table of the machines; differences that may matter are marked."""
    rows: dict[str, list[str]] = {}

    def add_row(name: str, describe: Callable[[str, MachineFacts], str]) -> None:
        cells = [describe(machine, facts) for machine, facts in report.machines.items()]
        if any(cells):
            rows[name] = cells

    add_row("host", lambda machine, facts: facts.host)
    add_row("address", lambda machine, facts: f"{facts.address} {facts.interface}".strip())
    add_row("system", lambda machine, facts: facts.system)
    for library in ("python", *LIBRARIES):
        add_row(library, lambda machine, facts, library=library: facts.versions[library])
    add_row("device", lambda machine, facts: f"{facts.processes} x {facts.device}")
    add_row("cores", lambda machine, facts: str(facts.cores))
    add_row("memory", lambda machine, facts: _gigabytes(facts.memory_bytes))
    add_row("free disk", lambda machine, facts: _gigabytes(facts.free_bytes))
    add_row("clock", lambda machine, facts: f"{round(report.clocks.get(machine, 0.0), 2) + 0.0:+.2f} s")  # never -0.00
    if any(facts.dataset for facts in report.machines.values()):
        add_row("data", lambda machine, facts: facts.dataset[:12] or "none")
    if report.speeds:
        add_row("fp32 products", lambda machine, facts: _gigaflops(report.speeds[machine], "fp32"))
        add_row("bf16 products", lambda machine, facts: _gigaflops(report.speeds[machine], "bf16"))
        add_row("memory copies", lambda machine, facts: f"{_gigabytes(report.speeds[machine].copy_bandwidth)}/s")
    marks = {name: "differs" if name in COMPARED and len(set(cells)) > 1 else "" for name, cells in rows.items()}
    return table([["", *report.machines, ""], *([name, *cells, marks[name]] for name, cells in rows.items())])


def describe_ports(ports: list[Port]) -> list[str]:
    """Returns a table of the ports that must be open between the machines."""
    rows = [["TCP port", "on", "for", "changed with"]]
    for port in ports:
        number = str(port.first) if port.first == port.last else f"{port.first} to {port.last}"
        rows.append([number, port.machine or "all machines", port.purpose, port.setting])
    return table(rows)


def describe_links(links: list[Link]) -> list[str]:
    """Returns a table of the links."""
    rows = [["from", "to", "round trip", "bandwidth"]]
    for link in links:
        delay = f"{1000 * link.round_trip_seconds:.2f} ms" if link.round_trip_seconds else ""
        rate = f"{8 * link.bytes_per_second / 1e6:,.1f} Mbit/s" if link.bytes_per_second else ""
        rows.append([link.sender, link.receiver, delay, link.error or rate])
    return table(rows)


def describe_forecast(forecast: Forecast, report: Report, cluster: Cluster, run: TrainConfig) -> list[str]:
    """Returns tables of the forecast for this cluster and for other numbers of machines, and the flags to use."""
    precision = "fp32" if report.mixed_precision == "no" else report.mixed_precision
    lines = [f"Forecast for {run.model_name}, {run.batch_size} x {run.sequence_length} tokens per step, {precision}:"]
    names = {"ddp": "train.py"}
    if cluster.num_processes > 1:
        every = "train_elastic.py" + (f" --sync-every {forecast.sync_every}" if forecast.sync_every else "")
        names |= {"ddp_fp16": "train.py --gradient-compression fp16", "every": every}
    rows = [["synchronization", "tokens/s", "step", "compute", "wait for the slowest", "network"]]
    for name, words in names.items():
        step = getattr(forecast.here, name)
        seconds = [f"{value:.3f} s" for value in (step.seconds, step.compute, step.waiting, step.sync)]
        rows.append([words, f"{step.tokens_per_second:,.0f}", *seconds])
    lines += ["", *table(rows)]
    if forecast.such_machines:
        rows = [["machines", "train.py", "fp16", "train_elastic.py"]]
        for count, steps in forecast.such_machines.items():
            speeds = [f"{getattr(steps, name).tokens_per_second:,.0f}" for name in names] if steps else ["-"] * 3
            rows.append([str(count), *speeds])
        lines += ["", "tokens/s of other numbers of machines like these (-: the batch is too small):", ""]
        lines += table(rows)
    best = f"{forecast.with_flags.tokens_per_second:,.0f} tokens/s"
    return [*lines, "", f"Recommended flags ({best}): {forecast.flags}", *forecast.notes]


def table(rows: list[list[str]]) -> list[str]:
    """Returns rows with their columns aligned."""
    widths = [max(len(row[n]) for row in rows if n < len(row)) for n in range(max(map(len, rows)))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip() for row in rows]


def _gigabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:,.1f} GB"


def _gigaflops(speed: MachineSpeed, dtype: str) -> str:
    flops = speed.flops.get(dtype)
    return f"{flops / 1e9:,.0f} GFLOP/s" if flops else "not faster"
