"""Peers of scripts/train_elastic.py: they keep equal weights, and survive losses and joiners."""

import sys

import pytest
from elastic_peers import FLAGS, Peers
from run_folders import losses, rows, sha256


@pytest.fixture
def peers(tmp_path, start):
    def peers(*flags) -> Peers:
        return Peers(tmp_path, start, *flags)

    return peers


def final(folder) -> str:
    return sha256(folder / "final" / "model.safetensors")


def test_two_peers_train_one_model_on_each_sample_once(peers, tmp_path):
    """Also an evaluation that they divide; in the last round there is a batch for one of them only."""
    flags = ["--min-peers", 2, "--eval-fraction", "0.02", "--eval-every", 50, "--sync-every", 10]
    both = peers(*flags, "--max-steps", 121)
    both.start("alder", "--serve-lighthouse")
    both.start("birch")
    both.finish("alder", "birch")
    assert both.check() == list(range(121 * 8))
    evaluations = rows(tmp_path / "alder", "eval_loss")
    assert evaluations == rows(tmp_path / "birch", "eval_loss") and len(evaluations) >= 3
    first, last = both.rounds("alder")[0], both.rounds("alder")[-1]
    assert (last["step"], last["tokens"]) == (121, 121 * 8 * 64)
    assert first["loss"] - last["loss"] > 0.5
    for row in both.rounds("alder"):
        parts = row["compute_seconds"] + row["wait_seconds"] + row["sync_seconds"]
        assert parts >= row["round_seconds"] - 1e-6, "all of the time is accounted for"
    assert final(tmp_path / "alder") == final(tmp_path / "birch")


def test_a_killed_peer_comes_back_and_a_new_one_gets_everything_from_the_others(peers, tmp_path):
    """The third peer has no data. At the end all are killed; they continue from the last committed round."""
    three = peers("--min-peers", 2, "--sync-every", 5, "--max-steps", 2000)
    three.start("alder", "--serve-lighthouse")
    three.start("birch", "--checkpoint-every", 20)
    three.wait_for_round("birch", 4)
    three.kill("birch")
    three.wait_for_round("alder", three.last_round("alder") + 2)
    three.start("birch")
    three.start("cedar", "--dataset-path", tmp_path / "nothing")
    late = three.wait_for_round("cedar", 1)["round"]
    for name in ("alder", "birch", "cedar"):
        three.wait_for_round(name, late + 3)
    assert "peer_lost" in three.events("alder") and "healed" in three.events("cedar")
    for name in ("alder", "birch", "cedar"):
        three.kill(name)
    newest = max(map(three.last_round, three.places))
    three.start("alder", "--serve-lighthouse", "--min-peers", 3)
    three.start("birch", "--min-peers", 3)
    three.start("cedar", "--min-peers", 3, "--dataset-path", tmp_path / "nothing")
    for name in ("alder", "birch", "cedar"):
        three.wait_for_round(name, newest + 2)
    three.stop("alder", "birch", "cedar")
    samples = three.check()
    assert samples[-1] < len(samples) + 3 * 8 * 50, "what a round has left out is trained in the next one"


def test_a_peer_of_two_processes_trains_with_a_peer_of_one(peers, tmp_path):
    both = peers("--min-peers", 2, "--sync-every", 10, "--max-steps", 61)
    both.start("alder", "--serve-lighthouse", num_processes=2)
    both.start("birch")
    both.finish("alder", "birch")
    assert both.check() == list(range(61 * 8))
    assert [both.rounds(name)[-1]["num_processes"] for name in ("alder", "birch")] == [2, 1]
    assert final(tmp_path / "alder") == final(tmp_path / "birch")


def test_a_run_with_rounds_is_not_continued_in_another_way(peers, start, tmp_path):
    """Without rounds, the moments of its peers would have to be equal; train.py has no outer optimizer."""
    one = peers("--sync-every", 10, "--max-steps", 20, "--checkpoint-every", 10)
    one.start("alder", "--serve-lighthouse")
    one.finish("alder")
    ended = one.start("alder", "--serve-lighthouse", "--sync-every", 1, "--max-steps", 40).finish(60)
    assert ended.code == 2 and "--sync-every 1 cannot continue this run" in ended.output
    words = [sys.executable, "scripts/train.py", *FLAGS, "--max-steps", 40, "--output-dir", tmp_path / "alder"]
    ended = start(words, warm=True).finish(60)
    assert ended.code == 2 and "step-00000020 is of a run of train_elastic.py: continue it with that" in ended.output


def test_averaging_every_gradient_follows_the_losses_of_train(peers, trained, tmp_path):
    """--sync-every 1: two peers, 50 steps of the same global batch; the weights of both are equal bit for bit."""
    both = peers("--min-peers", 2, "--sync-every", 1, "--max-steps", 50, "--log-every", 1)
    both.start("alder", "--serve-lighthouse")
    both.start("birch")
    both.finish("alder", "birch")
    both.check()
    assert losses(tmp_path / "alder") == pytest.approx(losses(trained), rel=1e-4)
    assert final(tmp_path / "alder") == final(tmp_path / "birch")


def test_while_every_gradient_is_averaged_a_peer_joins_is_killed_and_comes_back(peers):
    """--sync-every 1: the others wait until it has the weights and the optimizer's state."""
    three = peers("--min-peers", 2, "--sync-every", 1, "--max-steps", 100_000, "--log-every", 1)
    three.start("alder", "--serve-lighthouse")
    three.start("birch")
    three.wait_for_round("birch", 20)
    three.start("cedar")
    joined = three.wait_for_round("cedar", 1)["round"]
    assert joined > 20
    three.wait_for_round("cedar", joined + 5)
    three.kill("cedar")
    three.wait_for_round("alder", three.last_round("alder") + 5)
    three.start("cedar")
    back = three.wait_for_round("cedar", three.last_round("alder") + 1)["round"]
    for name in ("alder", "birch", "cedar"):
        three.wait_for_round(name, back + 5)
    participants = {each["peer"] for each in three.rounds("alder")[-1]["participants"]}
    assert participants == {"alder", "birch", "cedar"}
    three.stop("alder", "birch", "cedar")
    three.check()
