"""The files of the shared state: with them another peer catches up, and this one starts again.

    <run folder>/shared/state-00000012/                  the state after round 12: weights.safetensors, state.json
    <run folder>/shared/updates/00000012.safetensors     the update of a round, as it was exchanged; of the last rounds

A peer that has the state of an earlier round gets only the updates since then, and applies them: this gives the same
bits, which the hash of the state proves. A peer that starts again does the same with its own files, so that no
committed round is lost, even if the last checkpoint is older.
"""

import json
import logging
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from forge_lib import disk
from forge_lib.checkpoints.format import optimizer_tensors, to_json
from forge_lib.checkpoints.restore import load_states
from forge_lib.distributed.transfer_files import FileFacts, list_files
from forge_lib.elastic.ledger import Ledger
from forge_lib.elastic.shared_state import Commit, SharedState
from forge_lib.elastic.sharing import Shared
from forge_lib.errors import UserError

logger = logging.getLogger("forge")

KEPT_UPDATES = 32  # rounds whose updates are kept at least
MOST_UPDATES = 128  # and those since the last snapshot, if it is not older than this
SNAPSHOT_ROUNDS = 16  # a snapshot that is not older than this is completed with updates instead of a new one
STATE, UPDATES = "state", "updates"  # names of the folders that are served; STATE is followed by the round
FILE_ERRORS = (ValueError, KeyError, TypeError, SafetensorError)  # of a file that is not the expected one


def update_name(round: int) -> str:
    """Returns the name of the file with the update of a round."""
    return f"{round:08d}.safetensors"


def _num_committed(description: dict) -> int:
    """Returns how many samples are committed in the description of a state."""
    return Ledger(0, description["ledger"]["first_open"], description["ledger"]["committed"]).num_committed


class StateFiles:
    """Writes, serves and reads the files of a state.

    Args:
        state: of this peer.
        folder: for the files; created when it is needed.
        shared: what this peer serves.
        identity: what must be equal on all peers and whenever the run is continued; JSON types.
        keeps_checkpoints: whether there are regular checkpoints: then all updates since the last one but one that was
            written are kept.

    Attributes:
        state: as above.
        incoming: folder for downloads.
    """

    def __init__(
        self, state: SharedState, folder: Path, shared: Shared, identity: dict, keeps_checkpoints: bool = True
    ):
        self.state, self.folder, self._shared, self._identity = state, folder, shared, identity
        self._run = xxhash.xxh3_128_hexdigest(to_json(identity))
        self.incoming = folder.with_name("incoming")
        self._snapshot_round = -1
        self._keeps_checkpoints = keeps_checkpoints
        self._kept_since = self._saved_round = 0  # rounds of the last two checkpoints on the disk
        self._due: list[tuple[Path, int]] = []  # later ones, which may not be written yet, and their rounds

    def needs_snapshot(self, round: int) -> bool:
        """Returns whether a peer with the state of an earlier round needs all of this one: updates are not enough."""
        is_far = self.state.round - round > SNAPSHOT_ROUNDS
        return is_far or not 0 < round < self.state.round or not self._has_updates_since(round)

    def _has_updates_since(self, round: int) -> bool:
        _, updates = self._shared.folders.get(UPDATES, (self.folder, {}))
        return all(update_name(each) in updates for each in range(round, self.state.round))

    def keep_update(self, commit: Commit, data: list[torch.Tensor], before: str) -> None:
        """Writes the update of a round that was just applied, and serves it; deletes those that are no longer needed.

        Args:
            commit, data: as for `apply`.
            before: hash of the state before the round.
        """
        folder = self.folder / UPDATES
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / update_name(commit.round)
        metadata = {"commit": json.dumps(commit.__dict__), "before": before, "after": self.state.hash}
        metadata["run"] = self._run
        try:
            save_file({"data": torch.cat(data)}, disk.partial_path(path), metadata)
            disk.flush(disk.partial_path(path))
            disk.partial_path(path).replace(path)
            disk.flush(folder)
        finally:
            disk.remove(disk.partial_path(path))
        self._find_written()
        needed = self._kept_since if self._keeps_checkpoints else commit.round
        if self._snapshot_round >= commit.round - MOST_UPDATES:  # a slow download of it may go on
            needed = min(needed, self._snapshot_round)
        oldest = update_name(max(0, min(needed, commit.round - KEPT_UPDATES + 1)))
        _, known = self._shared.folders.get(UPDATES, (folder, {}))
        for name in [name for name in known if name < oldest]:
            (folder / name).unlink(missing_ok=True)
        kept = {name: facts for name, facts in known.items() if name >= oldest}
        new: FileFacts = {"bytes": path.stat().st_size, "sha256": disk.sha256(path)}
        self._shared.folders[UPDATES] = (folder, kept | {path.name: new})

    def checkpoint_due(self, path: Path) -> None:
        """Records that a checkpoint of this state is written now; it may fail, if the disk is full.

        Once it is there, the updates before the one before it are no longer needed.

        Args:
            path: of the checkpoint, once it is complete.
        """
        self._due.append((path, self.state.round))

    def _find_written(self) -> None:
        for number, (path, round) in reversed([*enumerate(self._due)]):
            if path.exists():
                self._kept_since, self._saved_round = self._saved_round, round
                del self._due[: number + 1]
                break

    def forget(self) -> None:
        """Removes what an earlier process of this peer has kept: --resume names a checkpoint to go back to."""
        disk.remove(self.folder)

    def read_update(self, path: Path) -> tuple[Commit, list[torch.Tensor], str]:
        """Returns a commit, the bytes of its update by shard, and the hash of the state after it.

        Raises:
            ValueError: it is not the update that follows this state; or another one of FILE_ERRORS.
        """
        with safe_open(path, framework="pt") as file:
            metadata, data = file.metadata(), file.get_tensor("data")
        if metadata["run"] != self._run:
            raise ValueError(f"{path.name} belongs to another run")
        if data.dtype != torch.uint8:
            raise ValueError(f"{path.name} has {data.dtype} instead of bytes")
        commit = Commit.from_json(json.loads(metadata["commit"]))
        self.state.ledger.check(commit.samples)
        shards = self.state.shards(commit.compression, commit.num_shards)
        sizes = [shards.num_bytes(index) for index in range(commit.num_shards)]
        if (commit.round, metadata["before"], sum(sizes)) != (self.state.round, self.state.hash, len(data)):
            raise ValueError(f"{path.name} is not the update that follows round {self.state.round} of this peer")
        return commit, list(data.split(sizes)), metadata["after"]

    def replay(self) -> None:
        """Applies the updates of the rounds after this state that an earlier process of this peer has kept."""
        folder = self.folder / UPDATES
        self._take_over_snapshot()
        first = self.state.round
        self._kept_since = self._saved_round = first
        while (path := folder / update_name(self.state.round)).exists():
            try:
                commit, data, expected = self.read_update(path)
            except FILE_ERRORS as error:
                logger.warning(f"an update of an earlier start cannot be used: {error}")
                break
            self.state.apply(commit, data)
            if self.state.hash != expected:
                raise UserError(
                    f"{path} gives another state than when it was written: remove {folder}, and start again"
                )
        if self.state.round > first:
            self.state.outer.error.zero_()  # what it had left out was sent in these rounds
            logger.info(f"applied the updates of rounds {first + 1} to {self.state.round} to the checkpoint")
        if folder.exists():
            if path.exists():  # it and those after it are of a history that has ended
                for later in [each for each in folder.glob("*.safetensors") if each.name >= path.name]:
                    disk.remove(later)
            # Files behind a gap stay, but are not served: a newer state, when this peer has one, replaces them.
            files = list_files(folder)
            self._shared.folders[UPDATES] = (folder, {name: files[name] for name in files if name < path.name})

    def _take_over_snapshot(self) -> None:
        """Loads the newest snapshot of an earlier process of this peer, if it is newer than this state."""
        newest, most = None, self.state.ledger.num_committed
        for path in self.folder.glob(f"{STATE}-*"):
            try:
                description = json.loads((path / "state.json").read_bytes())
                if description.get("identity") != self._identity:
                    logger.warning(f"{path} belongs to another run: it is removed")
                elif (num_committed := _num_committed(description)) > most:
                    newest, most = path, num_committed
            except (OSError, *FILE_ERRORS) as error:
                raise UserError(f"{path} cannot be read: {error}; remove it, and start again") from None
        for path in self.folder.glob(f"*{STATE}-*"):
            if path != newest:
                disk.remove(path)
        if not newest:
            return
        try:
            is_right = self._read_snapshot(newest)
        except (OSError, *FILE_ERRORS) as error:
            raise UserError(f"{newest} cannot be read: {error}; remove it, and start again") from None
        if not is_right:
            raise UserError(f"{newest} does not have its hash: remove it, and start again")
        logger.info(f"took over the state after round {self.state.round}, which this peer had fetched or served")
        self._serve(newest)

    def _serve(self, folder: Path) -> None:
        self._snapshot_round = self.state.round
        self._shared.folders[folder.name] = (folder, list_files(folder))

    def serve_snapshot(self) -> None:
        """Writes the state as files and serves them, unless a snapshot is served that is nearly as new."""
        age, is_served = self.state.round - self._snapshot_round, self._snapshot_round >= 0
        if is_served and age <= SNAPSHOT_ROUNDS and self._has_updates_since(self._snapshot_round):
            return
        for unfinished in self.folder.glob(disk.partial_path(Path(f"{STATE}-*")).name):
            disk.remove(unfinished)
        target = self.folder / f"{STATE}-{self.state.round:08d}"
        disk.partial_path(target).mkdir(parents=True)
        tensors = {"weights": self.state.outer.weights, "momentum": self.state.outer.momentum}
        save_file(tensors, disk.partial_path(target) / "weights.safetensors")
        if self.state.inner_optimizers:
            save_file(
                optimizer_tensors(self.state.inner_optimizers), disk.partial_path(target) / "optimizer.safetensors"
            )
        description = self.state.describe() | {"identity": self._identity}
        (disk.partial_path(target) / "state.json").write_bytes(to_json(description))
        for path in disk.partial_path(target).iterdir():
            disk.flush(path)
        disk.remove(target)
        disk.place(target)
        before = self._snapshot_round
        self._serve(target)
        for old in self.folder.glob(f"{STATE}-*"):
            if old.name not in (target.name, f"{STATE}-{before:08d}"):  # a download of the last one may go on
                self._shared.folders.pop(old.name, None)
                disk.remove(old)

    def load_snapshot(self, folder: Path) -> bool:
        """Takes over a snapshot that was downloaded, keeps its files and serves them.

        Until the next checkpoint, they are what this peer starts from if it starts again.

        Returns:
            Whether it is what its hash says; if not, the files are removed.

        Raises:
            One of FILE_ERRORS: it is not the state of such a model; the files are removed, and nothing else changes.
        """
        try:
            self._check_snapshot(folder)
        except FILE_ERRORS:
            disk.remove(folder)
            raise
        for name in [name for name in self._shared.folders if name == UPDATES or name.startswith(f"{STATE}-")]:
            disk.remove(self._shared.folders.pop(name)[0])  # perhaps of another history
        self._snapshot_round = -1
        self._due.clear()
        if not self._read_snapshot(folder):
            disk.remove(folder)
            return False
        target = self.folder / folder.name
        self.folder.mkdir(parents=True, exist_ok=True)
        disk.remove(target)
        folder.rename(target)
        disk.flush(self.folder)
        self._serve(target)
        self._kept_since = self._saved_round = self.state.round
        return True

    def _check_snapshot(self, folder: Path) -> dict:
        """Returns the description of a snapshot; one of FILE_ERRORS if it is not the state of such a model."""
        description = json.loads((folder / "state.json").read_bytes())
        SharedState.check(description)
        with safe_open(folder / "weights.safetensors", framework="pt") as file:
            for name in ("weights", "momentum"):
                found = file.get_slice(name)
                if found.get_shape() != list(self.state.outer.weights.shape) or found.get_dtype() != "F32":
                    raise ValueError(f"{name} of shape {found.get_shape()}, {found.get_dtype()}")
        return description

    def _read_snapshot(self, folder: Path) -> bool:
        description = self._check_snapshot(folder)
        self.state.hash = ""  # should this fail, the state is that of no peer
        with safe_open(folder / "weights.safetensors", framework="pt") as file:
            self.state.outer.weights.copy_(file.get_tensor("weights"))
            self.state.outer.momentum.copy_(file.get_tensor("momentum"))
        if self.state.inner_optimizers:
            load_states(load_file(folder / "optimizer.safetensors"), self.state.inner_optimizers)
        self.state.outer.error.zero_()
        self.state.outer.restore()
        return self.state.load(description)
