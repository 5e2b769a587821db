"""What a checkpoint contains, and that it continues a run bit for bit."""

import json
import os

import pytest
import torch
from checkpoint_helpers import FILES, RUN, find, load, names, number, snapshot, step, trained_model, write

from forge_lib.checkpoints import restore
from forge_lib.checkpoints.saver import Saver
from forge_lib.errors import UserError


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_a_loaded_checkpoint_continues_bit_for_bit(tmp_path, name):
    model, optimizers = trained_model(name)
    saver = Saver(tmp_path, keep=2)
    saver.attach(optimizers)
    saver.save(2, model, optimizers, {"run": RUN})
    step(model, optimizers)
    saver.wait()
    state, other, other_optimizers = load(tmp_path, name)
    assert state == {"step": 2, "run": RUN}
    step(other, other_optimizers)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_two_machines_write_the_same_bytes(tmp_path):
    model, optimizers = trained_model()
    for name, background, state in [("a", True, {"run": RUN, "x": 1}), ("b", False, {"x": 1, "run": RUN})]:
        saver = Saver(tmp_path / name, keep=1, background=background)
        saver.save(1, model, optimizers, state)
        saver.wait()
    for file in FILES:
        assert (tmp_path / "a" / number(1) / file).read_bytes() == (tmp_path / "b" / number(1) / file).read_bytes()
    assert find(tmp_path / "a").sha256 == find(tmp_path / "b").sha256 != ""


def test_a_loaded_model_does_not_need_the_files_any_more(tmp_path):
    write(tmp_path, 1)
    _, model, optimizers = load(tmp_path)
    for file in FILES[:2]:
        os.truncate(tmp_path / number(1) / file, 0)  # reading a memory map of it would kill the process
    step(model, optimizers)


def test_a_checkpoint_of_format_1_still_loads(tmp_path):
    write(tmp_path, 1)
    manifest = json.loads((tmp_path / number(1) / "manifest.json").read_text())
    del manifest["sha256"]
    (tmp_path / number(1) / "manifest.json").write_text(json.dumps(manifest | {"format_version": 1}))
    assert load(tmp_path)[0]["step"] == 1


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([(4, 8), (8, 1)], r"for '1.bias', found shape \(2,\), expected shape \(1,\)"),
        ([(4, 8)], r"for '1.bias', found shape \(2,\), expected none"),
        ([(4, 8), (8, 2), (2, 1)], r"for '2.bias', found no tensor, expected shape \(1,\)"),
    ],
)
def test_another_model_is_refused_by_name_and_shape(tmp_path, sizes, message):
    write(tmp_path, 1)
    model = torch.nn.Sequential(*[torch.nn.Linear(*size) for size in sizes])
    with pytest.raises(
        UserError, match=rf"model\.safetensors does not fit the model: {message}. Keep the --model-name"
    ):
        restore.load(find(tmp_path).path, model, [torch.optim.AdamW(model.parameters())])


def test_another_optimizer_is_refused(tmp_path):
    write(tmp_path, 1)
    with pytest.raises(UserError, match=r"optimizer\.safetensors does not fit the model: .* --optimizer "):
        load(tmp_path, "muon")


def test_a_save_over_a_link_does_not_change_its_target(tmp_path):
    write(tmp_path / "other", 1, 2)
    before = snapshot(tmp_path / "other")
    (tmp_path / "here").mkdir()
    for done in (1, 2):
        (tmp_path / "here" / number(done)).symlink_to(tmp_path / "other" / number(done))
    write(tmp_path / "here", 2, keep=1)
    assert names(tmp_path / "here") == [number(2)] and find(tmp_path / "here").step == 2
    assert snapshot(tmp_path / "other") == before
