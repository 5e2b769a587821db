"""Optimizers and schedules against the results of the libraries."""

import pytest
import torch
from small_models import GPT2, LLAMA, build_model
from transformers import get_scheduler

from forge_lib.config import TrainConfig
from forge_lib.errors import UserError
from forge_lib.models.optimizers import build_optimizers, learning_rate_schedule, set_learning_rate


def optimization(**options) -> TrainConfig:
    return TrainConfig(model_name="m", dataset_path="d", output_dir="o", **options)


def test_weight_decay_acts_on_matrices_alone(tmp_path):
    model = build_model(LLAMA, tmp_path)
    (optimizer,) = build_optimizers(model, optimization(weight_decay=0.3))
    for group in optimizer.param_groups:
        assert {p.ndim for p in group["params"]} == ({2} if group["weight_decay"] else {1})
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))


@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_muon_takes_the_hidden_matrices_and_adamw_the_rest(tmp_path, config):
    model = build_model(config, tmp_path)
    muon, adamw = build_optimizers(model, optimization(optimizer="muon"))
    names = {id(p): name for name, p in model.named_parameters()}
    in_muon, in_adamw = (
        {names[id(p)] for group in each.param_groups for p in group["params"]} for each in (muon, adamw)
    )
    assert in_muon | in_adamw == set(names.values())
    assert not in_muon & in_adamw
    assert all("weight" in name and "norm" not in name and "ln_" not in name for name in in_muon)
    assert not any(part in name for name in in_muon for part in ("embed", "wte", "wpe", "lm_head"))


def test_muon_without_a_hidden_matrix_is_reported():
    with pytest.raises(UserError, match=r"--optimizer muon: .* use adamw"):
        build_optimizers(torch.nn.Embedding(4, 2), optimization(optimizer="muon"))


@pytest.mark.parametrize("name", ["cosine", "linear", "constant_with_warmup", "warmup_stable_decay", "inverse_sqrt"])
def test_the_learning_rate_is_transformers_schedule_and_depends_on_the_step_alone(name):
    config = optimization(lr_scheduler=name, warmup_steps=5, learning_rate=0.1, decay_steps=7)
    schedule = learning_rate_schedule(config, 40)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    specific = {"num_decay_steps": 7} if name == "warmup_stable_decay" else {}
    scheduler = get_scheduler(name, optimizer, 5, 40, specific)
    expected = []
    for _ in range(40):
        expected.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert [schedule(step) for step in range(40)] == pytest.approx(expected)
    assert schedule(17) == pytest.approx(expected[17])


def test_warmup_and_decay_longer_than_the_run_are_reported():
    config = optimization(lr_scheduler="warmup_stable_decay", warmup_steps=30, decay_steps=20)
    with pytest.raises(UserError, match="--warmup-steps 30 and --decay-steps 20 do not fit into a run of 40 steps"):
        learning_rate_schedule(config, 40)


def test_the_learning_rate_is_set_for_all_parameters_of_all_optimizers(tmp_path):
    optimizers = build_optimizers(build_model(GPT2, tmp_path), optimization(optimizer="muon"))
    set_learning_rate(optimizers, 0.25)
    assert [group["lr"] for optimizer in optimizers for group in optimizer.param_groups] == [0.25] * 3
