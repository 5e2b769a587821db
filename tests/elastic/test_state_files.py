"""What a peer has on its disk is enough to start again, and to let others catch up."""

import json
import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from forge_lib.elastic.catch_up import choose_snapshot
from forge_lib.elastic.flat import FlatParameters
from forge_lib.elastic.ledger import Ledger
from forge_lib.elastic.outer import OuterOptimizer
from forge_lib.elastic.peer_facts import PeerFacts
from forge_lib.elastic.shared_state import Commit, SharedState
from forge_lib.elastic.sharing import Shared
from forge_lib.elastic.state_files import FILE_ERRORS, STATE, StateFiles, update_name
from forge_lib.errors import UserError

IDENTITY = {"data": "x"}


def make(folder, identity=IDENTITY, shared=None) -> StateFiles:
    torch.manual_seed(0)
    state = SharedState(OuterOptimizer(FlatParameters(nn.Linear(8, 8))), Ledger(1000))
    return StateFiles(state, folder, shared or Shared(), identity)


def made(files: StateFiles, num_samples: int = 10) -> tuple[Commit, list[torch.Tensor]]:
    """Returns the commit of the next round, and its update."""
    state = files.state
    shards, first = state.shards("no", 1), state.ledger.first_open
    data = [shards.encode(torch.full((state.outer.flat.total,), 0.01 * (state.round + 1)), 0)]
    return Commit(state.round, "no", 1, 0.7, 0.6, [[first, first + num_samples]], 640, ["a"]), data


def commit(files: StateFiles, num_samples: int = 10) -> None:
    """Commits a round."""
    (commit, data), before = made(files, num_samples), files.state.hash
    files.state.apply(commit, data)
    files.keep_update(commit, data, before)


def test_a_peer_that_has_fetched_all_of_the_state_starts_again_from_it(tmp_path):
    """It has no checkpoint of its own yet; the rounds after the download are replayed."""
    source, joiner = make(tmp_path / "source"), make(tmp_path / "joiner")
    for _ in range(3):
        commit(source)
    source.serve_snapshot()
    (tmp_path / "source" / f"{STATE}-00000003").rename(tmp_path / f"{STATE}-00000003")
    assert joiner.load_snapshot(tmp_path / f"{STATE}-00000003")
    for _ in range(40):  # more than the updates that are kept at least
        commit(joiner)
    again = make(tmp_path / "joiner")
    again.replay()
    assert (again.state.round, again.state.hash) == (43, joiner.state.hash)
    assert torch.equal(again.state.outer.weights, joiner.state.outer.weights)


def test_files_of_another_run_are_not_taken_over_and_damaged_ones_are_named(tmp_path):
    files = make(tmp_path)
    commit(files)
    files.serve_snapshot()
    other = make(tmp_path, {"data": "y"})
    other.replay()
    assert other.state.round == 0 and not list(tmp_path.glob(f"{STATE}-*"))
    files = make(tmp_path / "damaged")
    commit(files)
    files.serve_snapshot()
    path = tmp_path / "damaged" / f"{STATE}-00000001" / "weights.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="does not have its hash: remove it, and start again"):
        make(tmp_path / "damaged").replay()


def test_of_two_histories_the_one_with_more_samples_is_taken_over_although_it_has_fewer_rounds(tmp_path):
    """A peer that was left alone has made short rounds; then others came back with the state of fewer long ones."""
    alone, others = make(tmp_path / "alone"), make(tmp_path / "others")
    for _ in range(5):
        commit(alone)
    for _ in range(3):
        commit(others, num_samples=30)
    others.serve_snapshot()
    (tmp_path / "others" / f"{STATE}-00000003").rename(tmp_path / f"{STATE}-00000003")
    assert alone.load_snapshot(tmp_path / f"{STATE}-00000003")
    commit(alone)
    again = make(tmp_path / "alone")
    for _ in range(5):  # its checkpoint is of the history that has ended
        again.state.apply(*made(again))
    again.replay()
    assert (again.state.round, again.state.hash) == (4, alone.state.hash)


@pytest.mark.parametrize(
    "wrong",
    [{"samples": [[0, 10]]}, {"samples": [[20, 15]]}, {"samples": [["a", 9]]}, {"num_shards": 10**9},
     {"compression": "rle"}, {"learning_rate": math.nan}, {"contributors": 1}, {"more": 1}],
)  # fmt: skip
def test_an_update_that_cannot_be_applied_changes_nothing(tmp_path, wrong):
    files = make(tmp_path)
    commit(files)
    before, (good, data) = files.state.hash, made(files)
    content = {**good.__dict__, **wrong}
    path, metadata = tmp_path / update_name(1), {"commit": json.dumps(content), "before": before, "after": ""}
    with safe_open(tmp_path / "updates" / update_name(0), "pt") as file:
        save_file({"data": data[0]}, path, metadata | {"run": file.metadata()["run"]})
    with pytest.raises(FILE_ERRORS):
        files.read_update(path)
    assert (files.state.hash, files.state._hash()) == (before, before)


def test_a_state_of_another_form_changes_nothing(tmp_path):
    files, source = make(tmp_path / "a"), make(tmp_path / "b")
    commit(source)
    source.serve_snapshot()
    folder = tmp_path / "b" / f"{STATE}-00000001"
    save_file({"weights": torch.zeros(3), "momentum": torch.zeros(3)}, folder / "weights.safetensors")
    with pytest.raises(ValueError, match=r"weights of shape \[3\], F32"):
        files.load_snapshot(folder)
    assert files.state.hash == make(tmp_path / "c").state.hash and not folder.exists()


def test_a_checkpoint_that_was_named_is_not_followed_by_later_rounds(tmp_path):
    files = make(tmp_path / "shared")
    commit(files)
    files.forget()
    assert not (tmp_path / "shared").exists()


def kept(folder) -> list[int]:
    return sorted(int(path.stem) for path in (folder / "updates").glob("*.safetensors"))


def test_updates_are_kept_until_a_checkpoint_that_contains_them_is_on_the_disk(tmp_path):
    """All updates since the last checkpoint but one are kept; one that could not be written does not count."""
    files = make(tmp_path / "shared")
    for number in range(1, 4):
        for _ in range(50):
            commit(files)
        files.checkpoint_due(tmp_path / f"step-{number}")
    commit(files)
    assert kept(tmp_path / "shared") == list(range(151)), "the disk is full for all three of them"
    for number in (1, 3):
        (tmp_path / f"step-{number}").mkdir()
        commit(files)
    assert kept(tmp_path / "shared")[0] == 50, "since the first one"
    files.checkpoint_due(tmp_path / "step-4")
    (tmp_path / "step-4").mkdir()
    commit(files)
    assert kept(tmp_path / "shared") == list(range(122, 154)), "the last 32"
    for _ in range(50):
        commit(files)
    assert kept(tmp_path / "shared") == list(range(150, 204)), "since the third one, the last but one"


def test_updates_behind_a_gap_are_kept_but_not_served(tmp_path):
    files = make(tmp_path)
    for _ in range(6):
        commit(files)
    (tmp_path / "updates" / "00000003.safetensors").unlink()
    shared = Shared()
    again = make(tmp_path, shared=shared)
    again.replay()
    assert again.state.round == 3 and kept(tmp_path) == [0, 1, 2, 4, 5]
    commit(again)
    assert [int(name.partition(".")[0]) for name in shared.folders["updates"][1]] == [0, 1, 2, 3]
    last = make(tmp_path)
    last.replay()
    assert (last.state.round, last.state.hash) == (6, files.state.hash), "they follow the update that fills the gap"


def test_updates_of_a_history_that_has_ended_are_removed(tmp_path):
    files, other = make(tmp_path / "a"), make(tmp_path / "b")
    other.state.outer.weights.add_(1)
    for each in (files, other):
        for _ in range(4):
            commit(each)
    for number in (2, 3):
        name = f"{number:08d}.safetensors"
        (tmp_path / "b" / "updates" / name).replace(tmp_path / "a" / "updates" / name)
    again = make(tmp_path / "a")
    again.replay()
    assert again.state.round == 2 and kept(tmp_path / "a") == [0, 1]


def test_the_newest_snapshot_that_leads_to_the_newest_state_is_fetched_and_a_begun_download_is_continued(tmp_path):
    own, source = make(tmp_path / "shared"), PeerFacts("alder", "10.77.0.1", 1, 2, round=40)
    snapshots = {"state-00000010": {}, "state-00000030": {}}
    served = {**snapshots, "updates": {update_name(round): {} for round in range(10, 40)}}
    assert choose_snapshot(own, source, served) == "state-00000030"
    (own.incoming / ".partial-state-00000010").mkdir(parents=True)
    assert choose_snapshot(own, source, served) == "state-00000010"
    del served["updates"][update_name(12)]
    assert choose_snapshot(own, source, served) == "state-00000030", "an update is missing"
    assert choose_snapshot(own, source, snapshots) == "state-00000030", "it is newer than the own state, at least"
    own.state.round = 30
    assert choose_snapshot(own, source, snapshots) == ""
    assert choose_snapshot(own, source, {**snapshots, "state-00000040": {}}) == "state-00000040"
