"""Files that an older version wrote are read, and its run is continued bit for bit."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from commands import ROOT
from run_folders import losses, rows, sha256
from safetensors.torch import load_file

from forge_lib.checkpoints.verify import verify
from forge_lib.data.token_store import open_store, verify_store

OLD = ROOT / "tests" / "fixtures" / "written_by_764f1e3"
FLAGS = ["--model-name", "model", "--dataset-path", "store", "--sequence-length", "32", "--batch-size", "4"]
FLAGS += ["--learning-rate", "1e-2", "--lr-scheduler", "constant", "--mixed-precision", "no", "--mask-documents"]
FLAGS += ["--eval-fraction", "0.1", "--eval-every", "2", "--log-every", "1", "--checkpoint-every", "2"]


@pytest.fixture
def folder(tmp_path) -> Path:
    """A copy of the old files, with the tokenizer that belongs to them."""
    shutil.copytree(OLD, tmp_path / "old")
    for file in (ROOT / "data" / "tiny_gpt2").glob("tokenizer*"):
        shutil.copy(file, tmp_path / "old" / "model")
    return tmp_path / "old"


def test_a_token_store_of_an_older_version_is_opened_and_verified():
    store = open_store(OLD / "store")
    verify_store(store)
    manifest = json.loads((OLD / "run" / "checkpoints" / "step-00000004" / "state.json").read_text())
    assert store.fingerprint == manifest["run"]["data"]
    assert (len(store.tokens), len(store.documents)) == (10_008, 61)


def test_a_run_of_an_older_version_is_continued_bit_for_bit(folder, run):
    """The losses agree to 1e-6 on any processor; on the kind of processor that wrote them, every bit agrees."""
    assert verify(folder / "run" / "checkpoints" / "step-00000004") is None
    before = (folder / "run" / "metrics.jsonl").read_text()
    words = [sys.executable, ROOT / "scripts" / "train.py", *FLAGS, "--max-steps", "8", "--output-dir", "run"]
    ended = run(words, cwd=folder, prefix=["env", "OMP_NUM_THREADS=1"])
    assert ended.code == 0, ended.output
    assert "resuming after step 4 of 8; --max-steps was 4 and is now 8" in ended.output
    assert (folder / "run" / "metrics.jsonl").read_text().startswith(before)
    expected = json.loads((OLD / "continued.json").read_text())
    assert losses(folder / "run")[4:] == pytest.approx(expected["losses"], rel=1e-6)
    assert [row["eval_loss"] for row in rows(folder / "run", "eval_loss")][3:] == pytest.approx(
        expected["eval_losses"], rel=1e-6
    )
    if torch.backends.cpu.get_cpu_capability() == expected["instructions"]:
        assert losses(folder / "run")[4:] == expected["losses"]
        assert sha256(folder / "run" / "final" / "model.safetensors") == expected["final_sha256"]


def test_the_weights_of_an_old_checkpoint_are_loaded_exactly(folder, run):
    """A run that is already complete writes the weights that it loaded as its final model."""
    words = [sys.executable, ROOT / "scripts" / "train.py", *FLAGS, "--max-steps", "4", "--output-dir", "run"]
    ended = run(words, cwd=folder, warm=True)
    assert ended.code == 0, ended.output
    saved = load_file(OLD / "run" / "checkpoints" / "step-00000004" / "model.safetensors")
    final = load_file(folder / "run" / "final" / "model.safetensors")
    assert all(torch.equal(saved[name], tensor) for name, tensor in final.items())
