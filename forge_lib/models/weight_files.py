"""The files with a model's weights in a local folder: whether there are any, and what is wrong with them."""

import json
from pathlib import Path

from forge_lib import disk
from forge_lib.errors import UserError

# What transformers loads, the first one that is there.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# Other files that a folder without weights may contain.
NO_WEIGHTS = {
    ".json",
    ".txt",
    ".md",
    ".py",
    ".model",
    ".jinja",
    ".yaml",
    ".yml",
    ".tiktoken",
    ".bpe",
    ".vocab",
    ".spm",
}
NO_WEIGHTS |= {"", ".png", ".jpg", ".svg", ".pdf", ".html", ".csv", ".jsonl", ".log"}
FOREIGN_WEIGHTS = (
    "*.safetensors",
    "*.bin",
    "*.pth",
    "*.pt",
    "*.h5",
    "*.msgpack",
    "*.gguf",
    "*.ckpt",
    "*.onnx",
    "*.npz",
)


def has_weights(model_name: str) -> bool:
    """Returns whether a model comes with weights: a local folder may have only a config and a tokenizer."""
    path = Path(model_name).expanduser()
    return not path.is_dir() or any((path / name).is_file() for name in WEIGHT_FILES)


def check_weight_files(model_name: str) -> None:
    """Raises UserError if a local folder has weights that cannot be loaded: they would be replaced by random ones."""
    path = Path(model_name).expanduser()
    if not path.is_dir():
        return
    chosen = next((path / name for name in WEIGHT_FILES if (path / name).is_file()), None)
    if chosen is None:
        _check_no_weights(model_name, path)
        return
    files = [chosen]
    if chosen.suffix == ".json":
        files = [path / name for name in _shards(chosen)]
        if missing := [file.name for file in files if not file.is_file()]:
            raise UserError(
                f"--model-name {model_name}: the folder lacks {len(missing)} of the files in {chosen.name}: "
                f"{', '.join(missing[:3])}; copy them, or give --from-scratch for random weights"
            )
    check_no_pointers(model_name, files)


def check_no_pointers(model_name: str, files: list[Path]) -> None:
    """Raises UserError if one of these files of a model is a pointer of Git LFS."""
    for file in files:
        if file.is_file() and disk.is_lfs_pointer(file):
            raise UserError(
                f"--model-name {model_name}: {file.name} is a Git LFS pointer, not the file itself; run "
                "`git lfs pull` in the folder"
            )


def check_loaded_keys(model_name: str, missing: set[str], unexpected: set[str], model_class: str) -> None:
    """Raises UserError if a model has weights that its files lack: transformers makes them random.

    Args:
        model_name: for the message.
        missing: names of the model's tensors that were in no file, except tied and recomputed ones.
        unexpected: names of tensors in the files that the model does not have.
        model_class: for the message.
    """
    if missing:
        raise UserError(
            f"--model-name {model_name}: the weights lack {len(missing)} tensor(s) of {model_class}: "
            f"{name_some(missing)} (tensors that it does not know: {name_some(unexpected) or 'none'}); these would be "
            "random. Complete or rename them, or give --from-scratch for random weights"
        )


def name_some(names: set[str]) -> str:
    """Returns up to three names for a message."""
    return ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")


def _check_no_weights(model_name: str, folder: Path) -> None:
    """Raises UserError if a folder has something that may be weights, but not under a name that is loaded."""
    names = {file.name for file in folder.iterdir() if file.is_file() and not file.name.startswith(".")}
    found = {name for name in names if Path(name).suffix not in NO_WEIGHTS or name.endswith(".index.json")}
    below = {file.relative_to(folder) for pattern in FOREIGN_WEIGHTS for file in folder.glob(f"*/{pattern}")}
    found |= {str(file) for file in below if not file.parts[0].startswith(".")}
    if found:
        raise UserError(
            f"--model-name {model_name}: found {name_some(found)}, which cannot be loaded from this folder; expected "
            "model.safetensors or pytorch_model.bin, or their shards with an index. Convert or rename it (a .gguf "
            "file is named itself), or give --from-scratch for random weights"
        )


def _shards(index: Path) -> list[str]:
    try:
        return sorted(set(map(str, json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is damaged ({error!r:.200}); copy the folder again") from None
