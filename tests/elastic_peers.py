"""Peers of scripts/train_elastic.py on this machine, as tests start and watch them."""

import sys
import time
from pathlib import Path

from commands import SHORT, Running, find_free_port, until
from run_folders import rows

FLAGS = [*SHORT, "--eval-every", "0", "--checkpoint-every", "0", "--max-steps", "120"]


class Peers:
    """Starts peers; the first one also starts the lighthouse.

    Args:
        folder: for the peers' run folders.
        start: the fixture that starts commands.
        flags: of all peers.
    """

    def __init__(self, folder: Path, start, *flags):
        self.folder, self.flags, self._start = folder, [*FLAGS, *flags], start
        self.lighthouse = find_free_port()

    def start(self, name: str, *flags, prefix: list | None = None) -> Running:
        """Starts a peer."""
        port = find_free_port()
        while port % 2:  # it uses the next one too
            port = find_free_port()
        words = [sys.executable, "scripts/train_elastic.py", *self.flags, *flags, "--peer-name", name]
        words += ["--lighthouse", f"http://127.0.0.1:{self.lighthouse}", "--peer-port", port]
        return self._start([*words, "--output-dir", self.folder / name], prefix=prefix, warm=prefix is None)

    def rounds(self, name: str) -> list[dict]:
        """Returns the rows of the rounds that a peer has logged."""
        return rows(self.folder / name, "round") if (self.folder / name / "metrics.jsonl").exists() else []

    def wait_for_round(self, name: str, number: int, running: Running, seconds: float = 90) -> dict:
        """Waits until a peer has logged a round; returns its row."""

        def find() -> dict | None:
            assert running.process.poll() is None, running.log.read_text()
            return next((row for row in self.rounds(name) if row["round"] >= number and "weights_hash" in row), None)

        return until(find, seconds, f"round {number} of {name}")

    def check_hashes(self, *names: str) -> None:
        """Checks that after each round all peers that have logged it have the same weights and learning rate."""
        by_round: dict[int, set] = {}
        for name in names:
            for row in self.rounds(name):
                if "weights_hash" in row:
                    by_round.setdefault(row["round"], set()).add(
                        (row["weights_hash"], row["learning_rate"], row["step"])
                    )
        assert by_round and all(len(found) == 1 for found in by_round.values()), by_round


def committed_samples(*folders: Path) -> list[int]:
    """Returns the samples of all rounds that any of the peers has logged, in order; each round counts once."""
    by_round: dict[int, list] = {}
    for folder in folders:
        for row in rows(folder, "samples"):
            assert by_round.setdefault(row["round"], row["samples"]) == row["samples"]
    return sorted(s for ranges in by_round.values() for start, stop in ranges for s in range(start, stop))


def finish_all(*running: Running, seconds: float = 120) -> list[str]:
    """Waits until all peers have ended well; returns their outputs."""
    end = time.monotonic() + seconds
    ended = [each.finish(max(1, end - time.monotonic())) for each in running]
    assert all(each.code == 0 for each in ended), "\n\n".join(each.output for each in ended)
    return [each.output for each in ended]
