"""Numbers and states in words, for the report and for `p2p-llm-forge status`."""

from collections.abc import Sequence

from forge_lib.report.history import History


def describe_status(history: History) -> str:
    """Returns how far a run is, in one phrase."""
    last, whole = history.last_step, history.num_steps
    of = f"{last:,} of {whole:,} steps" if whole else f"{last:,} steps"
    if not len(history):
        return "no step is logged yet"
    if history.is_complete:
        return f"complete: {of}"
    lost = () if history.rounds else ("peer_lost",)  # a peer of train_elastic.py goes on without others
    endings = [row["event"] for row in history.events_named("stop", *lost, "diverged", "resume", "start")]
    reasons = {"stop": "stopped after", "peer_lost": "interrupted after", "diverged": "ended by an error after"}
    return f"{reasons.get(endings[-1] if endings else '', 'so far')} {of}"


def short_number(value: float) -> str:
    """Returns a number with at most four digits and a unit: 12,345,678 is 12.3 M."""
    for size, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e4, " k")):
        if value >= size:
            return f"{value / (1e3 if unit == ' k' else size):.1f}{unit}"
    return f"{value:,.0f}"


def run_names(histories: Sequence[History]) -> list[str]:
    """Returns a name for each run: its folder's, with the folders above if two have the same."""
    paths = [history.folder.resolve() for history in histories]
    for count in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-count:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{path.name} ({number})" for number, path in enumerate(paths, 1)]  # the same run twice


def holders(history: History, checkpoint: dict) -> list[str]:
    """Returns the machines that hold a checkpoint: those that keep them, without those that could not write it.

    Args:
        history: of the run.
        checkpoint: its event.
    """
    failed = [row for row in history.events_named("checkpoint_failed") if row.get("step") == checkpoint.get("step")]
    return [str(host) for host in checkpoint.get("hosts", []) if host not in [row.get("host") for row in failed]]
