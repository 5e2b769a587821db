"""The one reader of metrics.jsonl and run.json, also of a run that goes on, has crashed, or was resumed."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from forge_lib.errors import UserError

METRICS, DESCRIPTION = "metrics.jsonl", "run.json"
INTEGERS = ("step", "tokens", "num_processes")
COLUMNS = (
    *INTEGERS, "time", "epoch", "loss", "grad_norm", "learning_rate", "tokens_per_second", "step_seconds",
    "data_seconds", "compute_seconds", "sync_seconds", "bytes_sent", "mfu", "peak_memory_bytes",
    "round", "round_seconds", "wait_seconds", "utilization", "tokens_lost",
)  # fmt: skip
CHUNK_LINES = 1000  # a chunk with a line that pyarrow cannot read is divided down to this size
TAIL_BYTES = 1 << 20  # of metrics.jsonl, for the newest rows of a long run


@dataclass(frozen=True)
class History:
    """What the files of a run folder say.

    Attributes:
        folder: the run folder.
        columns: of the training rows: [num_rows] float64 by name, with nan where a row has no number. Rows that a
            resumed run has computed again are there once, as computed last.
        evaluations: evaluation rows, as they were written last, in the order of their steps.
        events: all of them, in the order in which they were written.
        is_undone: [number of events] whether a later row has an earlier step: a resumed run has repeated that part.
        rounds: training rows of train_elastic.py, with all they have.
        description: run.json; empty if it is missing.
        num_unreadable: lines that are not JSON objects, such as the last one of a run that was killed.
    """

    folder: Path
    columns: dict[str, np.ndarray]
    evaluations: list[dict] = field(default_factory=list)
    events: list[dict] = field(default_factory=list)
    is_undone: list[bool] = field(default_factory=list)
    rounds: list[dict] = field(default_factory=list)
    description: dict = field(default_factory=dict)
    num_unreadable: int = 0

    def __len__(self) -> int:
        return len(self.columns["step"])

    @property
    def config(self) -> dict:
        """The flags of the run."""
        return self.description.get("config", {})

    @property
    def num_steps(self) -> int:
        """Steps of the whole run; 0: not known."""
        return self.description.get("batches", {}).get("num_steps", 0)

    @property
    def last_step(self) -> int:
        """The newest step that the run has made and not repeated since; 0: none."""
        rows = [*self.evaluations, *self.events_named(is_undone=False)]
        steps = [row["step"] for row in rows if _is_number(row.get("step"))]
        return int(max([*steps, self.columns["step"][-1] if len(self) else 0]))

    @property
    def is_complete(self) -> bool:
        """Whether the run has made its last step."""
        return 0 < self.num_steps <= (self.columns["step"][-1] if len(self) else 0)

    def last(self, name: str) -> float | None:
        """Returns the newest number of a column; None: there is none."""
        values = self.columns[name]
        known = values[~np.isnan(values)]
        return float(known[-1]) if len(known) else None

    def events_named(self, *names: str, is_undone: bool | None = None) -> list[dict]:
        """Returns the events of these kinds, or of all without a name.

        Args:
            names: of the kinds.
            is_undone: False: without those of a part that was repeated later; None: all.
        """
        found = [each for each, undone in zip(self.events, self.is_undone, strict=True) if is_undone in (None, undone)]
        return [each for each in found if not names or each["event"] in names]


def read_history(folder: Path) -> History:
    """Reads a run folder.

    Raises:
        UserError: it is not the folder of a run.
    """
    metrics, description = folder / METRICS, folder / DESCRIPTION
    if not metrics.exists() and not description.exists():
        what = "is not a folder" if not folder.is_dir() else f"has neither {METRICS} nor {DESCRIPTION}"
        raise UserError(f"{folder} {what}: expected the --output-dir of a run, on its main machine")
    content: Any = {}
    try:
        content = json.loads(description.read_text(encoding="utf-8")) if description.exists() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"{description} cannot be read: {error}") from None
    data = metrics.read_bytes() if metrics.exists() else b""
    return _parse(folder, data.splitlines(), content if isinstance(content, dict) else {})


def read_tail(folder: Path) -> History:
    """Reads run.json and only the end of metrics.jsonl: enough for the newest numbers, in an instant.

    Raises:
        UserError: it is not the folder of a run.
    """
    path = folder / METRICS
    if not path.exists() or path.stat().st_size <= TAIL_BYTES:
        return read_history(folder)
    whole = read_description(folder)
    with open(path, "rb") as file:
        file.seek(-TAIL_BYTES, 2)
        lines = file.read().splitlines()[1:]
    return _parse(folder, lines, whole)


def read_description(folder: Path) -> dict:
    """Returns the content of run.json; empty if it is missing or damaged."""
    try:
        content = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _parse(folder: Path, lines: Sequence[bytes], description: dict) -> History:
    """Returns the history in some lines of metrics.jsonl.

    There may be a million training rows: pyarrow parses them, and Python only the other lines.
    """
    training, places, others, num_unreadable = [], [], [], 0
    for place, line in enumerate(lines):
        if b'"tokens_per_second"' in line and b'"event"' not in line and b'"participants"' not in line:
            training.append(line)
            places.append(place)
        elif line.strip():
            others.append((place, line))
    table, wrong = _parse_training(training)
    num_unreadable += len(wrong)
    places = np.delete(np.array(places, np.int64), wrong)
    rows: list[tuple[int, dict]] = []
    for place, line in others:
        row = _parse_line(line)
        num_unreadable += row is None
        rows += [(place, row)] if row else []
    rounds = [(place, row) for place, row in rows if _is_number(row.get("loss")) and "participants" in row]
    if rounds:
        extra = _to_columns([row for _, row in rounds])
        table = {name: np.concatenate([table[name], extra[name]]) for name in COLUMNS}
        places = np.concatenate([places, np.array([place for place, _ in rounds])])
        order = np.argsort(places, kind="stable")
        table, places = {name: values[order] for name, values in table.items()}, places[order]
    events = [(place, row) for place, row in rows if isinstance(row.get("event"), str)]
    kept = _not_repeated(table["step"], places, table["step"], places)
    evaluated = [
        (place, row) for place, row in rows if _is_number(row.get("eval_loss")) and _is_number(row.get("step"))
    ]
    steps, lines_of = _steps_and_places(evaluated)
    counts = _not_repeated(steps, lines_of, steps, lines_of) & _not_repeated(steps, lines_of, table["step"], places)
    event_steps, event_places = _steps_and_places(events)
    undone = ~_not_repeated(event_steps, event_places, table["step"], places)
    return History(
        folder=folder,
        columns={name: values[kept] for name, values in table.items()},
        evaluations=[row for (_, row), count in zip(evaluated, counts, strict=True) if count],
        events=[row for _, row in events],
        is_undone=undone.tolist(),
        rounds=[row for _, row in rounds],
        description=description,
        num_unreadable=num_unreadable,
    )


def _not_repeated(
    steps: np.ndarray, places: np.ndarray, other_steps: np.ndarray, other_places: np.ndarray
) -> np.ndarray:
    """Returns which rows count: [n] bool, False if a later one of the other rows has the same step or an earlier one.

    A run that is resumed goes back to its checkpoint, or to the beginning, and repeats the steps since then.

    Args:
        steps, places: [n] step and line of each row.
        other_steps, other_places: [m] of the other rows, in the order of their lines; they may be the same.
    """
    lowest = np.minimum.accumulate(np.nan_to_num(other_steps, nan=np.inf)[::-1])[::-1]  # from each line to the end
    after = np.searchsorted(other_places, places, side="right")
    lowest = np.append(lowest, np.inf)[after]
    return np.isfinite(steps) & (steps < lowest) if len(steps) else np.zeros(0, bool)


def _steps_and_places(rows: list[tuple[int, dict]]) -> tuple[np.ndarray, np.ndarray]:
    steps = [row["step"] if _is_number(row.get("step")) else 0 for _, row in rows]
    return np.array(steps, float), np.array([place for place, _ in rows], np.int64)


def _parse_training(lines: Sequence[bytes]) -> tuple[dict[str, np.ndarray], list[int]]:
    """Returns the columns of training rows, and the indices of lines that are not JSON objects."""
    if not lines:
        return {name: np.zeros(0) for name in COLUMNS}, []
    import pyarrow
    from pyarrow import json as arrow_json

    schema = pyarrow.schema([(name, pyarrow.float64()) for name in COLUMNS])
    options = arrow_json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
    parts, wrong = [], []
    chunks = [(0, lines)]
    while chunks:
        start, chunk = chunks.pop()
        try:
            table = arrow_json.read_json(pyarrow.py_buffer(b"\n".join(chunk)), parse_options=options)
            parts.append((start, {name: table[name].to_numpy() for name in COLUMNS}))
        except pyarrow.ArrowInvalid:  # a line that was cut off, or a value of another type
            if len(chunk) > CHUNK_LINES:
                step = max(CHUNK_LINES, len(chunk) // 16)
                chunks += [(start + at, chunk[at : at + step]) for at in range(0, len(chunk), step)]
                continue
            parsed = [_parse_line(line) for line in chunk]
            parts.append((start, _to_columns([row for row in parsed if row is not None])))
            wrong += [start + index for index, row in enumerate(parsed) if row is None]
    parts.sort(key=lambda part: part[0])
    return {name: np.concatenate([columns[name] for _, columns in parts]) for name in COLUMNS}, sorted(wrong)


def _to_columns(rows: list[dict]) -> dict[str, np.ndarray]:
    return {
        name: np.array([row[name] if _is_number(row.get(name)) else np.nan for row in rows], float) for name in COLUMNS
    }


def _parse_line(line: bytes) -> dict | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
