"""The model card: README.md of final/, made with huggingface_hub's card tools."""

import re
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCard, ModelCardData

TEMPLATE = "card.md.jinja"
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")  # of a model; a local folder is not named on the card
PLOT_NAME = "loss.png"


def make_card(name: str, description: dict[str, Any], figures: dict[str, Any], command: str, has_plot: bool) -> str:
    """Returns the text of a model card.

    Args:
        name: of the model.
        description: the content of run.json.
        figures: of the last evaluation, and `steps`, `tokens`, `loss`.
        command: that trains such a model.
        has_plot: whether loss.png is beside the card.
    """
    config, run = description["config"], description["run"]
    base = config["model_name"]
    is_hub_model = bool(HUB_NAME.fullmatch(base)) and not Path(base).exists()
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=base if is_hub_model and not config["from_scratch"] else None,
        datasets=[config["dataset_path"]] if _is_hub_dataset(config["dataset_path"]) else None,
        tags=["p2p-llm-forge"],
        model_name=name,
        eval_results=_eval_results(config, figures),
    )
    world = description["world"]
    facts = {
        "name": name,
        "base": base if is_hub_model else Path(base).name,
        "is_from_scratch": config["from_scratch"],
        "dataset": Path(config["dataset_path"]).name or config["dataset_path"],
        "data": description["data"],
        "run": run,
        "config": config,
        "batches": description["batches"],
        "figures": {key.replace("_", " "): _rounded(value) for key, value in figures.items()},
        "command": command,
        "machines": _machines(world),
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


def _is_hub_dataset(path: str) -> bool:
    return bool(HUB_NAME.fullmatch(path)) and not Path(path).exists()


def _machines(world: list[dict]) -> list[str]:
    """Returns a phrase for each machine: how many processes, on which device."""
    found: dict[tuple, int] = {}
    for process in world:
        key = (process.get("host"), process.get("device_name"))
        found[key] = found.get(key, 0) + 1
    return [f"{count} process{'es' if count > 1 else ''} on {device}" for (_, device), count in found.items()]


def _rounded(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
