"""How many sequences a forward pass has: what is fast, what fits into the free memory, and what the flag says."""

import resource
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from forge_lib.config import AUTO, TrainConfig
from forge_lib.errors import UserError
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


@dataclass
class Alone:
    """The session of one process."""

    config: TrainConfig
    device: str
    agreement = SimpleNamespace(mixed_precision="no", processes=[SimpleNamespace(machine=0)])
    peers = SimpleNamespace(set_status=lambda text: None, barrier=lambda name: None)
    world = SimpleNamespace(num_local_processes=1)


def choose(monkeypatch, fitting: int, *flags: str, device: str = "cuda", is_balanced: bool = False) -> int:
    """Returns the chosen size of a process whose share is 24 of 48 sequences, and whose memory holds `fitting`."""
    monkeypatch.setattr(micro_batch, "largest_micro_batch", lambda *given: min(given[3], fitting))
    session = Alone(parse_config(TrainConfig, [*REQUIRED, "--batch-size", "48", *flags]), device)
    accelerator = SimpleNamespace(process_index=0, device=device)
    balancer = SimpleNamespace(shares=[24, 24], is_on=is_balanced)
    inputs = SimpleNamespace(model=None, dataset=None)
    return micro_batch.choose_micro_batch(session, accelerator, inputs, balancer)[1].micro_batch_size


def test_without_the_flag_a_gpu_gets_a_fast_size_or_what_fits(monkeypatch, capsys):
    assert choose(monkeypatch, 1000) == 24, "its share"
    assert choose(monkeypatch, 1000, "--sequence-length", "2048") == 8, "16,384 tokens"
    assert choose(monkeypatch, 1000, "--compile", is_balanced=True) == 8, "the share changes"
    assert capsys.readouterr().err == ""
    assert choose(monkeypatch, 5) == 5 and choose(monkeypatch, 0) == 1
    line = "process 0: micro-batches of {} sequences, because 24 do not fit into the memory of its GPU\n"
    assert capsys.readouterr().err == line.format(5) + line.format(1)
    assert choose(monkeypatch, 5, "--micro-batch-size", "7") == 7
    assert choose(monkeypatch, 5, device="cpu") == 2


def test_auto_is_what_fits_of_all_that_the_process_may_get(monkeypatch):
    assert choose(monkeypatch, 1000, "--micro-batch-size", "auto") == 24
    assert choose(monkeypatch, 1000, "--micro-batch-size", "auto", is_balanced=True) == 48
    with pytest.raises(UserError, match="auto: not even one sequence fits into the memory of cuda"):
        choose(monkeypatch, 0, "--micro-batch-size", "auto")
