"""The folder of the final model."""

from __future__ import annotations  # names of transformers in signatures are not imported

from collections.abc import Callable
from pathlib import Path

import transformers
from safetensors import SafetensorError
from torch import nn

from forge_lib import disk
from forge_lib.errors import disk_errors_as_user_errors


def save_final(
    model: nn.Module,
    tokenizer: transformers.PreTrainedTokenizerBase,
    folder: Path,
    add_files: Callable[[Path], None] = lambda partial: None,
) -> None:
    """Writes a HuggingFace model folder: weights, config, tokenizer and generation config.

    LoRA adapters are saved in its subfolder `adapter/` and then merged into the weights.

    Args:
        model: the unwrapped model; LoRA adapters are merged in place.
        tokenizer: its tokenizer.
        folder: written under a temporary name and then renamed; it replaces an older folder of that name.
        add_files: writes further files into the folder, such as the model card.

    Raises:
        UserError: the disk is full or has failed; a folder of that name stays as it was.
    """
    folder = folder.resolve() if folder.is_symlink() else folder  # the link stays
    disk.restore(folder)
    partial = disk.partial_path(folder)
    disk.remove(partial)
    with disk_errors_as_user_errors(folder):
        if hasattr(model, "merge_and_unload"):
            _save_model(model, partial / "adapter")
            model = model.merge_and_unload()
        _save_model(model, partial)
        tokenizer.save_pretrained(partial)
        add_files(partial)
        disk.flush_all(partial)
        disk.place(folder)


def _save_model(model: nn.Module, folder: Path) -> None:
    try:
        model.save_pretrained(folder)
    except SafetensorError as error:  # a full disk, as the library reports it
        raise OSError(None, str(error)) from None
