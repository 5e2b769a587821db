"""Folders travel from one machine to others over the process group: in pieces, verified, continued after a cut.

What arrives is gathered in `.partial-<name>` beside the folder, which gets its name when each file has its sha256. In
a round, each receiver says how much of each file it holds, and the sender streams the rest to all that need it; the
rounds end when nobody needs anything. Of a file whose hash is wrong, a receiver holds nothing. Only the sender and its
receivers take part, with messages from point to point: other processes may do something else meanwhile.
"""

import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from forge_lib import disk
from forge_lib.errors import UserError

PIECE_BYTES = 1 << 20
PIECES_AHEAD = 4  # asked for at once, so that a piece need not wait for the way there and back
FLUSH_BYTES = 1 << 26  # a power cut costs no more than this, and the last fsync is short
ROUNDS = 3
LINE_SECONDS = 5.0
CALL_SECONDS = 0.25
MAX_FILES, MAX_BYTES = 10_000, 1 << 50
LIST_NAME = ".files.json"  # in the partial folder: what it shall become
# Nothing that Python would run or unpickle travels; of .bin files, the two of a token store.
SUFFIXES = {".json", ".jsonl", ".txt", ".md", ".jinja", ".safetensors", ".gguf", ".model", ".spm", ".bpe", ".tiktoken"}
STORE_FILES = {"tokens.bin", "documents.bin"}
HOLDS, CHECKS, REFUSES = range(3)  # first number of what a receiver says; then the bytes that it holds of each file

Files = dict[str, dict]
Progress = Callable[[str], None]


def list_files(folder: Path, known: Files | None = None) -> Files:
    """Returns what of a folder may travel: plain files of a known kind; no links, folders or dot files.

    Args:
        folder: a checkpoint, a token store or a model.
        known: files whose sha256 is known, as a manifest has them; where the size agrees, they are not read.

    Returns:
        {name: {"bytes": size, "sha256": 64 hexadecimal digits}}, sorted by name.
    """
    files = {}
    for path in sorted(folder.iterdir()):
        if path.is_file() and not path.is_symlink() and _may_travel(path.name):
            size, facts = path.stat().st_size, (known or {}).get(path.name)
            sha256 = facts["sha256"] if facts and facts["bytes"] == size else disk.sha256(path)
            files[path.name] = {"bytes": size, "sha256": sha256}
    return files


def check_files(files: Files) -> None:
    """Checks a list of files that a peer has sent.

    Raises:
        UserError: naming what must not be written here, or cannot be.
    """
    if not isinstance(files, dict) or len(files) > MAX_FILES:
        raise UserError(f"expected at most {MAX_FILES} files by name")
    total = 0
    for name, facts in files.items():
        if not isinstance(name, str) or not _may_travel(name):
            raise UserError(f"{name!r:.99} is no name of a file that may travel")
        size, sha256 = (facts.get("bytes"), facts.get("sha256")) if isinstance(facts, dict) else (None, None)
        if type(size) is not int or not 0 <= size <= MAX_BYTES:
            raise UserError(f"{name}: {size!r:.99} is no number of bytes")
        if not isinstance(sha256, str) or not re.fullmatch("[0-9a-f]{64}", sha256):
            raise UserError(f"{name}: {sha256!r:.99} is no sha256")
        if not size and sha256 != hashlib.sha256().hexdigest():
            raise UserError(f"{name}: no bytes, but not the sha256 of none")
        total += size
    if total > MAX_BYTES:
        raise UserError(f"{total} bytes in all, expected at most {MAX_BYTES}")


def send(
    folder: Path,
    files: Files,
    receivers: dict[int, str],
    group: dist.ProcessGroup | None = None,
    progress: Progress = lambda text: None,
) -> None:
    """Sends files to processes that call `receive`; returns when each has and has verified all of them.

    Args:
        folder: where the files lie.
        files: of `list_files`; the receivers have the same.
        receivers: rank -> host name.
        group: a gloo group; None for the default one.
        progress: is told, at most four times a second, how far it is.

    Raises:
        UserError: a file is not what `files` says or changes on the way, or a receiver refuses the files or never gets
            their hashes right; the other receivers have been served first, and the group can be used further.
        RuntimeError: a receiver is lost, or silent for longer than the group's time-out.
    """
    meter = _Meter(f"sending {folder.name} to {', '.join(receivers.values())}", files, progress)
    reader, mistakes = _Reader(folder, files), []
    for rounds_left in range(ROUNDS, -1, -1):
        needing = {}
        for rank, held in _hear(files, list(receivers), group).items():
            if held is None:
                mistakes.append(f"{receivers[rank]} refuses {folder.name}; its own message says why")
            elif missing := _missing(files, held):
                needing[rank] = held
                if not rounds_left:
                    mistakes.append(_wrong_hash(folder.name, missing, "this machine", receivers[rank]))
        if not needing or not rounds_left:
            break
        warned = _stream(reader, needing, group, meter)
        receivers = {rank: receivers[rank] for rank in needing if rank not in warned}
    if reader.mistake:
        mistakes.append(reader.mistake)
    if mistakes:
        raise UserError("\n".join(mistakes))


def receive(
    folder: Path,
    files: Files,
    sender: int,
    sender_host: str,
    group: dist.ProcessGroup | None = None,
    progress: Progress = lambda text: None,
) -> None:
    """Receives files from a process that calls `send`, and makes a folder of them: complete, or not there at all.

    What an earlier call has received of the same files is kept and not sent again; a folder that has the name already
    is replaced. A line on stderr says what comes, now and then how far it is, and at last how fast it was.

    Args:
        folder: what the files shall become.
        files: what the sender sends.
        sender: its rank.
        sender_host: its name, for messages.
        group: a gloo group; None for the default one.
        progress: is told, at most four times a second, how far it is.

    Raises:
        UserError: `files` is not to be trusted, the disk is too full or not to be written, or what comes has a wrong
            hash three times, or the sender's files have changed. The sender hears of it and the group can be used
            further, except where the disk fails in the middle: then end the process, and the sender sees it as lost.
        RuntimeError: the sender is lost, or silent for longer than the group's time-out; call again to continue.
    """
    what = f"{folder.name} from {sender_host}"
    meter = _Meter(f"receiving {what}", files, progress, lines=True)
    parts: dict[str, _Part] = {}

    def say(state: int) -> None:
        held = [part.held for part in parts.values()]
        dist.send(torch.tensor([state, *held, *[0] * (len(files) - len(held))], dtype=torch.int64), sender, group)

    def check(num_bytes: int) -> None:
        if meter.check(num_bytes):
            say(CHECKS)

    try:
        with _user_errors(folder):
            check_files(files)
            partial = _open_partial(folder, files, what)
            for name in sorted(files):
                parts[name] = _Part(partial / name, files[name], check)
    except UserError:
        say(REFUSES)
        raise
    meter.begin(sum(part.held for part in parts.values()))
    for rounds_left in range(ROUNDS, -1, -1):
        held = {name: part.held for name, part in parts.items()}
        missing = _missing(files, held)
        if missing:
            say(HOLDS)
        if not missing or not rounds_left:
            break
        with _user_errors(folder):
            _take(parts, _pieces(files, held), sender, what, group, meter)
    if missing:
        raise UserError(_wrong_hash(folder.name, missing, sender_host, "this machine"))
    try:
        with _user_errors(folder):
            (partial / LIST_NAME).unlink()
            disk.flush_all(partial)
            disk.place(folder)
    except UserError:
        say(REFUSES)
        raise
    say(HOLDS)
    meter.end(f"received {what}")


def _pieces(files: Files, held: dict[str, int]) -> Iterator[tuple[str, int, int]]:
    """Yields (file, first byte, bytes) of what is missing, in the order in which it travels."""
    for name in sorted(files):
        for start in range(held[name], files[name]["bytes"], PIECE_BYTES):
            yield name, start, min(PIECE_BYTES, files[name]["bytes"] - start)


def _missing(files: Files, held: dict[str, int]) -> list[str]:
    return [name for name in sorted(files) if held[name] < files[name]["bytes"]]


def _hear(files: Files, ranks: list[int], group: dist.ProcessGroup | None) -> dict[int, dict[str, int] | None]:
    """Returns what each receiver holds, None for one that refuses; waits while any of them is checking."""
    heard, silent = {}, ranks
    while silent:
        for rank in silent:  # in turn: one that checks for minutes must not let the others run into the time-out
            numbers = torch.empty(len(files) + 1, dtype=torch.int64)
            dist.recv(numbers, rank, group)
            state, *held = numbers.tolist()
            if state != CHECKS:
                valid = all(0 <= at <= files[name]["bytes"] for name, at in zip(sorted(files), held, strict=True))
                heard[rank] = dict(zip(sorted(files), held, strict=True)) if state == HOLDS and valid else None
        silent = [rank for rank in silent if rank not in heard]
    return heard


def _stream(
    reader: "_Reader", needing: dict[int, dict[str, int]], group: dist.ProcessGroup | None, meter: "_Meter"
) -> set[int]:
    """Sends each receiver what it lacks, what several lack to all of them at the same time.

    A piece has one byte more than its data: 1, or 0 where the sender's file has failed. A receiver gets as many of
    these as it has asked for ahead, so that nothing of this transfer is left in the way of the next.

    Returns:
        The ranks that were sent a 0.
    """
    least = {name: min(held[name] for held in needing.values()) for name in reader.files}
    meter.begin(sum(least.values()))
    free, under_way = deque(_buffers()), deque()
    zeros = dict.fromkeys(needing, 0)
    for name, start, size in _pieces(reader.files, least):
        ranks = [rank for rank, held in needing.items() if held[name] <= start and zeros[rank] < PIECES_AHEAD]
        if not ranks:
            continue
        if not free:
            free.append(_finish(under_way.popleft()))
        piece = free.popleft()
        piece[size] = reader.read(name, start, piece.numpy()[:size])
        under_way.append((piece, [dist.isend(piece[: size + 1], rank, group) for rank in ranks]))
        meter.add(size)
        if reader.mistake:
            for rank in ranks:
                zeros[rank] += 1
    while under_way:
        _finish(under_way.popleft())
    return {rank for rank, count in zeros.items() if count}


def _finish(under_way: tuple[torch.Tensor, list[dist.Work]]) -> torch.Tensor:
    """Waits until a piece has been sent to all, and returns its buffer."""
    piece, works = under_way
    for work in works:
        work.wait()
    return piece


def _take(
    parts: dict[str, "_Part"],
    pieces: Iterator[tuple[str, int, int]],
    sender: int,
    what: str,
    group: dist.ProcessGroup | None,
    meter: "_Meter",
) -> None:
    """Receives pieces and writes them down; the counterpart of _stream."""
    free, under_way = deque(_buffers()), deque()
    failed = ""
    while True:
        for name, start, size in islice(pieces, 0 if failed else len(free)):
            piece = free.popleft()
            under_way.append((name, start, size, piece, dist.irecv(piece[: size + 1], sender, group)))
        if not under_way:
            break
        name, start, size, piece, work = under_way.popleft()
        work.wait()
        if piece[size] and not failed:
            parts[name].write(start, piece.numpy()[:size])
            meter.add(size)
        else:
            failed = failed or name
        free.append(piece)
    if failed:
        raise UserError(f"{what}: {failed} has changed there while it was sent; start again to go on")


def _buffers() -> list[torch.Tensor]:
    return [torch.empty(PIECE_BYTES + 1, dtype=torch.uint8) for _ in range(PIECES_AHEAD)]


class _Reader:
    """Reads pieces of the files of a folder as long as they stay what they were; `mistake` says what is wrong."""

    def __init__(self, folder: Path, files: Files):
        self.folder, self.files, self.mistake = folder, files, ""
        self._found: dict[str, tuple] = {}  # file -> what identifies its content, as first seen

    def read(self, name: str, start: int, into: np.ndarray) -> bool:
        """Fills `into` with the bytes from `start` on; tells whether all has been right so far."""
        path, expected = self.folder / name, self.files[name]["bytes"]
        if self.mistake:
            return False
        try:
            with open(path, "rb") as file:
                file.seek(start)
                whole = file.readinto(into) == len(into)
                found = disk.stamp(file.fileno())
        except OSError as error:
            self.mistake = f"{path} cannot be read: {error.strerror}"
            return False
        if not whole or found[0] != expected or self._found.setdefault(name, found) != found:
            self.mistake = f"{path} has changed while it was sent: {found[0]} bytes, expected {expected}"
        return not self.mistake


class _Part:
    """A file that arrives from its start to its end, hashed on the way; it may have arrived in part already.

    Attributes:
        held: bytes that are here; all of them only where the hash is right.
    """

    def __init__(self, path: Path, facts: dict, check: Callable[[int], None]):
        self._path, self._size, self._sha256 = path, facts["bytes"], facts["sha256"]
        self.held, self._digest = 0, hashlib.sha256()
        with open(path, "ab") as file:
            if file.tell() != self._size:
                found = min(file.tell(), self._size)
                file.truncate(found - found % PIECE_BYTES)  # only whole pieces are trusted
        with open(path, "rb") as file:
            while block := file.read(PIECE_BYTES):
                self._add(block)
                check(len(block))

    def write(self, start: int, data: np.ndarray) -> None:
        with open(self._path, "r+b") as file:
            file.seek(start)
            file.write(data)
            if not (start + len(data)) % FLUSH_BYTES:
                file.flush()
                os.fsync(file.fileno())
        self._add(data)

    def _add(self, data: bytes | np.ndarray) -> None:
        self._digest.update(data)
        self.held += len(data)
        if self.held == self._size and self._digest.hexdigest() != self._sha256:
            self.held, self._digest = 0, hashlib.sha256()
            os.truncate(self._path, 0)


class _Meter:
    """Says how far a transfer is: to `progress` four times a second, on stderr (with `lines`) every few seconds."""

    def __init__(self, what: str, files: Files, progress: Progress, lines: bool = False):
        self._what, self._files, self._progress, self._lines = what, files, progress, lines
        self._begun = self._called = self._said = self._checked = time.monotonic()
        self._travelled = self._done = self._num_checked = 0

    def check(self, num_bytes: int) -> bool:
        """Counts bytes of an earlier call that were hashed; tells now and then that it is time to say so."""
        self._num_checked += num_bytes
        due = time.monotonic() - self._checked > LINE_SECONDS
        if due:
            self._checked = time.monotonic()
            self._progress(f"{self._what}: {_size(self._num_checked)} are here already and are checked")
        return due

    def begin(self, num_held: int) -> None:
        """A round begins; `num_held` bytes need not travel."""
        self._total, self._done = sum(facts["bytes"] for facts in self._files.values()), num_held
        self._begun = self._begun if self._travelled else time.monotonic()
        here = f", {_size(num_held)} of it are here already" if num_held else ""
        self._progress(f"{self._what}: {_size(self._total)}{here}")
        self._say(f"{self._what}: {_size(self._total)}{here}")

    def add(self, num_bytes: int) -> None:
        """Counts bytes that have travelled."""
        self._done, self._travelled = self._done + num_bytes, self._travelled + num_bytes
        now = time.monotonic()
        if now - self._called < CALL_SECONDS:
            return
        self._called = now
        rate = _size(self._travelled / (now - self._begun))
        text = f"{self._what}: {100 * self._done // self._total} % of {_size(self._total)}, {rate}/s"
        self._progress(text)
        if now - self._said >= LINE_SECONDS:
            self._say(text)

    def end(self, what: str) -> None:
        """All is there."""
        seconds = max(time.monotonic() - self._begun, 1e-3)
        self._say(f"{what}: {_size(self._travelled)} in {seconds:.1f} s, {_size(self._travelled / seconds)}/s")

    def _say(self, text: str) -> None:
        if self._lines:
            self._said = time.monotonic()
            print(text, file=sys.stderr, flush=True)


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e10 else f"{num_bytes / 1e6:.1f} MB"


def _may_travel(name: str) -> bool:
    """Tells whether a file of this name may be sent, and may be written in a folder here."""
    plain = name.isprintable() and not name.startswith(".") and not {"/", "\\"} & set(name)
    return plain and len(name.encode()) <= 200 and (name in STORE_FILES or Path(name).suffix.lower() in SUFFIXES)


def _open_partial(folder: Path, files: Files, what: str) -> Path:
    """Returns the folder where the files are gathered, with what is there of the very same files and nothing else."""
    partial = disk.partial_path(folder)
    try:
        same = not partial.is_symlink() and json.loads((partial / LIST_NAME).read_text(encoding="utf-8")) == files
    except (OSError, ValueError):
        same = False
    if not same:
        disk.remove(partial)
        partial.mkdir(parents=True)
        (partial / LIST_NAME).write_text(json.dumps(files), encoding="utf-8")
    needed = sum(facts["bytes"] for facts in files.values())
    for path in partial.iterdir():
        if path.is_symlink() or not path.is_file() or path.name not in {LIST_NAME, *files}:
            disk.remove(path)
        elif path.name in files:
            needed -= min(path.stat().st_size, files[path.name]["bytes"])
    free = shutil.disk_usage(partial).free
    if needed > free:
        raise UserError(f"{what} needs {needed} bytes, but {folder.parent} has {free} bytes free; make room there")
    return partial


def _wrong_hash(folder_name: str, missing: list[str], sender: str, receiver: str) -> str:
    return (
        f"{folder_name}: {', '.join(missing)} came {ROUNDS} times from {sender} to {receiver}, each time with a wrong "
        f"sha256: the file on {sender}, or a machine's memory, is damaged"
    )


@contextmanager
def _user_errors(folder: Path) -> Iterator[None]:
    """Names the file in an error of the disk under `folder`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename or folder}: {error.strerror}") from None
