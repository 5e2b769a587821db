"""The files with a model's weights in a local folder: whether there are any, and what is wrong with them."""

import json
from pathlib import Path

from forge_lib.errors import UserError

WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin", "*.gguf")
# Weights of other programs and older versions, and incomplete downloads; ignored beside a file of WEIGHT_FILES.
OTHER_WEIGHTS = ("*.h5", "*.msgpack", "*.pth", "*.pt", "*.ckpt", "*.ot", "*model*.bin*", "*.part", "*.incomplete")
INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
LFS_POINTER = b"version https://git-lfs"  # git writes it in place of a large file


def has_weights(model_name: str) -> bool:
    """Returns whether a model comes with weights: a local folder may have only a config and a tokenizer."""
    path = Path(model_name).expanduser()
    return not path.is_dir() or any(any(path.glob(pattern)) for pattern in WEIGHT_FILES)


def check_weight_files(model_name: str) -> None:
    """Raises UserError if a local folder has weights that cannot be loaded: they would be replaced by random ones."""
    path = Path(model_name).expanduser()
    if not path.is_dir():
        return
    for name in INDEX_FILES:
        if (path / name).is_file() and (missing := _missing_shards(path, name)):
            raise UserError(
                f"--model-name {model_name}: the folder lacks {len(missing)} of the files in {name}: "
                f"{', '.join(missing[:3])}; copy them, or give --from-scratch for random weights"
            )
    found = sorted({each for pattern in WEIGHT_FILES for each in path.glob(pattern)})
    for file in found:
        if file.is_file() and file.open("rb").read(len(LFS_POINTER)) == LFS_POINTER:
            raise UserError(
                f"--model-name {model_name}: {file.name} is a Git LFS pointer, not the weights; run `git lfs pull` in "
                "the folder"
            )
    others = sorted({each.name for pattern in OTHER_WEIGHTS for each in path.glob(pattern)})
    if others and not found:
        raise UserError(
            f"--model-name {model_name}: found {', '.join(others[:3])}, which cannot be loaded; expected "
            "model.safetensors, its shards or pytorch_model.bin; convert it, or give --from-scratch for random weights"
        )


def check_loaded_keys(model_name: str, missing: set[str], unexpected: set[str], config_class: str) -> None:
    """Raises UserError if a model has weights that its files lack: transformers makes them random.

    Args:
        model_name: for the message.
        missing: names of the model's tensors that were in no file, except tied and recomputed ones.
        unexpected: names of tensors in the files that the model does not have.
        config_class: the model's class, for the message.
    """
    if not missing:
        return

    def some(names: set[str]) -> str:
        return ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "") or "none"

    raise UserError(
        f"--model-name {model_name}: the weights lack {len(missing)} tensor(s) of {config_class}: {some(missing)} "
        f"(tensors that it does not know: {some(unexpected)}); these would be random. Complete or rename them, or "
        "give --from-scratch for random weights"
    )


def _missing_shards(folder: Path, index: str) -> list[str]:
    try:
        names = set(json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / index} is damaged ({error!r:.200}); copy the folder again") from None
    return sorted(name for name in names if not (folder / name).is_file())
