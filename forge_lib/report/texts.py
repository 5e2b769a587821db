"""Numbers and states in words, for the report and for `p2p-llm-forge status`."""

from forge_lib.report.history import History


def describe_status(history: History) -> str:
    """Returns how far a run is, in one phrase."""
    last, whole = history.last_step, history.num_steps
    of = f"{last:,} of {whole:,} steps" if whole else f"{last:,} steps"
    if not len(history):
        return "no step is logged yet"
    if history.is_complete:
        return f"complete: {of}"
    endings = [row["event"] for row in history.events_named("stop", "peer_lost", "diverged", "resume", "start")]
    reasons = {"stop": "stopped after", "peer_lost": "interrupted after", "diverged": "ended by an error after"}
    return f"{reasons.get(endings[-1] if endings else '', 'so far')} {of}"


def short_number(value: float) -> str:
    """Returns a number with at most four digits and a unit: 12,345,678 is 12.3 M."""
    for size, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e4, " k")):
        if value >= size:
            return f"{value / (1e3 if unit == ' k' else size):.1f}{unit}"
    return f"{value:,.0f}"
