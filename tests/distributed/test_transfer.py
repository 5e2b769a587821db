"""Transfers of folders between processes: real gloo groups on this machine, and one over a link that is cut."""

import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from commands import ROOT
from hypothesis import given
from hypothesis import strategies as st

from forge_lib.disk import LIST_NAME
from forge_lib.distributed import transfer, transfer_progress
from forge_lib.distributed.transfer_files import FileReader, Files, check_files, list_files
from forge_lib.distributed.transfer_progress import ProgressMeter
from forge_lib.errors import UserError

HASH = hashlib.sha256(b"x").hexdigest()
HOSTS = ["alder", "birch", "cedar"]


def write(folder: Path, sizes: dict[str, int]) -> Files:
    """Writes files of random bytes; returns their facts."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, size in sizes.items():
        (folder / name).write_bytes(os.urandom(size))
    return list_files(folder)


def run_process(
    rank: int, world: int, base: Path, source: Path, files: Files, patch: Callable[[int], None] | None
) -> None:
    """Rank 0 sends, the others receive into their own folders; the result is written to <rank>.json."""
    log = os.open(base / f"{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 2)
    sys.stderr = os.fdopen(2, "w", closefd=False)
    torch.set_num_threads(1)
    store = dist.FileStore(str(base / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=20))
    transferred, isend = {}, dist.isend

    def counting(tensor: torch.Tensor, to: int, group: dist.ProcessGroup | None) -> dist.Work:
        transferred[to] = transferred.get(to, 0) + len(tensor) - 1
        return isend(tensor, to, group)

    dist.isend = counting
    if patch:
        patch(rank)
    error = ""
    try:
        if rank == 0:
            transfer.send(source, files, {r: HOSTS[r] for r in range(1, world)})
        else:
            transfer.receive(base / HOSTS[rank] / "folder", files, 0, HOSTS[0])
    except (UserError, RuntimeError) as caught:
        error = f"{type(caught).__name__}: {caught}"
    (base / f"{rank}.json").write_text(json.dumps({"error": error, "transferred": transferred}))


@pytest.fixture
def exchange(tmp_path):
    """Runs a transfer; returns for each rank (error, bytes that it sent by receiver)."""

    def exchange(
        source: Path, files: Files, world: int = 2, patch: Callable[[int], None] | None = None
    ) -> list[tuple[str, dict[int, int]]]:
        for name in ("store", *(f"{rank}.json" for rank in range(world))):
            (tmp_path / name).unlink(missing_ok=True)
        fork = multiprocessing.get_context("fork")
        ranks = [
            fork.Process(target=run_process, args=(rank, world, tmp_path, source, files, patch))
            for rank in range(world)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(60)
            assert process.exitcode is not None
        found = []
        for rank in range(world):
            path = tmp_path / f"{rank}.json"
            facts = json.loads(path.read_text()) if path.exists() else {"error": "killed", "transferred": {}}
            found.append((facts["error"], {int(to): count for to, count in facts["transferred"].items()}))
        return found

    return exchange


def names(folder: Path) -> list[str]:
    """Returns the names of everything in a folder, dot files included."""
    return sorted(path.name for path in folder.iterdir())


def hold(tmp_path: Path, host: str, source: Path, files: Files, sizes: dict[str, int]) -> Path:
    """Creates the partial folder that a killed process leaves, with the first bytes of some files."""
    partial = tmp_path / host / ".partial-folder"
    partial.mkdir(parents=True)
    (partial / LIST_NAME).write_text(json.dumps(files))
    for name, size in sizes.items():
        (partial / name).write_bytes((source / name).read_bytes()[:size])
    return partial


def test_a_folder_replaces_a_damaged_one_with_empty_files_but_without_the_kinds_that_are_not_sent(tmp_path, exchange):
    source, target = tmp_path / "source", tmp_path / "birch" / "folder"
    write(source, {"a.json": 10, "empty.txt": 0, "model.safetensors": 5_000_001, "tokens.bin": 2 << 20})
    write(source, {"code.py": 9, "pytorch_model.bin": 9, "x.pkl": 9, "x.pt": 9, ".hidden.json": 9})
    write(source / "inner", {"b.json": 9})
    (source / "link.json").symlink_to(source / "a.json")
    files = list_files(source)
    assert list(files) == ["a.json", "empty.txt", "model.safetensors", "tokens.bin"]
    write(target, {"model.safetensors": 7, "old.txt": 7})
    assert exchange(source, files) == [("", {1: sum(facts["bytes"] for facts in files.values())}), ("", {})]
    assert list_files(target) == files
    assert names(target) == sorted(files)
    assert names(target.parent) == ["folder"]
    first, last = (tmp_path / "1.log").read_text().splitlines()
    assert first == "receiving folder from alder: 7.1 MB"
    assert re.fullmatch(r"received folder from alder: 7\.1 MB in \d+\.\d s, \d+\.\d MB/s", last)


def test_an_empty_folder_is_received(tmp_path, exchange):
    (tmp_path / "source").mkdir()
    assert exchange(tmp_path / "source", {}) == [("", {}), ("", {})]
    assert names(tmp_path / "birch" / "folder") == []


def test_each_of_two_receivers_gets_only_what_it_lacks(tmp_path, exchange):
    source = tmp_path / "source"
    files = write(source, {"a.txt": 3 << 20, "b.txt": (6 << 20) + 5})
    hold(
        tmp_path, "birch", source, files, {"a.txt": 3 << 20, "b.txt": (2 << 20) + 77}
    )  # 77 bytes are not a whole piece
    hold(
        tmp_path, "cedar", source, files | {"c.txt": {"bytes": 1, "sha256": HASH}}, {"a.txt": 3 << 20}
    )  # of another list

    def report_each_piece(rank: int) -> None:
        transfer_progress.LINE_SECONDS = -1  # the receiver reports HASHING after each piece that it hashes

    sender, *receivers = exchange(source, files, world=3, patch=report_each_piece)
    assert sender == ("", {1: (4 << 20) + 5, 2: (9 << 20) + 5})
    assert receivers == [("", {}), ("", {})]
    for host in HOSTS[1:]:
        assert list_files(tmp_path / host / "folder") == files


@pytest.mark.parametrize("held", [2 << 20, (3 << 20) + 9], ids=["in part", "whole"])
def test_a_held_file_with_a_flipped_bit_is_sent_again_from_the_start(tmp_path, exchange, held):
    source, size = tmp_path / "source", (3 << 20) + 9
    files = write(source, {"a.txt": 100, "b.txt": size})
    partial = hold(tmp_path, "birch", source, files, {"b.txt": held})
    data = bytearray((partial / "b.txt").read_bytes())
    data[1 << 20] ^= 1
    (partial / "b.txt").write_bytes(data)
    assert exchange(source, files) == [("", {1: 100 + size - held + size}), ("", {})]
    assert list_files(tmp_path / "birch" / "folder") == files


def test_a_receiver_that_was_killed_continues_where_it_was(tmp_path, exchange):
    source = tmp_path / "source"
    files = write(source, {"a.txt": 30 << 20})

    def killed_after_ten_pieces(rank: int) -> None:
        pieces, add = iter(range(10)), ProgressMeter.add
        ProgressMeter.add = lambda meter, num_bytes: (
            os.kill(os.getpid(), signal.SIGKILL) if rank and next(pieces, None) is None else add(meter, num_bytes)
        )

    (lost, _), (killed, _) = exchange(source, files, patch=killed_after_ten_pieces)
    assert killed == "killed"
    assert lost.startswith("RuntimeError")
    assert names(tmp_path / "birch") == [".partial-folder"]
    assert exchange(source, files) == [("", {1: 19 << 20}), ("", {})]  # the eleventh piece was written
    assert list_files(tmp_path / "birch" / "folder") == files
    assert "receiving folder from alder: 31.5 MB, 11.5 MB of it already here" in (tmp_path / "1.log").read_text()


@pytest.mark.parametrize("last", [0, 1])
def test_a_folder_whose_receiver_is_killed_during_the_rename_is_complete_or_does_not_exist(tmp_path, exchange, last):
    source, parent = tmp_path / "source", tmp_path / "birch"
    files = write(source, {"a.txt": 1000})
    write(parent / "folder", {"a.txt": 7, "old.txt": 7})

    def killed(rank: int) -> None:
        renames, rename = iter(range(last)), Path.rename
        Path.rename = lambda path, to: (
            os.kill(os.getpid(), signal.SIGKILL) if next(renames, None) is None else rename(path, to)
        )

    assert exchange(source, files, patch=killed)[1][0] == "killed"
    assert names(parent) == [".partial-folder", [".replaced-folder", "folder"][last == 0]]
    assert exchange(source, files)[1] == ("", {})
    assert names(parent) == ["folder"]
    assert list_files(parent / "folder") == files


def test_a_file_with_a_wrong_hash_is_named_on_both_sides_after_three_rounds(tmp_path, exchange):
    source = tmp_path / "source"
    files = write(source, {"a.txt": 1000, "b.txt": 1000})
    files["b.txt"]["sha256"] = HASH
    (sending, transferred), (receiving, _) = exchange(source, files)
    assert transferred == {1: 4000}
    assert "folder: b.txt arrived 3 times from alder on this machine, each time with a wrong sha256" in receiving
    assert "source: b.txt arrived 3 times from this machine on birch" in sending
    assert not (tmp_path / "birch" / "folder").exists()


@pytest.mark.parametrize("how", ["truncated", "touched", "removed"])
def test_a_file_that_changes_meanwhile_is_named_and_the_group_remains_usable(tmp_path, exchange, how):
    source = tmp_path / "source"
    files = write(source, {"a.txt": 1 << 20, "b.txt": 20 << 20})
    hold(tmp_path, "cedar", source, files, {"b.txt": 17 << 20})

    def change_the_file(rank: int) -> None:
        reads, read = iter(range(100)), FileReader.read

        def reading(reader, name: str, start: int, into) -> bool:
            if next(reads) == 8:
                path = source / "b.txt"
                if how == "truncated":
                    os.truncate(path, 5)
                elif how == "touched":
                    os.utime(path)
                else:
                    path.unlink()
            return read(reader, name, start, into)

        FileReader.read = reading
        original = transfer.send if rank == 0 else transfer.receive

        def and_then(*args) -> None:
            try:
                original(*args)
            finally:
                number = torch.tensor([42])
                for receiver in (1, 2) if rank == 0 else ():
                    dist.send(number, receiver)
                if rank:
                    number.zero_()
                    dist.recv(number, 0)
                assert number.item() == 42

        setattr(transfer, "send" if rank == 0 else "receive", and_then)

    sender, *receivers = [error for error, _ in exchange(source, files, world=3, patch=change_the_file)]
    assert re.match(r"UserError: .*b\.txt (changed while it was sent|cannot be read)", sender)
    assert receivers == ["UserError: folder from alder: b.txt changed on alder while it was sent; start again"] * 2


def test_a_full_disk_is_noticed_before_anything_is_sent_and_the_other_receiver_is_served(tmp_path, exchange):
    source = tmp_path / "source"
    files = write(source, {"a.txt": 1 << 20})

    def fill(rank: int) -> None:
        if rank == 1:
            shutil.disk_usage = lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 77, 77)

    (sending, transferred), (full, _), (served, _) = exchange(source, files, world=3, patch=fill)
    here = tmp_path / "birch"
    assert (
        full
        == f"UserError: folder from alder needs 1048576 bytes, but {here} has 77 bytes free; free some space there"
    )
    assert sending == "UserError: birch refuses source; its own message gives the reason"
    assert (served, transferred) == ("", {2: 1 << 20})


@given(name=st.text(min_size=1) | st.from_regex(r"\A(\.\.|/|\\|[a-z.~]){1,6}(\.json|\.py|\.bin)?\Z"))
def test_only_plain_file_names_of_known_kinds_are_accepted(name):
    try:
        check_files({name: {"bytes": 1, "sha256": HASH}})
    except UserError:
        return
    path = Path("/somewhere") / name
    assert Path(os.path.normpath(path)).parent == Path("/somewhere")
    assert not name.startswith(".")
    assert path.suffix.lower() not in {".py", ".pkl", ".pt", ".so", ".sh", ".zip", ".bin"} or name == "tokens.bin"


@pytest.mark.parametrize("name", ["../a.json", "/a.json", "a/b.json", "a\\b.json", "..", ".a.json", "", "a\n.json"])
def test_a_name_outside_the_folder_is_refused_and_nothing_is_written(tmp_path, exchange, name):
    files = write(tmp_path / "source", {"a.json": 10})
    with pytest.raises(UserError, match="is not a file name that may be transferred"):
        check_files(files | {name: {"bytes": 1, "sha256": HASH}})
    if name == "../a.json":
        (sending, _), (receiving, _) = exchange(tmp_path / "source", files | {name: {"bytes": 1, "sha256": HASH}})
        assert "birch refuses" in sending
        assert "is not a file name" in receiving
        assert not (tmp_path / "birch").exists()


@pytest.mark.parametrize(
    "facts",
    [
        {"bytes": -1, "sha256": HASH},
        {"bytes": True, "sha256": HASH},
        {"bytes": 1.0, "sha256": HASH},
        {"bytes": 1 << 51, "sha256": HASH},
        {"bytes": "1", "sha256": HASH},
        {"bytes": 0, "sha256": HASH},
        {"bytes": 1, "sha256": HASH.upper()},
        {"bytes": 1, "sha256": HASH + "\n"},
        {"bytes": 1},
        [1, HASH],
        None,
    ],
)
def test_an_invalid_size_or_hash_is_refused(facts):
    with pytest.raises(UserError, match=r"a\.json: "):
        check_files({"a.json": facts})


PEER = """
import json, sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
import torch.distributed as dist
from forge_lib.distributed import transfer
rank, source, target = int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
files = json.loads(sys.argv[4])
dist.init_process_group("gloo", init_method="tcp://10.77.0.1:29533", rank=rank, world_size=2,
                        timeout=timedelta(seconds=60))
if rank == 0:
    transfer.send(source, files, {1: "birch"})
else:
    transfer.receive(target, files, 0, "alder")
"""


@pytest.mark.netns
@pytest.mark.faults
def test_a_transfer_survives_a_link_that_is_cut_for_ten_seconds(tmp_path, hosts, start):
    source, target = tmp_path / "source", tmp_path / "birch" / "folder"
    files = write(source, {"a.txt": 10 << 20, "b.txt": 10 << 20})
    machines = hosts(2)
    shape = "tc qdisc replace dev e0 root tbf rate 16mbit burst 64kb latency 200ms"
    subprocess.run([*machines.on(1), *shape.split()], check=True)
    peers = [
        start(
            ["env", "GLOO_SOCKET_IFNAME=e0", sys.executable, "-c", PEER, rank, source, target, json.dumps(files)],
            prefix=machines.on(rank + 1),
            cwd=ROOT,
        )
        for rank in range(2)
    ]
    part = target.with_name(".partial-folder") / "a.txt"
    until = time.monotonic() + 60
    while not (part.exists() and part.stat().st_size > 4 << 20):
        assert time.monotonic() < until
        time.sleep(0.1)
    subprocess.run([*machines.on(0), "ip", "link", "set", "v2", "down"], check=True)
    time.sleep(10)
    held = part.stat().st_size
    subprocess.run([*machines.on(0), "ip", "link", "set", "v2", "up"], check=True)
    assert held < 10 << 20
    ended = [peer.finish(120) for peer in peers]
    assert [each.code for each in ended] == [0, 0], [each.output for each in ended]
    assert list_files(target) == files
    assert ended[1].seconds > 20
    assert "receiving folder from alder: " in ended[1].output
    assert re.search(r"receiving folder from alder: \d+ % of 21\.0 MB, \d\.\d MB/s", ended[1].output)
