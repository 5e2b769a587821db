"""The state that all peers share, how a peer that lacks it gets it, and which part of it a checkpoint contains.

    <run folder>/shared/state-00000012/     the state after round 12: weights.safetensors, state.json
    <run folder>/shared/updates/            the updates of the last rounds, as they were exchanged:
    00000012.safetensors

A peer that has the state of an earlier round gets only the updates since then, and applies them: this gives the same
bits, which the hash of the state proves. A peer that starts again does the same with its own files, so that no
committed round is lost, even if the last checkpoint is older.
"""

import json
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from forge_lib import disk
from forge_lib.checkpoints.format import optimizer_tensors, to_json
from forge_lib.checkpoints.restore import load_states
from forge_lib.distributed.transfer_files import list_files
from forge_lib.elastic.compression import CODECS
from forge_lib.elastic.flat import Shards
from forge_lib.elastic.ledger import Ledger
from forge_lib.elastic.outer import OuterOptimizer
from forge_lib.elastic.sharing import Shared
from forge_lib.errors import UserError

logger = logging.getLogger("forge")

KEPT_UPDATES = 32  # rounds whose updates are kept at least
MOST_UPDATES = 128  # and those since the last snapshot, if it is not older than this
SNAPSHOT_ROUNDS = 16  # a snapshot that is not older than this is completed with updates instead of a new one
STATE, UPDATES = "state", "updates"  # names of the folders that are served; STATE is followed by the round
UPDATE_ERRORS = (ValueError, KeyError, TypeError, SafetensorError)  # of a file that is not the expected update


def update_name(round: int) -> str:
    """Returns the name of the file with the update of a round."""
    return f"{round:08d}.safetensors"


@dataclass(frozen=True)
class Commit:
    """A committed round.

    Attributes:
        round: the round that it ends, from 0.
        compression, num_shards: how the update was sent.
        learning_rate, momentum: of the outer optimizer.
        samples: ranges [start, stop) of the samples that it commits.
        num_targets: that were predicted.
        contributors: identifiers of the peers whose changes are in it.
    """

    round: int
    compression: str
    num_shards: int
    learning_rate: float
    momentum: float
    samples: list[list[int]]
    num_targets: int
    contributors: list[str]


class SharedState:
    """Weights, outer momentum and ledger after a number of rounds; and the files with which others get them.

    Args:
        outer: the outer optimizer.
        ledger: the samples of the run.
        folder: for the files that are served; created when it is needed.
        shared: what this peer serves.
        keeps_checkpoints: whether there are regular checkpoints: then all updates since the last one but one are kept.

    Attributes:
        folder: of the files that are served.
        inner_optimizers: with --sync-every 1, the loop's optimizers, whose state the peers share too.
        round: rounds that it contains.
        num_targets: that were predicted in them.
        num_contributors: peers whose changes are in the last one.
        hash: equal on two peers if their states are.
    """

    def __init__(
        self, outer: OuterOptimizer, ledger: Ledger, folder: Path, shared: Shared, keeps_checkpoints: bool = True
    ):
        self.outer, self.ledger, self.round, self.num_targets, self.num_contributors = outer, ledger, 0, 0, 0
        self.folder, self._shared = folder, shared
        self.inner_optimizers: list[torch.optim.Optimizer] = []
        self._snapshot_round = -1
        self._keeps_checkpoints = keeps_checkpoints
        self._kept_since = self._saved_round = 0  # rounds of the last two checkpoints
        self.hash = self._hash()

    def _hash(self) -> str:
        ledger = self.ledger.to_json() | {"num_targets": self.num_targets}
        del ledger["total"]  # a run may be continued with more steps
        return self.outer.state_hash(ledger, self.round)

    def describe(self) -> dict:
        """Returns the part of a checkpoint's state.json that belongs to the shared state."""
        return {
            "round": self.round,
            "num_targets": self.num_targets,
            "num_contributors": self.num_contributors,
            "ledger": self.ledger.to_json(),
            "hash": self.hash,
        }

    def load(self, description: dict) -> bool:
        """Takes over what `describe` returned, once the vectors are loaded; returns whether the hash is right."""
        self.round, self.num_targets = description["round"], description["num_targets"]
        self.num_contributors = description["num_contributors"]
        saved = description["ledger"]
        self.ledger.first_open, self.ledger.committed = saved["first_open"], saved["committed"]
        self.hash = self._hash()
        return self.hash == description["hash"]

    # Rounds

    def shards(self, compression: str, count: int) -> Shards:
        """Returns the division of the weights for an exchange between `count` peers."""
        flat = self.outer.flat
        return Shards(flat.num_matrix, flat.num_vector, count, CODECS[compression])

    def apply(self, commit: Commit, data: list[torch.Tensor]) -> None:
        """Applies a committed round: all peers that do get the same bits.

        Args:
            commit: describes the round.
            data: the bytes of the averaged change, by shard.
        """
        shards = self.shards(commit.compression, commit.num_shards)
        update = torch.empty(self.outer.flat.total)
        for index, each in enumerate(data):
            shards.decode_into(update, each, index)
        self.outer.step(update, commit.learning_rate, commit.momentum)
        self.commit(commit)
        self.hash = self._hash()

    def commit(self, commit: Commit) -> None:
        """Records the samples of a committed round. With --sync-every 1, `updated` follows after the update."""
        self.ledger.commit(np.concatenate([np.arange(*each) for each in commit.samples] or [np.arange(0)]).tolist())
        self.num_targets += commit.num_targets
        self.num_contributors = len(commit.contributors)
        self.round = commit.round + 1

    def start_after(self, num_samples: int) -> None:
        """Takes the model as it is, after that many samples: a run that train.py has begun."""
        self.ledger.first_open = num_samples
        self.hash = self._hash()

    def updated(self) -> None:
        """Takes over the model's weights: with --sync-every 1, the loop's optimizers have updated them."""
        self.outer.flat.read(self.outer.weights)
        self.hash = self._hash()

    # Files for others

    def needs_snapshot(self, round: int) -> bool:
        """Returns whether a peer with the state of an earlier round needs all of this one: updates are not enough."""
        return not 0 < round < self.round or not self._has_updates_since(round)

    def _has_updates_since(self, round: int) -> bool:
        _, updates = self._shared.folders.get(UPDATES, (self.folder, {}))
        return all(update_name(each) in updates for each in range(round, self.round))

    def keep_update(self, commit: Commit, data: list[torch.Tensor], before: str) -> None:
        """Writes the update of a round that was just applied, and serves it; deletes those that are no longer needed.

        Args:
            commit, data: as for `apply`.
            before: hash of the state before the round.
        """
        folder = self.folder / UPDATES
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / update_name(commit.round)
        metadata = {"commit": json.dumps(commit.__dict__), "before": before, "after": self.hash}
        try:
            save_file({"data": torch.cat(data)}, disk.partial_path(path), metadata)
            disk.flush(disk.partial_path(path))
            disk.partial_path(path).replace(path)
            disk.flush(folder)
        finally:
            disk.remove(disk.partial_path(path))
        needed = self._kept_since if self._keeps_checkpoints else commit.round
        if self._snapshot_round >= commit.round - MOST_UPDATES:  # a slow download of it may go on
            needed = min(needed, self._snapshot_round)
        oldest = update_name(max(0, min(needed, commit.round - KEPT_UPDATES + 1)))
        _, known = self._shared.folders.get(UPDATES, (folder, {}))
        for name in [name for name in known if name < oldest]:
            (folder / name).unlink(missing_ok=True)
        self._shared.folders[UPDATES] = (folder, list_files(folder, {**known, path.name: None}))

    def checkpoint_due(self) -> None:
        """Records that a checkpoint of this state is written now: updates before the last one are no longer needed."""
        self._kept_since, self._saved_round = self._saved_round, self.round

    def read_update(self, path: Path) -> tuple[Commit, list[torch.Tensor], str]:
        """Returns a commit, the bytes of its update by shard, and the hash of the state after it.

        Raises:
            ValueError: it is not the update that follows this state.
        """
        with safe_open(path, framework="pt") as file:
            metadata, data = file.metadata(), file.get_tensor("data")
        commit = Commit(**json.loads(metadata["commit"]))
        shards = self.shards(commit.compression, commit.num_shards)
        sizes = [shards.num_bytes(index) for index in range(commit.num_shards)]
        if (commit.round, metadata["before"], sum(sizes)) != (self.round, self.hash, len(data)):
            raise ValueError(f"{path.name} is not the update that follows round {self.round} of this peer")
        return commit, list(data.split(sizes)), metadata["after"]

    def replay(self) -> None:
        """Applies the updates of the rounds after this state that an earlier process of this peer has kept."""
        folder = self.folder / UPDATES
        for old in self.folder.glob("*state-*"):
            disk.remove(old)
        first = self.round
        self._kept_since = self._saved_round = first
        while (path := folder / update_name(self.round)).exists():
            try:
                commit, data, expected = self.read_update(path)
            except UPDATE_ERRORS as error:
                logger.warning(f"an update of an earlier start cannot be used: {error}")
                break
            self.apply(commit, data)
            if self.hash != expected:
                raise UserError(
                    f"{path} gives another state than when it was written: remove {folder}, and start again"
                )
        if self.round > first:
            self.outer.error.zero_()  # what it had left out was sent in these rounds
            logger.info(f"applied the updates of rounds {first + 1} to {self.round} to the checkpoint")
        if folder.exists():
            for path in [*folder.glob("*.safetensors")]:
                if path.name >= update_name(self.round):  # of a history that has ended
                    disk.remove(path)
            self._shared.folders[UPDATES] = (folder, list_files(folder))

    def serve_snapshot(self) -> None:
        """Writes the state as files and serves them, unless a snapshot is served that is nearly as new."""
        age, is_served = self.round - self._snapshot_round, self._snapshot_round >= 0
        if is_served and age <= SNAPSHOT_ROUNDS and self._has_updates_since(self._snapshot_round):
            return
        for unfinished in self.folder.glob(disk.partial_path(Path(f"{STATE}-*")).name):
            disk.remove(unfinished)
        target = self.folder / f"{STATE}-{self.round:08d}"
        disk.partial_path(target).mkdir(parents=True)
        tensors = {"weights": self.outer.weights, "momentum": self.outer.momentum}
        save_file(tensors, disk.partial_path(target) / "weights.safetensors")
        if self.inner_optimizers:
            save_file(optimizer_tensors(self.inner_optimizers), disk.partial_path(target) / "optimizer.safetensors")
        (disk.partial_path(target) / "state.json").write_bytes(to_json(self.describe()))
        disk.remove(target)
        disk.place(target)
        before, self._snapshot_round = self._snapshot_round, self.round
        self._shared.folders[target.name] = (target, list_files(target))
        for old in self.folder.glob(f"{STATE}-*"):
            if old.name not in (target.name, f"{STATE}-{before:08d}"):  # a download of the last one may go on
                self._shared.folders.pop(old.name, None)
                disk.remove(old)

    def load_snapshot(self, folder: Path) -> bool:
        """Takes over a snapshot that was downloaded; returns whether it is what its hash says."""
        with safe_open(folder / "weights.safetensors", framework="pt") as file:
            self.outer.weights.copy_(file.get_tensor("weights"))
            self.outer.momentum.copy_(file.get_tensor("momentum"))
        if self.inner_optimizers:
            load_states(load_file(folder / "optimizer.safetensors"), self.inner_optimizers)
        self.outer.error.zero_()
        self.outer.restore()
        self._snapshot_round = -1
        for name in [name for name in self._shared.folders if name == UPDATES or name.startswith(f"{STATE}-")]:
            disk.remove(self._shared.folders.pop(name)[0])  # perhaps of another history
        return self.load(json.loads((folder / "state.json").read_bytes()))
