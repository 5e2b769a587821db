"""`--micro-batch-size auto`: how many sequences fit into the free memory."""

import resource

import pytest
import torch
from accelerate import Accelerator

from forge_lib.config import AUTO, TrainConfig
from forge_lib.flags import parse_config
from forge_lib.models.loading import load_model
from forge_lib.training import micro_batch

REQUIRED = ["--model-name", "data/tiny_gpt2", "--dataset-path", "-", "--output-dir", "-"]


@pytest.fixture
def no_cgroups(monkeypatch, tmp_path):
    """A system without cgroups."""
    monkeypatch.setattr(micro_batch, "CGROUP_OF_PROCESS", tmp_path / "cgroup")
    return tmp_path


@pytest.mark.parametrize(
    ("line", "top", "limit", "use", "cache"),
    [
        ("0::/a/b", "", "memory.max", "memory.current", "inactive_file"),
        ("4:memory:/a/b", "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ],
)
def test_the_tightest_limit_counts_of_a_cgroup_and_those_around_it(
    monkeypatch, no_cgroups, line, top, limit, use, cache
):
    root, b = no_cgroups / "root", no_cgroups / "root" / "a" / "b"
    b.mkdir(parents=True)
    monkeypatch.setitem(micro_batch.CGROUPS, top, (root, limit, use, cache))
    (no_cgroups / "cgroup").write_text(f"9:pids:/x\n{line}\n")
    for folder, most, used, cached in ((b, "5000000", 1000000, 500000), (b.parent, "4000000", 2000000, 0)):
        (folder / limit).write_text(f"{most}\n")
        (folder / use).write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 1\n{cache} {cached}\n")
    assert micro_batch.free_memory() == 2_000_000 and micro_batch.free_memory(2) == 1_000_000
    (b.parent / limit).write_text("max\n")
    assert micro_batch.free_memory() == 4_500_000


def test_the_limit_of_the_address_space_counts(monkeypatch, no_cgroups):
    used = micro_batch.psutil.Process().memory_info().vms
    monkeypatch.setattr(resource, "getrlimit", lambda which: (used + 50_000_000, -1))
    assert micro_batch.free_memory() == pytest.approx(50_000_000, abs=40_000_000)


def test_the_size_follows_the_free_memory_and_the_model_is_as_before():
    model = load_model(parse_config(TrainConfig, REQUIRED), 100, 256)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sizes = []
    block = torch.arange(256) % 100
    dataset = [{"input_ids": block, "labels": block}]
    for free in (0, 60_000_000, 150_000_000, 20_000_000_000):
        sizes.append(micro_batch.largest_micro_batch(Accelerator(cpu=True), model, dataset, 64, free))
    assert sizes[0] == 1 and sizes == sorted(sizes) and 1 < sizes[2] < sizes[3] == 64
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_flag_takes_a_number_or_auto():
    assert parse_config(TrainConfig, [*REQUIRED, "--micro-batch-size", "auto"]).micro_batch_size == AUTO
    assert parse_config(TrainConfig, [*REQUIRED, "--micro-batch-size", "3"]).micro_batch_size == 3
