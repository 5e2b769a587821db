"""Finds what --dataset-path means: files on this machine, or a dataset on the Hub."""

import glob
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from forge_lib import disk
from forge_lib.config import DataConfig
from forge_lib.data.token_store import is_store, open_store
from forge_lib.errors import UserError

FORMATS = {"txt": "text", "md": "text", "json": "json", "jsonl": "json", "csv": "csv", "parquet": "parquet"}
COMPRESSIONS = ("gz", "zst")
FORMAT_NAMES = ", ".join(FORMATS) + ", each also ." + " or .".join(COMPRESSIONS)
HUB_SECONDS = 10


@dataclass(frozen=True)
class Source:
    """Where the documents come from: files, or a dataset on the Hub.

    Attributes:
        files: the files with content and the format of each, in order; none for a dataset on the Hub.
        num_empty: number of empty files.
        num_bytes: size of all files.
        fingerprint: sha256; changes if the names, sizes or times of the files, or the revision on the Hub, change.
        stamps: `disk.stamp` of each file, also of the empty ones, when it was found.
    """

    files: list[tuple[Path, str]]
    num_empty: int
    num_bytes: int
    fingerprint: str
    stamps: dict[Path, tuple[int, int, int]]

    def check_unchanged(self) -> None:
        """Raises UserError if a file was changed since it was found."""
        for path, before in self.stamps.items():
            if not path.is_file() or disk.stamp(path) != before:
                raise UserError(f"{path} was changed while it was tokenized; start again when it is complete")


def data_exists(dataset_path: str) -> bool:
    """Returns whether a file or folder of that name, or one that matches the pattern, is on this machine."""
    path = str(Path(dataset_path).expanduser())
    return bool(dataset_path) and (
        Path(path).exists() or (glob.has_magic(path) and any(glob.iglob(path, recursive=True)))
    )


def content_fingerprint(dataset_path: str) -> str:
    """Returns the fingerprint of a token store, or a sha256 over the names and bytes of files: equal on all machines.

    Returns "" if there is nothing at that path, as for a dataset on the Hub.

    Raises:
        UserError: no file of a known format, or one that cannot be read.
    """
    if is_store(dataset_path):
        return open_store(dataset_path).fingerprint
    if not data_exists(dataset_path):
        return ""
    digest = hashlib.sha256()
    for path, _ in find_source(DataConfig(dataset_path=dataset_path)).files:
        digest.update(path.name.encode() + b"\0" + bytes.fromhex(disk.sha256(path)))
    return digest.hexdigest()


def find_source(config: DataConfig) -> Source:
    """Finds the files, or the dataset on the Hub, that `config.dataset_path` means.

    Raises:
        UserError: there is no such data, no file of a known format, or no file with content.
    """
    given = config.dataset_path
    path = Path(given).expanduser()
    if not (path.is_file() or path.is_dir() or glob.has_magic(given)):
        return _find_hub_dataset(config)
    paths = _find_files(given)
    names = [str(each.relative_to(path)) if path.is_dir() else each.name for each in paths]
    stamps = {each: disk.stamp(each) for each in paths}
    identity = [(name, *stamps[each][:2]) for name, each in zip(names, paths, strict=True)]
    files = [(each, _format(each)) for each in paths if stamps[each][0]]
    if not files:
        raise UserError(f"--dataset-path {given}: empty: {len(paths)} file(s) of 0 bytes; expected text")
    return Source(
        files=files,
        num_empty=len(paths) - len(files),
        num_bytes=sum(size for size, *_ in stamps.values()),
        fingerprint=_hash(identity),
        stamps=stamps,
    )


def _find_files(given: str) -> list[Path]:
    """Returns the files of known formats, sorted, that a file name, folder or pattern means."""
    path = Path(given).expanduser()
    if path.is_file():
        if _format(path) is None:
            raise UserError(f"--dataset-path {given}: unknown format; expected {FORMAT_NAMES}")
        return [path]
    found = path.rglob("*") if path.is_dir() else map(Path, glob.glob(str(path), recursive=True))
    paths = sorted(each for each in found if each.is_file() and _format(each))
    if not paths:
        what = "the folder has no file of a known format" if path.is_dir() else "no file of a known format matches"
        raise UserError(f"--dataset-path {given}: {what}: {FORMAT_NAMES}")
    return paths


def _find_hub_dataset(config: DataConfig) -> Source:
    name = config.dataset_path
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.split(".")[-1] in {*FORMATS, *COMPRESSIONS}:
        raise UserError(f"--dataset-path {name}: no such file or folder")
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import HFValidationError

    try:
        revision = HfApi().dataset_info(name, timeout=HUB_SECONDS).sha
    except (HfHubHTTPError, HFValidationError) as error:
        reason = f"the Hub answers {type(error).__name__}"
    except Exception as error:  # its type depends on the HTTP library: unreachable, proxy, certificate
        reason = f"the Hub cannot be reached: {type(error).__name__}"
    else:
        identity = [name, revision, config.dataset_config, config.dataset_split]
        return Source(files=[], num_empty=0, num_bytes=0, fingerprint=_hash(identity), stamps={})
    raise UserError(
        f"--dataset-path {name}: no such file or folder on this machine, and no such dataset on the Hub ({reason})"
    )


def _format(path: Path) -> str | None:
    """Returns the format of a file by its suffix before .gz or .zst; None if it is unknown."""
    suffixes = path.name.lower().split(".")[1:]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return FORMATS.get(suffixes[-1]) if suffixes else None


def _hash(identity: list) -> str:
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()
