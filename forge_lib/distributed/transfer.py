"""Copies a folder from one machine to others over the process group: in pieces, verified, resumable after a failure.

A receiver collects the files in `.partial-NAME` beside the folder, which is renamed once every file has its sha256. In
each round, every receiver reports how many bytes of each file it holds, and the sender streams the rest to all that
lack it, until nothing is missing. A file with a wrong hash counts as not held. Only the sender and its receivers
take part, with point-to-point messages: other processes can do something else meanwhile.
"""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist

from forge_lib.distributed.transfer_files import (
    PIECE_BYTES,
    FileReader,
    Files,
    PartialFile,
    check_files,
    open_partial_folder,
    place_partial_folder,
    total_bytes,
)
from forge_lib.distributed.transfer_progress import Progress, ProgressMeter
from forge_lib.errors import UserError, disk_errors_as_user_errors

PIECES_AHEAD = 4  # requested ahead, so that no piece waits for a round trip
ROUNDS = 3
# A receiver's report is an int64 tensor: one of these states, then the bytes that it holds of each file.
HOLDS, HASHING, REFUSES = range(3)


def send(
    folder: Path,
    files: Files,
    receivers: dict[int, str],
    group: dist.ProcessGroup | None = None,
    progress: Progress = lambda text: None,
) -> None:
    """Sends files to processes that call `receive`; returns when each has verified all of them.

    Args:
        folder: contains the files.
        files: from `list_files`; the receivers have the same.
        receivers: host names by rank.
        group: a gloo group; None for the default one.
        progress: receives a text about the progress, at most four times a second.

    Raises:
        UserError: a file differs from `files` or changes meanwhile, or a receiver refuses the files or never gets the
            right hashes. The other receivers get their files first, and the group remains usable.
        RuntimeError: a receiver is lost, or silent for longer than the group's timeout.
    """
    meter = ProgressMeter(f"sending {folder.name} to {', '.join(receivers.values())}", progress)
    reader, errors = FileReader(folder, files), []
    for rounds_left in range(ROUNDS, -1, -1):
        lacking: dict[int, dict[str, int]] = {}
        for rank, held in _receive_reports(files, list(receivers), group).items():
            if held is None:
                errors.append(f"{receivers[rank]} refuses {folder.name}; its own message gives the reason")
            elif missing := _find_missing(files, held):
                lacking[rank] = held
                if not rounds_left:
                    errors.append(_describe_wrong_hash(folder.name, missing, "this machine", receivers[rank]))
        if not lacking or not rounds_left:
            break
        informed = _send_pieces(reader, lacking, group, meter)
        receivers = {rank: receivers[rank] for rank in lacking if rank not in informed}
    if reader.error:
        errors.append(reader.error)
    if errors:
        raise UserError("\n".join(errors))


def _receive_reports(
    files: Files, ranks: list[int], group: dist.ProcessGroup | None
) -> dict[int, dict[str, int] | None]:
    """Returns the bytes that each receiver holds of each file, or None if it refuses; waits while any is hashing."""
    reports: dict[int, dict[str, int] | None] = {}
    names = sorted(files)
    while ranks:
        for rank in ranks:  # in turn: one that hashes for minutes must not make the others time out
            numbers = torch.empty(len(files) + 1, dtype=torch.int64)
            dist.recv(numbers, rank, group)
            state, *held = numbers.tolist()
            if state != HASHING:
                is_valid = all(0 <= count <= files[name]["bytes"] for name, count in zip(names, held, strict=True))
                reports[rank] = dict(zip(names, held, strict=True)) if state == HOLDS and is_valid else None
        ranks = [rank for rank in ranks if rank not in reports]
    return reports


def _send_pieces(
    reader: FileReader, lacking: dict[int, dict[str, int]], group: dist.ProcessGroup | None, meter: ProgressMeter
) -> set[int]:
    """Sends each receiver the pieces that it lacks; a piece that several lack is read once.

    After its data, a piece has one byte: 1, or 0 if the sender's file failed. After a failure, a receiver gets as many
    pieces as it has requested ahead and no more, so that none of them is mistaken for a piece of the next transfer.

    Returns:
        The ranks that were informed of a failure.
    """
    least = {name: min(held[name] for held in lacking.values()) for name in reader.files}
    meter.start_round(total_bytes(reader.files), sum(least.values()))
    free, pending = deque(_make_buffers()), deque()
    num_failures = dict.fromkeys(lacking, 0)
    for name, start, size in _pieces(reader.files, least):
        ranks = [rank for rank, held in lacking.items() if held[name] <= start and num_failures[rank] < PIECES_AHEAD]
        if not ranks:
            continue
        if not free:
            free.append(_wait_for_send(*pending.popleft()))
        piece = free.popleft()
        piece[size] = reader.read(name, start, piece.numpy()[:size])
        pending.append((piece, [dist.isend(piece[: size + 1], rank, group) for rank in ranks]))
        meter.add(size)
        if reader.error:
            for rank in ranks:
                num_failures[rank] += 1
    while pending:
        _wait_for_send(*pending.popleft())
    return {rank for rank, count in num_failures.items() if count}


def _wait_for_send(piece: torch.Tensor, works: list[dist.Work]) -> torch.Tensor:
    """Waits until a piece has been sent to all, and returns its buffer."""
    for work in works:
        work.wait()
    return piece


def receive(
    folder: Path,
    files: Files,
    sender: int,
    sender_host: str,
    group: dist.ProcessGroup | None = None,
    progress: Progress = lambda text: None,
) -> None:
    """Receives files from a process that calls `send`, and creates a folder with them: complete, or not at all.

    It keeps what an earlier call received of the same files, and replaces an existing folder. Lines on stderr give the
    size, the progress and finally the rate.

    Args:
        folder: path of the new folder.
        files: what the sender sends.
        sender: its rank.
        sender_host: its name, for messages.
        group: a gloo group; None for the default one.
        progress: receives a text about the progress, at most four times a second.

    Raises:
        UserError: `files` is not valid, the disk is too full or fails, the hashes are wrong three times, or the
            sender's files have changed. The sender is informed and the group remains usable, except if the disk fails
            while pieces arrive: then end the process, and the sender sees it as lost.
        RuntimeError: the sender is lost, or silent for longer than the group's timeout; call again to continue.
    """
    receiver = _Receiver(folder, files, sender, sender_host, group, progress)
    receiver.open()
    missing = receiver.receive_rounds()
    if missing:
        raise UserError(_describe_wrong_hash(folder.name, missing, sender_host, "this machine"))
    receiver.finish()


class _Receiver:
    """The receiving side of one transfer; call its methods in the order of their definition."""

    def __init__(
        self,
        folder: Path,
        files: Files,
        sender: int,
        sender_host: str,
        group: dist.ProcessGroup | None,
        progress: Progress,
    ):
        self.folder, self.files, self.sender, self.group = folder, files, sender, group
        self.host, self.what = sender_host, f"{folder.name} from {sender_host}"
        self.meter = ProgressMeter(f"receiving {self.what}", progress, to_stderr=True)
        self.parts: dict[str, PartialFile] = {}

    def open(self) -> None:
        """Checks the list of files, opens the partial folder, and hashes what an earlier transfer left there."""
        with self._refusing_on_error():
            check_files(self.files)
            partial = open_partial_folder(self.folder, self.files, self.what)
            for name in sorted(self.files):
                self.parts[name] = PartialFile(partial / name, self.files[name], self._on_hashed)

    def receive_rounds(self) -> list[str]:
        """Receives what is missing; returns the files that still have a wrong hash after three rounds."""
        self.meter.start_round(total_bytes(self.files), sum(part.num_held for part in self.parts.values()))
        for rounds_left in range(ROUNDS, -1, -1):
            held = {name: part.num_held for name, part in self.parts.items()}
            missing = _find_missing(self.files, held)
            if missing:
                self._report(HOLDS)
            if not missing or not rounds_left:
                break
            with disk_errors_as_user_errors(self.folder):
                self._receive_pieces(_pieces(self.files, held))
        return missing

    def finish(self) -> None:
        """Renames the complete folder, and reports it."""
        with self._refusing_on_error():
            place_partial_folder(self.folder)
        self._report(HOLDS)
        self.meter.end(f"received {self.what}")

    def _report(self, state: int) -> None:
        held = [part.num_held for part in self.parts.values()]
        numbers = [state, *held, *[0] * (len(self.files) - len(held))]
        dist.send(torch.tensor(numbers, dtype=torch.int64), self.sender, self.group)

    def _on_hashed(self, num_bytes: int) -> None:
        if self.meter.add_hashed(num_bytes):
            self._report(HASHING)  # so that the sender does not time out

    @contextmanager
    def _refusing_on_error(self) -> Iterator[None]:
        """Reports to the sender that this machine refuses the files, if a UserError or an OSError is raised inside."""
        try:
            with disk_errors_as_user_errors(self.folder):
                yield
        except UserError:
            self._report(REFUSES)
            raise

    def _receive_pieces(self, pieces: Iterator[tuple[str, int, int]]) -> None:
        """Receives pieces and writes them; the counterpart of _send_pieces."""
        free, pending = deque(_make_buffers()), deque()
        failed = ""
        while True:
            for name, start, size in islice(pieces, 0 if failed else len(free)):
                piece = free.popleft()
                pending.append((name, start, size, piece, dist.irecv(piece[: size + 1], self.sender, self.group)))
            if not pending:
                break
            name, start, size, piece, work = pending.popleft()
            work.wait()
            if piece[size] and not failed:
                self.parts[name].write(start, piece.numpy()[:size])
                self.meter.add(size)
            else:
                failed = failed or name
            free.append(piece)
        if failed:
            raise UserError(f"{self.what}: {failed} changed on {self.host} while it was sent; start again")


def _pieces(files: Files, held: dict[str, int]) -> Iterator[tuple[str, int, int]]:
    """Yields (file, first byte, number of bytes) of each missing piece, in the order in which they are sent."""
    for name in sorted(files):
        for start in range(held[name], files[name]["bytes"], PIECE_BYTES):
            yield name, start, min(PIECE_BYTES, files[name]["bytes"] - start)


def _find_missing(files: Files, held: dict[str, int]) -> list[str]:
    return [name for name in sorted(files) if held[name] < files[name]["bytes"]]


def _make_buffers() -> list[torch.Tensor]:
    return [torch.empty(PIECE_BYTES + 1, dtype=torch.uint8) for _ in range(PIECES_AHEAD)]


def _describe_wrong_hash(folder_name: str, missing: list[str], sender: str, receiver: str) -> str:
    return (
        f"{folder_name}: {', '.join(missing)} arrived {ROUNDS} times from {sender} on {receiver}, each time with a "
        f"wrong sha256; the file on {sender} or the memory of a machine is damaged"
    )
