"""When which machine took part in a run, from the events and the rounds in metrics.jsonl."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from forge_lib.report.history import History

UNITS = (("minutes", 60.0), ("hours", 3600.0))
MOST_MINUTES = 120  # of a timeline; a longer one has hours
MARKS = {  # kinds of events on the timeline
    "peer_lost": "lost", "peer_joined": "joined", "healed": "caught up", "resume": "resumed", "stop": "stopped",
    "left_out": "left out", "diverged": "diverged", "shares": "new shares", "slower": "slower",
}  # fmt: skip


@dataclass(frozen=True)
class Span:
    """A machine that takes part, from `start` to `stop`."""

    machine: str
    start: float
    stop: float


@dataclass(frozen=True)
class Mark:
    """An event at a place of the timeline; `machine` is empty if it concerns all."""

    place: float
    kind: str
    machine: str


@dataclass(frozen=True)
class Timeline:
    """The machines of a run.

    Attributes:
        unit: of all places: minutes or hours since the first row, or steps for a run that recorded no times.
        spans, marks: in the order of time.
    """

    unit: str
    spans: Sequence[Span]
    marks: Sequence[Mark]

    @property
    def machines(self) -> list[str]:
        """Their names, in the order in which they came."""
        return list(dict.fromkeys(span.machine for span in self.spans))


class Clock:
    """Where on the axis a row is: minutes or hours since the first row with a time, else its step."""

    def __init__(self, history: History):
        times = [*history.columns["time"], *(row.get("time", np.nan) for row in history.events)]
        known = [each for each in times if isinstance(each, float | int) and np.isfinite(each)]
        self._start = min(known, default=None)
        self.unit, self.seconds = "step", 1.0
        if known:
            is_short = max(known) - min(known) <= 60 * MOST_MINUTES
            self.unit, self.seconds = UNITS[0] if is_short else UNITS[1]

    def place(self, row: dict) -> float | None:
        """Returns the place of a row; None if it has none."""
        value = row.get("step") if self._start is None else row.get("time")
        if value is None:
            return None
        return float(value) if self._start is None else (value - self._start) / self.seconds

    def places(self, columns: dict[str, np.ndarray]) -> np.ndarray:
        """Returns the places of the training rows, [num_rows] float64."""
        if self._start is None:
            return columns["step"]
        return (columns["time"] - self._start) / self.seconds


def make_timeline(history: History) -> Timeline:
    """Returns when each machine took part."""
    clock = Clock(history)
    spans = _spans_of_rounds(history, clock) if history.rounds else _spans_of_starts(history, clock)
    marks = []
    for row in history.events_named(*MARKS):
        place = clock.place(row)
        if place is not None:
            marks.append(Mark(place, MARKS[row["event"]], str(row.get("peer") or row.get("host") or "")))
    return Timeline(clock.unit, spans, marks)


def _spans_of_rounds(history: History, clock: Clock) -> list[Span]:
    """Each round of train_elastic.py names its participants; rounds in a row make one span."""
    spans: dict[str, list[Span]] = {}
    before = None
    for row in history.rounds:
        stop = clock.place(row)
        if stop is None:
            continue
        length = (row.get("round_seconds") or 0.0) / clock.seconds if clock.unit != "step" else 0.0
        start = stop - length if before is None else max(before, stop - 1.5 * length if length else before)
        for each in row["participants"]:
            known = spans.setdefault(str(each.get("peer")), [])
            if known and known[-1].stop >= start - length:
                known[-1] = Span(known[-1].machine, known[-1].start, max(stop, known[-1].stop))
            else:
                known.append(Span(str(each.get("peer")), start, stop))
        before = stop
    return sorted((span for each in spans.values() for span in each), key=lambda span: span.start)


def _spans_of_starts(history: History, clock: Clock) -> list[Span]:
    """All machines of train.py take part from a start of the run until it ends, or until one of them is lost."""
    described = list(dict.fromkeys(str(each.get("host")) for each in history.description.get("world", [])))
    places = clock.places(history.columns)
    rows = [(float(place), None) for place in places[np.isfinite(places)]]
    rows += [(place, row) for row in history.events if (place := clock.place(row)) is not None]
    rows.sort(key=lambda each: each[0])
    spans: list[Span] = []
    machines, start = described, rows[0][0] if rows else 0.0
    previous = start
    for place, row in rows:
        if row and row["event"] in ("start", "resume"):
            spans += [Span(name, start, previous) for name in machines if previous > start]
            machines, start = list(dict.fromkeys(row.get("hosts", described))), place
        previous = place
    return spans + [Span(name, start, previous) for name in machines]
