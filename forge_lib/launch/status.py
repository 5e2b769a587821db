"""Tells how a run is doing, from its files and its lock: `p2p-llm-forge status RUN`.

It imports nothing slow, and needs neither the run's process nor the network; with --cluster it also asks the other
machines over ssh.
"""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from forge_lib.cluster.cluster_file import Cluster, Machine, find_machine, read_cluster
from forge_lib.distributed.lock import LAUNCHER_LOCK_NAME, LOCK_NAME, find_holder
from forge_lib.errors import UserError, exit_code
from forge_lib.launch.messages import PROGRAM, print_message
from forge_lib.progress import format_seconds
from forge_lib.report.history import History, read_tail
from forge_lib.report.texts import describe_status, holders

SSH_SECONDS = 20.0
NUM_ROWS = 20  # the newest ones, whose pace gives the time left
DESCRIPTION = """Tells how a run is doing: whether it is active, on which machines, how far it is, its loss, its last
checkpoint and its last event. Reads only the run folder on this machine, also that of a run that has ended."""


@dataclass(frozen=True)
class Status:
    """What is known about a run on this machine.

    Attributes:
        folder: the run folder.
        state: whether it is active, in words.
        facts: further lines: name and text.
        checkpoints: names of the checkpoints on this machine, the oldest first.
    """

    folder: str
    state: str
    facts: list[tuple[str, str]] = field(default_factory=list)
    checkpoints: list[str] = field(default_factory=list)


def status_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command's flags."""
    parser = argparse.ArgumentParser(prog=f"{PROGRAM} status", description=DESCRIPTION)
    parser.add_argument("run", metavar="RUN", help="the run folder, --output-dir")
    parser.add_argument(
        "--cluster", metavar="FILE", default="", help="cluster.yaml: also ask its other machines over ssh"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def main(words: list[str]) -> None:
    """Runs the command. Exits with 2 after a user mistake."""
    flags = status_parser().parse_args(words)
    try:
        folder = Path(flags.run).expanduser()
        if flags.cluster and flags.json:
            raise UserError("--json and --cluster do not go together: use --json on each machine")
        if flags.cluster:
            print_machines(read_cluster(Path(flags.cluster).expanduser()), flags.run)
        elif flags.json:
            print(json.dumps(asdict(read_status(folder))))
        else:
            print(as_text(read_status(folder)))
    except UserError as error:
        print_message(f"error: {error}")
        sys.exit(exit_code(error))


def read_status(folder: Path) -> Status:
    """Reads the run folder of this machine.

    Raises:
        UserError: it is not a run folder.
    """
    checkpoints = sorted(path.name for path in (folder / "checkpoints").glob("step-*"))
    trainer, launcher = find_holder(folder / LOCK_NAME), find_holder(folder / LAUNCHER_LOCK_NAME)
    history = _read_history(folder, has_more=bool(checkpoints or trainer or launcher or (folder / LOCK_NAME).exists()))
    is_main = bool(history and history.description)
    last_step = history.last_step if history else 0
    step = trainer.step if trainer and not (trainer.waiting_for and not trainer.step) else last_step
    facts = []
    if trainer:
        state = f"waiting: {trainer.waiting_for}" if trainer.waiting_for else "training"
        facts.append(("since", f"{_time(trainer.since)}, process {trainer.pid} on {trainer.host}"))
    elif launcher:
        state = f"waiting: {launcher.waiting_for}" if launcher.waiting_for else "starting"
        facts.append(("since", f"{_time(launcher.since)}, process {launcher.pid} on {launcher.host}"))
    else:
        state = f"not active; {_ending(history)}" if is_main else "not active"
    if is_main:
        facts += _progress(history, step, trainer.since if trainer and not trainer.waiting_for else None)
    if checkpoints:
        facts.append(("last checkpoint", f"{checkpoints[-1]}{_holders(history, checkpoints[-1])}"))
    if history and history.events:
        event = history.events[-1]
        text = f"{event['event']} at step {event.get('step', '?')}"
        facts.append(("last event", f"{text}, {_time(event['time'])}" if "time" in event else text))
    return Status(str(folder), state, facts, checkpoints)


def _read_history(folder: Path, has_more: bool) -> History | None:
    try:
        return read_tail(folder)
    except UserError:
        if has_more:  # another machine is the main one, or the run has not begun yet
            return None
        raise


def _ending(history: History) -> str:
    """Returns how a run ended that nobody runs any more."""
    phrase = describe_status(history)
    if phrase.startswith("so far"):
        return phrase.replace("so far", "it ended without a message (killed?) after")
    return phrase


def _progress(history: History, step: int, since: float | None) -> list[tuple[str, str]]:
    """Returns the lines about machines, steps and losses; `since`: when it was started, None if it does not train."""
    facts = []
    hosts: dict[str, int] = {}
    for process in history.description.get("world", []):
        hosts[str(process.get("host"))] = hosts.get(str(process.get("host")), 0) + 1
    if hosts:
        facts.append(
            ("machines", ", ".join(f"{host} ({count})" if count > 1 else host for host, count in hosts.items()))
        )
    whole = history.num_steps
    facts.append(("step", f"{step:,} of {whole:,} ({step / whole:.0%})" if whole else f"{step:,}"))
    seconds = _seconds_per_step(history, since) if since is not None else 0.0
    if whole and seconds:
        facts.append(("time left", format_seconds((whole - step) * seconds)))
    if (loss := history.last("loss")) is not None:
        facts.append(("loss", f"{loss:.4f} at step {history.last('step'):,.0f}"))
    if history.evaluations:
        last = history.evaluations[-1]
        facts.append(("held-out loss", f"{last['eval_loss']:.4f} at step {last['step']:,}"))
    if (speed := history.last("tokens_per_second")) is not None:
        facts.append(("speed", f"{speed:,.0f} tokens/s"))
    return facts


def _seconds_per_step(history: History, since: float) -> float:
    """Returns the pace of the newest rows of this start, with evaluations and saves; 0: not known."""
    steps, times = history.columns["step"][-NUM_ROWS:], history.columns["time"][-NUM_ROWS:]
    steps, times = steps[times >= since], times[times >= since]
    if len(steps) > 1 and times[-1] > times[0] and steps[-1] > steps[0]:
        return float((times[-1] - times[0]) / (steps[-1] - steps[0]))
    return history.last("step_seconds") or 0.0


def _holders(history: History | None, name: str) -> str:
    for event in reversed(history.events_named("checkpoint")) if history else ():
        if Path(str(event.get("path"))).name == name and (hosts := holders(history, event)):
            return f", on {', '.join(hosts)}"
    return ""


def as_text(status: Status) -> str:
    """Returns the lines that are printed."""
    rows = [("run", status.folder), ("state", status.state), *status.facts]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {text}" for name, text in rows)


def print_machines(cluster: Cluster, run: str) -> None:
    """Prints the status on this machine, and a line about each other machine of the cluster, asked over ssh."""
    from forge_lib.launch.ssh import ssh_command

    try:
        own: Machine | None = find_machine(cluster, "auto")
    except UserError:
        own = None
    asked = {
        machine: subprocess.Popen(
            ssh_command(machine, ["-m", "forge_lib.launch.command", "status", run, "--json"]),
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for machine in cluster.machines
        if machine != own
    }  # fmt: skip
    end = time.monotonic() + SSH_SECONDS
    if own:
        try:
            print(as_text(read_status(Path(run).expanduser())))
        except UserError as error:  # the others may have it
            print(f"{own.name}\nstate  not known: {error}")
    for machine, process in asked.items():
        print(f"\n{machine.name}")
        try:
            output, error = process.communicate(timeout=max(0.1, end - time.monotonic()))
            answer = json.loads(output)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            print(f"state  no answer within {SSH_SECONDS:.0f} s")
        except ValueError:
            lines = error.strip().splitlines() or ["no answer"]
            print(f"state  not known: {lines[-1].removeprefix(f'{PROGRAM}: error: ')}")
        else:
            print(as_text(Status(**answer)))


def _time(seconds: float) -> str:
    """Returns a local time, and how long ago that is."""
    if not seconds:
        return "not known when"
    text = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
    return f"{text} ({format_seconds(max(0.0, time.time() - seconds))} ago)"
