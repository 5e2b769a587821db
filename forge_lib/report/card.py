"""The model card: README.md of final/, made with huggingface_hub's card tools."""

import re
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from forge_lib.report.history import History
from forge_lib.report.page import command_of

TEMPLATE = "card.md.jinja"
HUB_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
FILE_ENDINGS = (".txt", ".md", ".json", ".jsonl", ".ndjson", ".csv", ".parquet", ".arrow", ".gguf")
PLOT_NAME = "loss.png"


def make_card(place: str, history: History, figures: dict[str, Any], has_plot: bool) -> str:
    """Returns the text of a model card.

    Args:
        place: of the model: its name on the Hub, or its folder.
        history: of the run.
        figures: of the last evaluation, and `steps`, `tokens`, `loss`.
        has_plot: whether loss.png is beside the card.
    """
    description, config = history.description, history.config
    run, base = description["run"], config["model_name"]
    is_hub_model = _is_hub_name(base)
    name = Path(place).parent.name if Path(place).name == "final" else place.rpartition("/")[2]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=base if is_hub_model and not config["from_scratch"] else None,
        datasets=[config["dataset_path"]] if _is_hub_name(config["dataset_path"]) else None,
        tags=["p2p-llm-forge"],
        model_name=name,
        eval_results=_eval_results(config, figures),
    )
    world = description["world"]
    facts = {
        "name": name,
        "place": place,
        "base": base if is_hub_model else Path(base).name,
        "is_from_scratch": config["from_scratch"],
        "dataset": Path(config["dataset_path"]).name or config["dataset_path"],
        "data": description["data"],
        "run": run,
        "config": config,
        "batches": description["batches"],
        "figures": {key.replace("_", " "): _rounded(value) for key, value in figures.items()},
        "command": command_of(history),
        "machines": _machines(history),
        "versions": world[0].get("versions", {}) if world else {},
        "precision": description.get("mixed_precision"),
        "has_plot": has_plot,
        "plot": PLOT_NAME,
    }
    template = (Path(__file__).parent / TEMPLATE).read_text(encoding="utf-8")
    text = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(template).render(facts)
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}"))


def _eval_results(config: dict, figures: dict) -> list[EvalResult] | None:
    """Returns the held-out results in the form that the Hub shows; None: there were none."""
    if "eval_loss" not in figures:
        return None
    name = Path(config["eval_dataset_path"] or config["dataset_path"]).name or "text"
    return [
        EvalResult("text-generation", "text", name, metric, float(figures[key]), metric_name=key.replace("_", " "))
        for key, metric in (("eval_loss", "loss"), ("perplexity", "perplexity"))
        if isinstance(figures.get(key), int | float)
    ]


def _is_hub_name(name: str) -> bool:
    """Returns whether a model or dataset is on the Hub, rather than a file or folder of any machine."""
    is_file = any(ending in Path(name).suffixes for ending in FILE_ENDINGS)
    return bool(HUB_NAME.fullmatch(name)) and not is_file and not Path(name).expanduser().exists()


def _machines(history: History) -> list[str]:
    """Returns a phrase for each machine: how many processes, on which device; peers of train_elastic.py by name."""
    if history.rounds:
        peers = dict.fromkeys(str(each.get("peer")) for row in history.rounds for each in row["participants"])
        return [f"{len(peers)} peers: {', '.join(peers)}"]
    found: dict[tuple, int] = {}
    for process in history.description["world"]:
        key = (process.get("host"), process.get("device_name"))
        found[key] = found.get(key, 0) + 1
    return [f"{count} process{'es' if count > 1 else ''} on {device}" for (_, device), count in found.items()]


def _rounded(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
