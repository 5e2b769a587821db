"""Peers of scripts/train_elastic.py: they keep equal weights, and survive losses and joiners."""

import shutil

import pytest
from elastic_peers import Peers, committed_samples, finish_all
from run_folders import rows, sha256


@pytest.fixture
def peers(tmp_path, start):
    def peers(*flags) -> Peers:
        return Peers(tmp_path, start, *flags)

    return peers


def test_two_peers_train_one_model_on_each_sample_once(peers, tmp_path):
    """Also an evaluation that they divide: both log the same numbers."""
    both = peers("--min-peers", 2, "--eval-fraction", "0.02", "--eval-every", 50, "--sync-every", 10)
    running = [both.start("alder", "--serve-lighthouse"), both.start("birch")]
    finish_all(*running)
    both.check_hashes("alder", "birch")
    assert committed_samples(tmp_path / "alder", tmp_path / "birch") == list(range(120 * 8))
    assert rows(tmp_path / "alder", "eval_loss") == rows(tmp_path / "birch", "eval_loss")
    assert len(rows(tmp_path / "alder", "eval_loss")) >= 3
    last = both.rounds("alder")[-1]
    assert last["step"] == 120 and last["tokens"] == 120 * 8 * 64
    assert sha256(tmp_path / "alder" / "final" / "model.safetensors") == sha256(
        tmp_path / "birch" / "final" / "model.safetensors"
    )
    assert both.rounds("alder")[0]["loss"] - last["loss"] > 0.5


def test_a_killed_peer_comes_back_and_a_new_one_gets_everything_from_the_others(peers, tmp_path):
    """The third peer has neither model nor data."""
    three = peers("--min-peers", 2, "--sync-every", 5, "--max-steps", 2000)
    alder, birch = three.start("alder", "--serve-lighthouse"), three.start("birch", "--checkpoint-every", 20)
    three.wait_for_round("birch", 4, birch)
    birch.kill()
    before = three.rounds("alder")[-1]["round"]
    three.wait_for_round("alder", before + 2, alder)
    again = three.start("birch")
    model = tmp_path / "model"
    cedar = three.start("cedar", "--model-name", "data/tiny_gpt2", "--dataset-path", tmp_path / "nothing")
    late = three.wait_for_round("cedar", 1, cedar)["round"]
    for name, running in (("alder", alder), ("birch", again), ("cedar", cedar)):
        three.wait_for_round(name, late + 3, running)
    for running in (alder, again, cedar):
        running.process.send_signal(15)
    outputs = finish_all(alder, again, cedar)
    three.check_hashes("alder", "birch", "cedar")
    assert len(three.rounds("alder")[-1]["participants"]) >= 1
    assert max(len(row["participants"]) for row in three.rounds("alder") if "participants" in row) == 3
    samples = committed_samples(*(tmp_path / name for name in ("alder", "birch", "cedar")))
    assert samples[:-1] == sorted(set(samples[:-1]))
    assert "peer birch is gone" in outputs[0]
    shutil.rmtree(model, ignore_errors=True)
