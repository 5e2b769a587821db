"""Faults of disks: full, read-only, renamed or damaged, and data that changes during a run."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from commands import TINY, until
from disks import tmpfs
from rig import FAULTY, FLAGS, SLOW, STEPS, Rig
from run_folders import losses, rows, wait_for_step

from forge_lib.checkpoints.verify import verify


def steps_of(checkpoints: Path) -> list[int]:
    """Returns the steps of the checkpoints in a folder; each of them must be complete."""
    steps = sorted(int(path.name[5:]) for path in checkpoints.glob("step-*"))
    for step in steps:
        assert verify(checkpoints / f"step-{step:08d}") is None
    return steps


def test_the_main_machine_reports_checkpoints_that_another_machine_could_not_write(make_rig):
    rig = make_rig()
    rig.run_folder(2).mkdir(parents=True)
    (rig.run_folder(2) / "checkpoints").touch()
    ended = rig.finish(rig.start_all("--max-steps", 10, "--checkpoint-every", 5), 0, 0)
    failed = [row for row in rows(rig.run_folder(1), "error") if row["event"] == "checkpoint_failed"]
    assert [(row["step"], row["host"]) for row in failed] == [(5, rig.name(2)), (10, rig.name(2))]
    for row in failed:
        assert "File exists" in row["error"]
        assert f"the checkpoint of step {row['step']} was not written: {row['error']}" in ended[0].output


@contextmanager
def full_disk(folder: Path) -> Iterator[None]:
    """Fills the disk of a folder, and frees it at the end."""
    with open(folder / "filler", "wb") as filler, pytest.raises(OSError, match="No space"):
        while True:
            filler.write(bytes(1 << 16))
            filler.flush()
    yield
    (folder / "filler").unlink()


@contextmanager
def read_only_disk(folder: Path, checkpoints: Path) -> Iterator[None]:
    """Makes a disk read-only, or, where files are open for writing, its checkpoint folder alone."""
    subprocess.run(["mount", "-o", "remount,ro", folder], check=False)
    (mount,) = (line for line in Path("/proc/mounts").read_text().splitlines() if str(folder) in line)
    is_read_only = "ro," in mount
    if not is_read_only:
        subprocess.run(["mount", "--bind", checkpoints, checkpoints], check=True)
        subprocess.run(["mount", "-o", "remount,ro,bind", checkpoints], check=True)
    yield
    if not is_read_only:
        subprocess.run(["umount", checkpoints], check=True)
    subprocess.run(["mount", "-o", "remount,rw", folder], check=True)


@pytest.mark.netns
@pytest.mark.faults
@pytest.mark.parametrize("n", [1, 2])
def test_a_full_or_read_only_disk_costs_only_the_checkpoints_of_that_time(make_rig, hosts, table, undisturbed, n):
    """| The disk is full or read-only during a save | The run reports it, continues, and saves again next time | |

    One fault after the other on machine n, with a usable disk in between.
    """
    rig = make_rig(hosts(2))
    folder = rig.run_folder(n)
    checkpoints = folder / "checkpoints"
    with tmpfs(folder, "100m"):
        limits = [{"do": "limit", "at": "computing", "step": 32, "rank": n - 1, "bytes": 1_000_000}]
        limits += [{"do": "limit", "at": "computing", "step": 37, "rank": n - 1}]
        flags = ["--timeout-seconds", 20, "--max-steps", 45]
        running = rig.start_all(*flags, faults=[{**SLOW, "seconds": 0.4}, *limits])
        wait_for_step(folder, 6)
        until(lambda: steps_of(checkpoints) == [5], 5, "the first checkpoint")
        with full_disk(folder):
            wait_for_step(folder, 12)
            assert steps_of(checkpoints) == [5], "full disk"
        wait_for_step(folder, 17)
        assert steps_of(checkpoints) == [5, 15], "space again"
        with read_only_disk(folder, checkpoints):
            wait_for_step(folder, 22)
            assert steps_of(checkpoints) == [5, 15], "read-only"
        wait_for_step(folder, 24)
        checkpoints.rename(folder / "moved")
        wait_for_step(folder, 27)
        assert steps_of(checkpoints) == [25], "the folder is gone: the run makes it again"
        wait_for_step(folder, 36)
        assert steps_of(checkpoints) == [25, 30], "a file may have at most a megabyte"
        ended = rig.finish(running, 0, 0)
        assert steps_of(checkpoints) == [30, 40, 45]
        failed = [row for row in rows(rig.run_folder(1), "error") if row["event"] == "checkpoint_failed"]
        assert {20, 35} <= {row["step"] for row in failed} and {row["host"] for row in failed} == {rig.name(n)}
        for step in (10, 20, 35):
            for output in (ended[0].output, ended[n - 1].output):
                assert f"{rig.name(n)}: the checkpoint of step {step} was not written: " in output
        rig.check(undisturbed(45))
    for fault in ("full disk", "read-only disk", "checkpoint folder renamed", "file-size limit"):
        table.add(f"{fault} on machine {n}", "training continues, older ones complete, next save succeeds")


def remove_first_and_damage_second(rig: Rig) -> None:
    """Removes the run folder of machine 1, and flips a bit of the newest checkpoint of machine 2."""
    shutil.rmtree(rig.run_folder(1))
    path = rig.newest_checkpoint(2) / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) * 6 // 10] ^= 1
    path.write_bytes(content)


@pytest.mark.netns
@pytest.mark.faults
@pytest.mark.timeout(400)
def test_a_run_continues_from_the_newest_undamaged_checkpoint_of_any_machine(
    make_rig, hosts, table, tmp_path, undisturbed
):
    """| A checkpoint is damaged, incomplete, or of another run | The run names it and uses another one | |

    Of three machines: the main machine's folder is gone, the newest of the second is damaged.
    """
    rig = make_rig(hosts(3), num_machines=3)
    running = rig.start_all("--timeout-seconds", 20, faults=[SLOW])
    wait_for_step(rig.run_folder(2), 17)
    (rig.run_folder(3) / "stop").touch()
    rig.finish(running, 0, 0, 0)
    rig.check(None)
    newest = rig.newest_checkpoint(1).name
    older = sorted(path.name for path in (rig.run_folder(3) / "checkpoints").glob("step-*"))[-2]
    copy = tmp_path.with_name(f"{tmp_path.name}_copy")
    shutil.copytree(tmp_path, copy)

    # The newest checkpoint is complete only on machine 3.
    remove_first_and_damage_second(rig)
    ended = rig.finish(rig.start_all("--timeout-seconds", 20), 0, 0, 0)
    assert f"machine2: checkpoint {newest} is skipped: model.safetensors is damaged" in ended[0].output
    assert f"resuming after step {int(newest[5:])}" in ended[0].output
    rig.check(undisturbed(num_processes=3))
    table.add("main's folder gone, another's newest damaged", "newest received from the third, bit for bit")

    # The newest one is complete only on machine 1, which is away; machine 3 has an older one and is the main machine.
    for n in (1, 2, 3):
        shutil.rmtree(rig.run_folder(n))
        shutil.copytree(copy / f"machine{n}", rig.run_folder(n))
    remove_first_and_damage_second(rig)
    shutil.rmtree(rig.newest_checkpoint(3))
    places = {3: 0, 2: 1}  # machine -> rank
    running = [rig.start_machine(n, rank=rank, num_machines=2, main=3) for n, rank in places.items()]
    ended = rig.finish(running, 0, 0)
    assert f"machine2: checkpoint {newest} is skipped" in ended[0].output
    assert f"resuming after step {int(older[5:])}" in ended[0].output
    rig.check_no_process_remains()
    expected = losses(undisturbed(num_processes=3))[int(older[5:]) :]
    assert losses(rig.run_folder(3)) == pytest.approx(expected, rel=1e-4)
    table.add("the same, two of three with another main machine", "older one used, losses within 1e-4")


@pytest.mark.faults
def test_a_token_store_that_changes_during_a_run_is_named(start, run, tmp_path, table):
    words = [sys.executable, "scripts/prepare_data.py", *TINY, "--output-dir", tmp_path / "store"]
    prepared = run(words)
    assert prepared.code == 0, prepared.output
    flags = [*FLAGS, "--dataset-path", tmp_path / "store", "--max-steps", STEPS, "--output-dir", tmp_path / "run"]
    faults = json.dumps([SLOW])
    running = start([sys.executable, FAULTY, "p2p-llm-forge", *flags], prefix=["env", f"FAULTS={faults}"])
    wait_for_step(tmp_path / "run", 4)
    tokens = tmp_path / "store" / "tokens.bin"
    with open(tokens, "r+b") as file:
        file.truncate(tokens.stat().st_size // 2)
    begun = time.monotonic()
    ended = running.finish(30)
    table.add("token store truncated during a run", f"exit {ended.code}", time.monotonic() - begun)
    assert ended.code == 2, ended.output
    assert "tokens.bin" in ended.output
