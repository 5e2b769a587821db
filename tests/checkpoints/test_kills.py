"""A process that is killed during a save loses no complete checkpoint."""

import itertools
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from checkpoint_helpers import FILES, RUN, find, fork, load, names, number, trained_model, untrained_model, write

from forge_lib.checkpoints import format as checkpoint
from forge_lib.checkpoints import restore
from forge_lib.checkpoints.retention import sweep
from forge_lib.checkpoints.saver import Saver
from forge_lib.checkpoints.verify import verify


@pytest.fixture
def memory_folder(tmp_path) -> Iterator[Path]:
    """A folder in memory if possible: a killed process loses nothing that it has written, as on a disk."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else tmp_path) as folder:
        yield Path(folder)


class Killer:
    """Kills this process at the n-th operation on files, before or after it."""

    def __init__(self, at: int, when: str):
        self.at, self.when, self.count = at, when, itertools.count(1)

    def wrap(self, owner, name: str) -> None:
        function = getattr(owner, name)

        def counted(*args, **kwargs):
            is_due = next(self.count) == self.at
            if is_due and self.when == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                return function(*args, **kwargs)
            finally:
                if is_due:
                    os.kill(os.getpid(), signal.SIGKILL)

        setattr(owner, name, counted)


def start_save(folder: Path, at: int, when: str) -> int:
    """Starts a process that replaces step 3, deletes step 1, and is killed at an operation; returns its pid."""
    model, optimizers = untrained_model()

    def save() -> None:
        killer = Killer(at, when)
        for name in ("mkdir", "open", "fsync", "rename", "unlink", "rmdir"):
            killer.wrap(os, name)
        killer.wrap(checkpoint, "save_file")
        killer.wrap(Path, "write_bytes")
        Saver(folder, keep=2, background=False).save(3, model, optimizers, {"run": RUN, "new": True})

    return fork(save)


def test_a_save_killed_at_any_file_operation_loses_nothing(memory_folder):
    original = memory_folder / "original"
    write(original, 1, 2, 3)
    num_killed, num_torn, ended = 0, 0, False
    for first in itertools.count(1, 4):
        moments = [(at, when) for at in range(first, first + 4) for when in ("before", "after")]
        folders = [shutil.copytree(original, memory_folder / f"{at} {when}") for at, when in moments]
        processes = [start_save(folder, *moment) for folder, moment in zip(folders, moments, strict=True)]
        for folder, moment, process in zip(folders, moments, processes, strict=True):
            killed = os.WIFSIGNALED(os.waitpid(process, 0)[1])
            num_killed += killed
            num_torn += any(path.name.startswith(".") for path in folder.iterdir())
            sweep(folder)
            assert names(folder)[-2:] == [number(2), number(3)], moment
            assert set(names(folder)) <= {number(1), number(2), number(3)}, moment
            for path in folder.iterdir():
                assert verify(path) is None, moment
            assert "new" in load(folder)[0] or killed, moment
            ended |= not killed
        if ended:
            break
    assert num_killed > 60 and num_torn > 30


class Saving:
    """A process that saves one checkpoint after the other into a folder, starting with the newest step."""

    def __init__(self, folder: Path, model: torch.nn.Module, optimizers: list[torch.optim.Optimizer]):
        self.folder, self.model, self.optimizers, self.newest = folder, model, optimizers, 0

    def start(self) -> None:
        """Starts the process; it writes one byte to the pipe after each save."""
        self.reading, self.writing = os.pipe()
        self.process = fork(self._save_forever)

    def _save_forever(self) -> None:
        saver = Saver(self.folder, keep=2)
        for done in itertools.count(self.newest):  # the first save replaces an existing checkpoint
            saver.save(done, self.model, self.optimizers, {"run": RUN})
            saver.wait()
            os.write(self.writing, b".")

    def kill(self) -> None:
        os.kill(self.process, signal.SIGKILL)
        os.waitpid(self.process, 0)
        os.close(self.writing)

    def check(self) -> bool:
        """Checks that the newest reported checkpoint is there; returns whether the killed save left something."""
        with open(self.reading, "rb") as pipe:
            self.newest += len(pipe.read())
        is_torn = any(path.name.startswith(".") for path in self.folder.iterdir())
        sweep(self.folder)
        found = find(self.folder)
        assert found.skipped == [] and found.step - self.newest in (0, 1)  # 1: killed between rename and report
        self.newest = found.step
        return is_torn


def test_processes_killed_at_random_moments_of_their_saves_lose_nothing(memory_folder):
    draw = random.Random(0)
    model = torch.nn.Linear(400, 400)
    optimizers = [torch.optim.AdamW(model.parameters())]
    model(torch.ones(1, 400)).sum().backward()
    optimizers[0].step()
    pair = [Saving(memory_folder / name, model, optimizers) for name in ("a", "b")]
    num_torn = 0
    for _ in range(25):
        start = time.monotonic()
        for saving in pair:
            saving.start()
        for saving in pair:
            assert os.read(saving.reading, 1) == b"."
        time.sleep(draw.uniform(0, time.monotonic() - start))  # until a random moment after the first save
        for saving in pair:
            saving.kill()
        num_torn += sum(saving.check() for saving in pair)
    assert num_torn > 5
    for saving in pair:
        restore.load(find(saving.folder).path, model, optimizers)


def test_all_is_on_the_disk_before_a_checkpoint_gets_its_name(tmp_path, monkeypatch):
    """Nothing is renamed or deleted before its replacement is flushed."""
    write(tmp_path, 1, 2)
    events = []
    fsync, rename = os.fsync, os.rename

    def record_fsync(descriptor):
        events.append(f"flush {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        fsync(descriptor)

    def record_rename(source, target, **kwargs):
        events.append(f"rename {Path(source).name}")
        rename(source, target, **kwargs)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "rename", record_rename)
    write(tmp_path, 2, keep=1)
    assert sorted(events[:4]) == [f"flush {name}" for name in sorted(FILES)]
    assert events[3:] == [
        "flush manifest.json",
        f"flush .partial-{number(2)}",
        f"rename {number(2)}",
        f"rename .partial-{number(2)}",
        f"flush {tmp_path.name}",
        f"rename {number(1)}",
    ]


# The last save, in a forked child


def test_the_last_save_survives_the_processes_around_it(tmp_path, monkeypatch):
    write_checkpoint = checkpoint.write

    def slow_write(*args):
        (tmp_path / "begun").touch()
        time.sleep(0.5)
        return write_checkpoint(*args)

    monkeypatch.setattr(checkpoint, "write", slow_write)
    model, optimizers = trained_model()

    def save() -> None:
        os.setpgid(0, 0)
        Saver(tmp_path / "c", keep=1).save_surviving(2, model, optimizers, {"run": RUN})

    process = fork(save)
    deadline = time.monotonic() + 20
    while not (tmp_path / "begun").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(process, 0)[1])
    while not find(tmp_path / "c").path and time.monotonic() < deadline:
        time.sleep(0.02)
    assert load(tmp_path / "c")[0]["step"] == 2


def test_the_last_save_reports_its_outcome(tmp_path):
    model, optimizers = trained_model()
    saver = Saver(tmp_path / "c", keep=1)
    saver.save(1, model, optimizers, {"run": RUN})
    saver.save_surviving(2, model, optimizers, {"run": RUN})
    (tmp_path / "file").touch()
    blocked = Saver(tmp_path / "file", keep=1)
    blocked.save_surviving(3, model, optimizers, {"run": RUN})
    assert [(o.step, o.path, o.error) for o in saver.outcomes()] == [
        (n, tmp_path / "c" / number(n), "") for n in (1, 2)
    ]
    assert saver.last_step == 2 and blocked.last_step == -1
    (outcome,) = blocked.outcomes()
    assert outcome.path is None and "File exists" in outcome.error
    assert names(tmp_path / "c") == [number(2)]


def test_a_last_save_whose_process_dies_is_reported_as_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "write", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    saver = Saver(tmp_path, keep=1)
    saver.save_surviving(1, *trained_model(), {"run": RUN})
    (outcome,) = saver.outcomes()
    assert outcome.path is None and outcome.error == "the process that wrote it died"
    assert saver.last_step == -1
