"""The folder of the final model."""

from __future__ import annotations  # names of transformers in signatures are not imported

import json
from pathlib import Path
from typing import Any

import transformers
from torch import nn

from forge_lib import disk


def save_final(
    model: nn.Module, tokenizer: transformers.PreTrainedTokenizerBase, folder: Path, facts: dict[str, Any]
) -> None:
    """Writes a HuggingFace model folder: weights, config, tokenizer, generation config and a model card.

    LoRA adapters are saved in its subfolder `adapter/` and then merged into the weights.

    Args:
        model: the unwrapped model; LoRA adapters are merged in place.
        tokenizer: its tokenizer.
        folder: written under a temporary name and then renamed; it replaces an older folder of that name.
        facts: what the model card states about the run.
    """
    folder = folder.resolve() if folder.is_symlink() else folder  # the link stays
    disk.restore(folder)
    partial = disk.partial_path(folder)
    disk.remove(partial)
    if hasattr(model, "merge_and_unload"):
        model.save_pretrained(partial / "adapter")
        model = model.merge_and_unload()
    model.config.use_cache = True
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    (partial / "README.md").write_text(_model_card(facts), encoding="utf-8")
    disk.flush_all(partial)
    disk.place(folder)


def _model_card(facts: dict[str, Any]) -> str:
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", "---", "", "# Model card", ""]
    lines += ["Trained with P2P-LLM-Forge, data-parallel, with HuggingFace Accelerate.", ""]
    lines += ["```json", json.dumps(facts, indent=2, ensure_ascii=False), "```"]
    return "\n".join(lines) + "\n"
