"""The table that `make faults` and `make networks` print: which faults tests injected, and what happened."""


class FaultTable:
    """Collects the outcome of each injected fault."""

    def __init__(self):
        self.rows: dict[tuple[str, str], list[float | None]] = {}

    def add(self, fault: str, outcome: str, seconds: float | None = None) -> None:
        """Adds one trial; `seconds` is the time from the fault to its outcome, if it was measured."""
        self.rows.setdefault((fault, outcome), []).append(seconds)

    def lines(self) -> list[str]:
        """Returns the lines of a Markdown table."""
        lines = ["| Fault | Times | Outcome | Seconds |", "|---|---|---|---|"]
        for (fault, outcome), trials in self.rows.items():
            seconds = sorted(trial for trial in trials if trial is not None)
            span = " to ".join(dict.fromkeys(f"{s:.1f}" for s in (*seconds[:1], *seconds[-1:]))) or "-"
            lines.append(f"| {fault} | {len(trials)} | {outcome} | {span} |")
        return lines


FAULTS = FaultTable()
