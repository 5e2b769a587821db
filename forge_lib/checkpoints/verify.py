"""Reads and verifies a checkpoint that may be incomplete, damaged or hostile; nothing in it is executed."""

import hashlib
import json
import os
import stat
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from forge_lib import disk
from forge_lib.checkpoints.format import (
    FILES,
    FORMAT_VERSION,
    TENSOR_FILES,
    describe_error,
    manifest_sha256,
    run_parallel,
)

MAX_JSON_BYTES = 1 << 24
DAMAGE = (OSError, ValueError, RecursionError, SafetensorError)  # what reading a damaged checkpoint may raise


def verify(path: Path) -> str | None:
    """Returns what is wrong with a checkpoint; None if it is complete and each file is the one that was saved."""
    try:
        manifest, _ = read_manifest_and_state(path)
        check_tensors(path, manifest)
    except DAMAGE as error:
        return describe_error(error)
    return None


def read_manifest_and_state(path: Path) -> tuple[dict, dict]:
    """Reads the two JSON files of a checkpoint and checks everything except the tensors' hashes.

    Raises:
        one of DAMAGE: something is wrong with the checkpoint.
    """
    manifest = _read_manifest(path)
    for name, facts in manifest["files"].items():
        if (size := _size(path / name)) != facts["bytes"]:
            raise ValueError(
                f"{name} is damaged: it has {size:,} bytes, but manifest.json lists {brief(facts['bytes'])}"
            )
    text = _read_bytes(path / "state.json")
    _check_hash("state.json", manifest, hashlib.sha256(text).hexdigest())
    state = _parse("state.json", text)
    if type(state.get("step")) is not int or state["step"] < 0 or not isinstance(state.get("run"), dict):
        raise ValueError("state.json has no valid step and run")
    if path.name.startswith("step-") and path.name != f"step-{state['step']:08d}":
        raise ValueError(f"its state.json is of step {brief(state['step'])}")
    return manifest, state


def check_tensors(path: Path, manifest: dict) -> None:
    """Checks the hashes and headers of the safetensors files.

    Raises:
        one of DAMAGE: a file cannot be read, or is not the one that was saved.
    """
    hashes = run_parallel([partial(disk.sha256, path / name) for name in TENSOR_FILES])
    for name, sha256 in zip(TENSOR_FILES, hashes, strict=True):
        _check_hash(name, manifest, sha256)
        try:
            with safe_open(path / name, framework="pt"):
                pass
        except SafetensorError as error:
            raise ValueError(f"{name} is not a safetensors file: {error}") from None


def read_json(path: Path) -> dict:
    """Reads a JSON object from a regular file.

    Raises:
        OSError, ValueError: the file cannot be read, is too large, or is not a JSON object.
    """
    return _parse(path.name, _read_bytes(path))


def brief(value: Any) -> str:
    """Returns a value for a message: its first 200 characters."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


def _read_manifest(path: Path) -> dict:
    """Reads manifest.json and checks its form and its own sha256; raises one of DAMAGE."""
    if not stat.S_ISDIR(path.lstat().st_mode):
        raise ValueError("not a folder")
    if not os.path.lexists(path / "manifest.json"):
        raise ValueError("incomplete: it has no manifest.json")
    manifest = read_json(path / "manifest.json")
    version, files = manifest.get("format_version"), manifest.get("files")
    if type(version) is not int or version < 1:
        raise ValueError("manifest.json has no format_version")
    if version > FORMAT_VERSION:
        raise ValueError(f"its format version {brief(version)} is newer than {FORMAT_VERSION}, the newest known here")
    if not isinstance(files, dict) or set(files) != set(FILES):
        raise ValueError(f"manifest.json does not list {', '.join(FILES)}")
    if any(not isinstance(facts, dict) or set(facts) != {"bytes", "sha256"} for facts in files.values()):
        raise ValueError("manifest.json does not list bytes and sha256 of each file")
    if version > 1 and manifest.get("sha256") != manifest_sha256(manifest):
        raise ValueError("manifest.json is damaged: its content does not match its own sha256")
    return manifest


def _check_hash(name: str, manifest: dict, sha256: str) -> None:
    if (expected := manifest["files"][name]["sha256"]) != sha256:
        raise ValueError(f"{name} is damaged: its sha256 is {sha256}, but manifest.json lists {brief(expected)}")


def _read_bytes(path: Path) -> bytes:
    """Reads a regular file; raises ValueError if it is something else, or larger than any that this program writes."""
    if (size := _size(path)) > MAX_JSON_BYTES:
        raise ValueError(f"{path.name} has {size:,} bytes, more than {MAX_JSON_BYTES:,}")
    return path.read_bytes()


def _parse(name: str, text: bytes) -> dict:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"{name} is not JSON") from None
    if not isinstance(content, dict):
        raise ValueError(f"{name} is not a JSON object")
    return content


def _size(path: Path) -> int:
    """Returns the size of a regular file in bytes; raises ValueError if it is missing, or a link or something else."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        raise ValueError(f"{path.name} is missing") from None
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path.name} is not a regular file")
    return status.st_size
