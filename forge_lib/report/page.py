"""report.html: one page about one run or several, which needs no other file and no network."""

import dataclasses
import shlex
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import jinja2

from forge_lib.config import TrainConfig, flag_name
from forge_lib.disk import partial_path
from forge_lib.errors import UserError
from forge_lib.peers_config import ElasticConfig
from forge_lib.progress import format_seconds
from forge_lib.report.history import METRICS, History, read_history
from forge_lib.report.plots import draw_plots
from forge_lib.report.texts import describe_status, holders, run_names, short_number

TEMPLATE = "report.html.jinja"
MAX_ROWS = 200  # of a table; the newest ones
MAX_SAMPLES = 30
UNUSUAL = ("checkpoint", "sample")  # events that have a section of their own


def write_report(folders: Sequence[Path], path: Path) -> None:
    """Writes the page about some runs.

    Args:
        folders: run folders.
        path: of the page.

    Raises:
        UserError: a folder is not that of a run, matplotlib is not installed, or the page cannot be written.
    """
    histories = [read_history(folder) for folder in folders]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    page = environment.get_template(TEMPLATE).render(
        title=", ".join(history.folder.resolve().name for history in histories),
        written=_date(datetime.now(timezone.utc).timestamp()),
        plots=draw_plots(histories),
        runs=[
            describe(history) | {"name": name} for history, name in zip(histories, run_names(histories), strict=True)
        ],
        differences=find_differences(histories),
        names=run_names(histories),
    )
    try:
        partial_path(path).write_text(page, encoding="utf-8")
        partial_path(path).replace(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None


def describe(history: History) -> dict[str, Any]:
    """Returns what the page says about a run, as texts."""
    return {
        "name": history.folder.resolve().name,
        "status": describe_status(history),
        "figures": _figures(history),
        "command": command_of(history),
        "flags": _flags(history.config),
        "batches": _batches(history),
        "machines": _machines(history),
        "checkpoints": _checkpoints(history)[-MAX_ROWS:],
        "num_checkpoints": len(_checkpoints(history)),
        "samples": _samples(history),
        "events": _events(history),
        "num_unreadable": history.num_unreadable,
        "metrics": METRICS,
    }


def _figures(history: History) -> list[tuple[str, str]]:
    """Returns the numbers that people ask for first, with their names."""
    numbers = []
    if (loss := history.last("loss")) is not None:
        numbers.append(("loss", f"{loss:.4f}"))
    if history.evaluations:
        last = history.evaluations[-1]
        numbers.append(("held-out loss", f"{last['eval_loss']:.4f}"))
        numbers += [(name.replace("_", " "), f"{last[name]:,.3f}") for name in ("perplexity", "bits_per_byte")
                  if isinstance(last.get(name), float)]  # fmt: skip
    if (tokens := history.last("tokens")) is not None:
        numbers.append(("tokens", short_number(tokens)))
    if (epoch := history.last("epoch")) is not None:
        numbers.append(("epochs", f"{epoch:.2f}"))
    speeds = history.columns["tokens_per_second"]
    if len(speeds) and (speeds > 0).any():
        numbers.append(("tokens/s, median", short_number(float(sorted(speeds[speeds > 0])[(speeds > 0).sum() // 2]))))
    times = [*history.columns["time"][~(history.columns["time"] != history.columns["time"])]]
    if len(times) > 1:
        numbers.append(("from first to last row", format_seconds(max(times) - min(times))))
    if (peak := history.last("peak_memory_bytes")) is not None:
        numbers.append(("peak memory", f"{peak / 1e9:.2f} GB"))
    return numbers


def command_of(history: History) -> str:
    """Returns the command that starts such a run: the flags that are not at their default."""
    config = history.config
    script = "train_elastic.py" if "lighthouse" in config else "train.py"
    kind = ElasticConfig if "lighthouse" in config else TrainConfig
    defaults = {each.name: each.default for each in dataclasses.fields(kind)}
    words = [f"scripts/{script}"]
    for name, value in config.items():
        if name in defaults and value != defaults[name] and value != "" and name != "device":
            words += [flag_name(name), shlex.quote(str(value))]
    return " ".join(words) if config else ""


def _flags(config: dict) -> list[tuple[str, str]]:
    return [(flag_name(name), str(value)) for name, value in config.items()]


def _batches(history: History) -> list[tuple[str, str]]:
    batches, run = history.description.get("batches", {}), history.description.get("run", {})
    known = []
    if batches:
        shares = batches.get("shares", [])
        parts = " + ".join(map(str, shares)) if len(shares) > 1 else ""
        known.append(("global batch", f"{batches['batch_size']} sequences{f' = {parts}' if parts else ''}"))
        known.append(("steps", f"{batches['num_steps']:,}"))
        known.append(("sequences per epoch", f"{batches['num_blocks']:,}"))
    for name in ("backend", "mixed_precision"):
        if name in history.description:
            known.append((name.replace("_", " "), str(history.description[name])))
    return known + [(name.replace("_", " "), str(run[name])[:80]) for name in ("data", "model_config") if name in run]


def _machines(history: History) -> list[list[str]]:
    """Returns a row for each process of the last start."""
    rows = []
    for rank, each in enumerate(history.description.get("world", [])):
        versions = each.get("versions", {})
        rows.append(
            [
                str(rank), str(each.get("host", "")), str(each.get("address", "")), str(each.get("device_name", "")),
                str(each.get("threads", "")), ", ".join(f"{name} {value}" for name, value in versions.items()),
            ]
        )  # fmt: skip
    return rows


def _checkpoints(history: History) -> list[list[str]]:
    return [
        [
            f"{row.get('step', '')}", str(row.get("path", "")), f"{row.get('seconds') or 0:.1f}",
            ", ".join(holders(history, row)),
        ]
        for row in history.events_named("checkpoint", is_undone=False)
    ]  # fmt: skip


def _samples(history: History) -> list[tuple[str, str, str]]:
    """Returns step, loss and text of the samples; of many, the first, the last, and some evenly between them."""
    samples = history.events_named("sample", is_undone=False)
    if len(samples) > MAX_SAMPLES:
        samples = [samples[round(n * (len(samples) - 1) / (MAX_SAMPLES - 1))] for n in range(MAX_SAMPLES)]
    steps, losses = history.columns["step"], history.columns["loss"]
    found = []
    for row in samples:
        index = int((steps <= row.get("step", 0)).sum()) - 1
        loss = f"{losses[index]:.3f}" if index >= 0 else ""
        found.append((f"{row.get('step', '')}", loss, str(row.get("text", ""))))
    return found


def _events(history: History) -> list[tuple[str, str, str, str]]:
    """Returns time, step, kind and details of the other events, the newest ones."""
    rows = [row for row in history.events if row["event"] not in UNUSUAL]
    shown = []
    if len(rows) > MAX_ROWS:
        shown.append(("", "", "", f"{len(rows) - MAX_ROWS:,} earlier events are left out; {METRICS} has them"))
    for row in rows[-MAX_ROWS:]:
        details = {name: value for name, value in row.items() if name not in ("step", "event", "time") and value != []}
        text = "; ".join(f"{name.replace('_', ' ')}: {_text(value)}" for name, value in details.items())
        time = row.get("time")
        shown.append(
            (_date(time) if isinstance(time, float | int) else "", str(row.get("step", "")), row["event"], text)
        )
    return shown


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def find_differences(histories: Sequence[History]) -> list[tuple[str, list[str]]]:
    """Returns the flags and facts in which the runs differ, each with its value in every run."""
    values = []
    for history in histories:
        world = history.description.get("world", [])
        facts = {flag_name(name): str(value) for name, value in history.config.items()}
        facts |= {
            "processes": str(len(world)),
            "machines": ", ".join(dict.fromkeys(str(p.get("host")) for p in world)),
        }
        facts |= {name: str(history.description.get(name, "")) for name in ("backend", "mixed_precision")}
        values.append(facts)
    names = dict.fromkeys(name for facts in values for name in facts)
    rows = [(name, [facts.get(name, "") for facts in values]) for name in names]
    return [(name, row) for name, row in rows if len(set(row)) > 1]


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
