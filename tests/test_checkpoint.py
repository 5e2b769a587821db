"""Checkpoints: complete or not there at all."""

import os

import pytest
import torch
from accelerate import Accelerator

from forge_lib import checkpoint
from forge_lib.config import TrainConfig, UserError
from forge_lib.model import build_optimizers


def trained_model(optimizer: str) -> tuple[torch.nn.Module, list[torch.optim.Optimizer]]:
    """A small network after two steps."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
    config = TrainConfig(model_name="m", dataset_path="d", output_dir="o", optimizer=optimizer)
    optimizers = build_optimizers(model, config)
    for _ in range(2):
        step(model, optimizers)
    return model, optimizers


def step(model, optimizers) -> None:
    model(torch.ones(3, 4)).square().sum().backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_a_loaded_checkpoint_goes_on_bit_for_bit(tmp_path, name):
    model, optimizers = trained_model(name)
    path = checkpoint.save(tmp_path, 2, model, optimizers, {"run": {"data": "x"}}, keep=2)
    step(model, optimizers)
    other = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
    config = TrainConfig(model_name="m", dataset_path="d", output_dir="o", optimizer=name)
    other_optimizers = build_optimizers(other, config)
    state = checkpoint.load(path, Accelerator(cpu=True), other, other_optimizers)
    assert state["step"] == 2
    step(other, other_optimizers)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["bit", "truncate", "remove"])
def test_a_damaged_checkpoint_is_named_and_the_older_one_is_taken(tmp_path, file, damage):
    model, optimizers = trained_model("adamw")
    for number in (1, 2):
        checkpoint.save(tmp_path, number, model, optimizers, {"run": {}}, keep=2)
    path = tmp_path / "step-00000002" / file
    if damage == "bit":
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif damage == "truncate":
        os.truncate(path, path.stat().st_size - 3)
    else:
        path.unlink()
    found, passed_over = checkpoint.find(tmp_path, "auto")
    assert found.name == "step-00000001"
    assert "step-00000002 is passed over" in passed_over[0]
    with pytest.raises(UserError, match="--resume"):
        checkpoint.find(tmp_path, str(tmp_path / "step-00000002"))


def test_only_the_newest_are_kept_and_leftovers_are_swept(tmp_path):
    model, optimizers = trained_model("adamw")
    (tmp_path / ".partial-step-00000001").mkdir()
    for number in (1, 2, 3, 3):
        checkpoint.save(tmp_path, number, model, optimizers, {"run": {}}, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]


def test_a_new_checkpoint_is_kept_beside_a_damaged_newer_one(tmp_path):
    """Resumed from step 1, since step 3 is damaged, the run writes step 2: that one must stay."""
    model, optimizers = trained_model("adamw")
    for number in (1, 3):
        checkpoint.save(tmp_path, number, model, optimizers, {"run": {}}, keep=2)
    (tmp_path / "step-00000003" / "state.json").unlink()
    path = checkpoint.save(tmp_path, 2, model, optimizers, {"run": {}}, keep=1)
    assert checkpoint.find(tmp_path, "auto")[0] == path


def test_another_run_is_refused_with_both_values(tmp_path):
    model, optimizers = trained_model("adamw")
    path = checkpoint.save(tmp_path, 1, model, optimizers, {"run": {"data": "x", "batch_size": 8}}, keep=1)
    checkpoint.check_run(path, {"data": "x", "batch_size": 8}, num_steps=1)
    with pytest.raises(UserError, match="is at step 1, but the run shall end at step 0"):
        checkpoint.check_run(path, {"data": "x", "batch_size": 8}, num_steps=0)
    with pytest.raises(UserError, match="batch_size was 8 and is now 16"):
        checkpoint.check_run(path, {"data": "x", "batch_size": 16}, num_steps=1)


def test_never_refuses_a_folder_that_holds_a_checkpoint(tmp_path):
    assert checkpoint.find(tmp_path, "never") == (None, [])
    model, optimizers = trained_model("adamw")
    checkpoint.save(tmp_path, 1, model, optimizers, {"run": {}}, keep=1)
    with pytest.raises(UserError, match=r"--resume never, but .* holds step-00000001"):
        checkpoint.find(tmp_path, "never")
