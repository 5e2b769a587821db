"""Peers of scripts/train_elastic.py, on this machine or on machines with their own network, as tests start them."""

import signal
import sys
import time
from pathlib import Path

from commands import SHORT, Running, accelerate_launcher, find_free_port, until
from networks import Hosts
from run_folders import rows

from forge_lib.flags import parse_config
from forge_lib.peers_config import ElasticConfig

FLAGS = [*SHORT, "--eval-every", "0", "--checkpoint-every", "0", "--max-steps", "120"]


def peer_config(*flags: object) -> ElasticConfig:
    """Returns the configuration of a peer with the flags of these tests and further ones."""
    needed = ["--lighthouse", "http://127.0.0.1:1", "--output-dir", "-"]
    return parse_config(ElasticConfig, [*map(str, (*FLAGS, *needed, *flags))])


class Peers:
    """Starts peers and reads their logs.

    Args:
        folder: for the peers' run folders.
        start: the fixture that starts commands.
        flags: of all peers.
        machines: number N of it runs the N-th peer that is named in `places`; None: all run on this machine.
    """

    def __init__(self, folder: Path, start, *flags, machines: Hosts | None = None):
        self.folder, self.flags, self._start, self.machines = folder, [*FLAGS, *flags], start, machines
        self.port = 29510 if machines else find_free_port()
        self.running: dict[str, Running] = {}
        self.places: dict[str, int] = {}

    @property
    def lighthouse(self) -> str:
        """The address of the lighthouse, which the first peer starts."""
        return f"http://{'10.77.0.1' if self.machines else '127.0.0.1'}:{self.port}"

    def start(self, name: str, *flags, num_processes: int = 1) -> Running:
        """Starts a peer, or starts it again."""
        number = self.places.setdefault(name, len(self.places) + 1)
        launcher = [sys.executable]
        if num_processes > 1:
            launcher = accelerate_launcher(self.folder, find_free_port(), num_processes=num_processes)
        words = [*launcher, "scripts/train_elastic.py", *self.flags, *flags, "--peer-name", name]
        if "--lighthouse" not in self.flags:
            words += ["--lighthouse", self.lighthouse]
        words += ["--output-dir", self.folder / name]
        if self.machines:
            prefix = [*self.machines.on(number), "env", "OMP_NUM_THREADS=1"]
            self.running[name] = self._start(words, prefix=prefix)
        else:
            while (port := find_free_port()) % 2:  # it uses the next one too
                pass
            self.running[name] = self._start([*words, "--peer-port", port], warm=True)
        return self.running[name]

    def start_lighthouse(self, number: int = 1) -> Running:
        """Starts a lighthouse on its own, on a machine."""
        prefix = self.machines.on(number) if self.machines else None
        return self._start([sys.executable, "-m", "forge_lib.elastic.membership", self.port], prefix=prefix)

    def kill(self, name: str) -> None:
        """Kills a peer."""
        self.running.pop(name).kill()

    def rounds(self, name: str) -> list[dict]:
        """Returns the rows of the rounds that a peer has logged, over all its starts."""
        if not (self.folder / name / "metrics.jsonl").exists():
            return []
        return rows(self.folder / name, "weights_hash")

    def events(self, name: str) -> list[str]:
        """Returns the events that a peer has logged."""
        return [row["event"] for row in rows(self.folder / name, "event")]

    def last_round(self, name: str) -> int:
        """Returns the newest round that a peer has logged; 0: none."""
        return max((row["round"] for row in self.rounds(name)), default=0)

    def round_of_event(self, name: str, event: str, about: str) -> int:
        """Returns the first round that a peer has logged after its last event about another peer."""
        found = [row for row in rows(self.folder / name, "event") if row["event"] == event and row["peer"] == about]
        return next(row["round"] for row in self.rounds(name) if row["time"] >= found[-1]["time"])

    def wait_for_round(self, name: str, number: int, seconds: float = 90) -> dict:
        """Waits until a peer has logged a round from `number` on; returns its row."""
        running = self.running[name]

        def find() -> dict | None:
            assert running.process.poll() is None, running.log.read_text()
            return next((row for row in self.rounds(name) if row["round"] >= number), None)

        return until(find, seconds, f"round {number} of {name}")

    def stop(self, *names: str, seconds: float = 90) -> None:
        """Sends SIGTERM to peers, and waits until they have ended well."""
        for name in names:
            self.running[name].process.send_signal(signal.SIGTERM)
        self.finish(*names, seconds=seconds)

    def finish(self, *names: str, seconds: float = 120) -> None:
        """Waits until peers have ended well."""
        end = time.monotonic() + seconds
        for name in names:
            running = self.running.pop(name)
            ended = running.finish(max(1, end - running.begun))  # it counts from its start
            assert ended.code == 0, ended.output

    def check(self) -> list[int]:
        """Checks what holds at any time, and returns the committed samples, in order.

        After each round all peers that have logged it have the same weights, learning rate and step, and have
        committed the same samples; no sample is committed twice.
        """
        by_round: dict[int, dict[str, tuple]] = {}
        for name in self.places:
            for row in self.rounds(name):
                facts = (row["weights_hash"], row["learning_rate"], row["step"], str(row["samples"]))
                assert by_round.setdefault(row["round"], {}).setdefault(name, facts) == facts, "logged twice"
        assert by_round
        for number, found in by_round.items():
            assert len(set(found.values())) == 1, (number, found)
        ranges = {row["round"]: row["samples"] for name in self.places for row in self.rounds(name)}
        samples = sorted(s for each in ranges.values() for start, stop in each for s in range(start, stop))
        assert len(set(samples)) == len(samples)
        return samples
