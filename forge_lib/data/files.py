"""Finds what --dataset-path means: files on this machine, or a dataset on the Hub."""

import fnmatch
import glob
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from forge_lib import disk
from forge_lib.config import DataConfig
from forge_lib.data.token_store import is_store, open_store
from forge_lib.errors import UserError

FORMATS = {
    "txt": "text",
    "md": "text",
    "json": "json",
    "jsonl": "jsonl",
    "ndjson": "jsonl",
    "csv": "csv",
    "parquet": "parquet",
    "arrow": "arrow",
}
COMPRESSIONS = ("gz", "zst")
FORMAT_NAMES = ", ".join(FORMATS) + ", each also ." + " or .".join(COMPRESSIONS)
HUB_SECONDS = 10


@dataclass(frozen=True)
class Source:
    """Where the documents come from: files, or a dataset on the Hub.

    Attributes:
        files: the files with content and the format of each, in order; none for a dataset on the Hub.
        empty: the files of 0 bytes.
        num_bytes: size of all files.
        fingerprint: sha256; changes if the paths, sizes or times of the files, or the revision on the Hub, change.
        stamps: `disk.stamp` of each file, also of the empty ones, when it was found.
        skipped: names of the files that are not read, by the reason: a suffix, "hidden", "read already", ...
    """

    files: list[tuple[Path, str]]
    empty: list[Path]
    num_bytes: int
    fingerprint: str
    stamps: dict[Path, tuple[int, int, int]]
    skipped: dict[str, list[str]] = field(default_factory=dict)

    def check_unchanged(self) -> None:
        """Raises UserError if a file was changed since it was found."""
        for path, before in self.stamps.items():
            if not path.is_file() or disk.stamp(path) != before:
                raise UserError(f"{path} was changed while it was tokenized; start again when it is complete")


def describe_files(path: str, facts: dict[str, dict[str, list]]) -> str:
    """Returns one line: how many files of which kinds were read, were empty and were skipped; a single one by name.

    Args:
        path: the value of --dataset-path.
        facts: "read", "empty" and "skipped": kind -> [number of files, name of the first one].
    """

    def count(what: str) -> str:
        kinds = facts[what].items()
        parts = [f"{number} {kind}" + (f" ({name})" if number == 1 else "") for kind, (number, name) in kinds]
        return f"{what} {', '.join(parts) or 'none'}"

    return f"files of {path}: {count('read')}; {count('empty')}; {count('skipped')}"


def kind_of(path: Path) -> str:
    """Returns the suffix of a file name, with that before a compression: ".jsonl", ".csv.gz" or "without a suffix"."""
    suffixes = path.name.lower().split(".")[1:]
    if not suffixes:
        return "without a suffix"
    count = 2 if suffixes[-1] in COMPRESSIONS and len(suffixes) > 1 else 1
    return "." + ".".join(suffixes[-count:])


def data_exists(dataset_path: str) -> bool:
    """Returns whether a file or folder of that name, or one that matches the pattern, is on this machine."""
    path = Path(dataset_path).expanduser()
    return bool(dataset_path) and (path.exists() or (glob.has_magic(dataset_path) and any(_match(path))))


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
    """Finds the files, or the dataset on the Hub, that `config.dataset_path` means. An existing path is no pattern.

    Raises:
        UserError: there is no such data, no file of a known format, or no file with content.
    """
    given = config.dataset_path
    path = Path(given).expanduser()
    if not given:
        raise UserError("--dataset-path is empty; expected a file, a folder, a pattern, or a dataset on the Hub")
    if not (path.is_file() or path.is_dir() or glob.has_magic(given)):
        return _find_hub_dataset(config)
    found = _find_files(given)
    paths = found.paths
    stamps = {each: disk.stamp(each) for each in paths}
    identity = [(str(each.absolute()), *stamps[each][:2]) for each in paths]
    files = [(each, _format(each)) for each in paths if stamps[each][0]]
    if not files:
        raise UserError(f"--dataset-path {given}: empty: {len(paths)} file(s) of 0 bytes; expected text")
    return Source(
        files=files,
        empty=[each for each in paths if not stamps[each][0]],
        num_bytes=sum(size for size, *_ in stamps.values()),
        fingerprint=_hash(identity),
        stamps=stamps,
        skipped=found.skipped,
    )


class _Finder:
    """Collects files of known formats, each real file once, and the names of those that are skipped."""

    def __init__(self):
        self.paths: list[Path] = []
        self.skipped: dict[str, list[str]] = {}
        self._seen: set[tuple[int, int]] = set()  # device and inode of each file and folder
        self._added: set[Path] = set()

    def add(self, path: Path) -> None:
        """Adds a file, or all files below a folder, in the order of their names, except hidden ones."""
        if path in self._added:  # a pattern may match a folder and then its files
            return
        self._added.add(path)
        try:
            stat = path.stat()
            identity = (stat.st_dev, stat.st_ino)
            if path.is_file() and not _format(path):
                self._skip(path, kind_of(path))
            elif identity in self._seen:
                self._skip(path, "read already under another name")
            elif path.is_dir():
                self._seen.add(identity)
                saved = _saved_dataset_files(path)
                for each in sorted(path.iterdir()):
                    if each.name.startswith("."):
                        self._skip(each, "hidden")
                    elif saved and each.is_file() and each.name not in saved:
                        self._skip(each, "no data of the saved dataset")
                    else:
                        self.add(each)
            elif path.is_file():
                self._seen.add(identity)
                self.paths.append(path)
            else:
                self._skip(path, "not a regular file")
        except OSError:
            if not path.is_symlink():
                raise
            self._skip(path, "broken link")

    def _skip(self, path: Path, reason: str) -> None:
        self.skipped.setdefault(reason, []).append(path.name)


def _find_files(given: str) -> _Finder:
    """Finds the files of known formats that a file name, folder or pattern means."""
    path, found = Path(given).expanduser(), _Finder()
    if path.is_file() and _format(path) is None:
        raise UserError(f"--dataset-path {given}: unknown format; expected {FORMAT_NAMES}")
    try:
        for each in [path] if path.exists() else _match(path):
            found.add(each)
    except OSError as error:
        raise UserError(f"{error.filename}: not readable: {error.strerror}") from None
    if not found.paths:
        what = "the folder has no file of a known format" if path.is_dir() else "no file of a known format matches"
        raise UserError(f"--dataset-path {given}: {what}: {FORMAT_NAMES}")
    return found


def _saved_dataset_files(folder: Path) -> set[str]:
    """Returns the names of the data files if `datasets.Dataset.save_to_disk` has written a folder; else none.

    Its json files hold no text, and its other arrow files are caches.

    Raises:
        UserError: the folder has several splits, which are not all to be trained on.
    """
    splits, state = folder / "dataset_dict.json", folder / "state.json"
    if splits.is_file() and any(folder.glob("*/state.json")):
        names = sorted(path.parent.name for path in folder.glob("*/state.json"))
        raise UserError(
            f"{folder} is a saved dataset with the splits {', '.join(names)}; name the folder of one, as "
            f"{folder / names[0]}"
        )
    if not state.is_file() or not any(folder.glob("*.arrow")):
        return set()
    try:
        return {str(file["filename"]) for file in json.loads(state.read_text(encoding="utf-8"))["_data_files"]}
    except (ValueError, KeyError, TypeError):  # a file of that name from another program
        return set()


def _match(pattern: Path) -> Iterator[Path]:
    """Yields what matches a pattern, in the order of the names.

    A part of it that exists is a name, even with brackets. `**` is any number of folders; each real folder is entered
    once, unlike by `glob`, so loops of links end.
    """
    yield from _match_parts(Path(), pattern.parts)


def _match_parts(folder: Path, parts: tuple[str, ...]) -> Iterator[Path]:
    if not parts:
        yield folder
    elif parts[0] == "**":
        for each in _folders(folder, set()) if parts[1:] else [folder]:
            yield from _match_parts(each, parts[1:])
    elif (folder / parts[0]).exists():
        yield from _match_parts(folder / parts[0], parts[1:])
    elif glob.has_magic(parts[0]) and folder.is_dir():
        for each in sorted(folder.iterdir()):
            is_shown = not each.name.startswith(".") or parts[0].startswith(".")
            if is_shown and fnmatch.fnmatchcase(each.name, parts[0]):
                yield from _match_parts(each, parts[1:])


def _folders(folder: Path, seen: set[tuple[int, int]]) -> Iterator[Path]:
    """Yields a folder and those below it except hidden ones, each real folder once."""
    stat = folder.stat()
    if (stat.st_dev, stat.st_ino) in seen:
        return
    seen.add((stat.st_dev, stat.st_ino))
    yield folder
    for each in sorted(folder.iterdir()):
        if each.is_dir() and not each.name.startswith("."):
            yield from _folders(each, seen)


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
        return Source(files=[], empty=[], num_bytes=0, fingerprint=_hash(identity), stamps={})
    raise UserError(
        f"--dataset-path {name}: no such file or folder on this machine, and no such dataset on the Hub ({reason})"
    )


def count_kinds(paths: list[Path]) -> dict[str, list]:
    """Returns, for each kind of file, [number of files, name of the first one]."""
    counts = Counter(map(kind_of, paths))
    return {kind: [counts[kind], next(p.name for p in paths if kind_of(p) == kind)] for kind in sorted(counts)}


def _format(path: Path) -> str | None:
    """Returns the format of a file by its suffix before .gz or .zst; None if it is unknown."""
    return FORMATS.get(kind_of(path).split(".")[1]) if "." in kind_of(path) else None


def _hash(identity: list) -> str:
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()
