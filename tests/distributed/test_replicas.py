"""Which processes have a different copy of the model."""

from types import SimpleNamespace

import pytest
import torch

from forge_lib.distributed import replicas
from forge_lib.distributed.replicas import find_diverged, replica

HOSTS = ("alice", "bob", "carol")


@pytest.fixture
def compare(monkeypatch):
    """Returns the result of find_diverged for the tensors of each process; all run in this one, in turn."""

    def run(tensors: list[dict[str, torch.Tensor]], alike: bool) -> str:
        accelerator = SimpleNamespace(num_processes=len(tensors), device=torch.device("cpu"))
        agreement = SimpleNamespace(alike=alike, processes=[SimpleNamespace(host=host) for host in HOSTS])
        totals: list[torch.Tensor] = []
        rows: list[list] = []
        monkeypatch.setattr(replicas, "gather", lambda total: totals.append(total) or torch.tensor([0, 1]))
        monkeypatch.setattr(replicas, "gather_object", lambda row: rows.extend(row) or rows)
        for each in tensors[:-1]:
            find_diverged(accelerator, each, agreement)
        monkeypatch.setattr(replicas, "gather", lambda total: torch.cat([*totals, total]))
        return find_diverged(accelerator, tensors[-1], agreement)

    return run


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {"first": torch.ones(3), "second": torch.full((2,), value)}


def test_equal_replicas_are_not_reported(compare):
    assert compare([tensors(1.0)] * 3, alike=True) == compare([tensors(1.0)] * 3, alike=False) == ""


def test_one_other_bit_is_reported_with_the_process_and_the_tensor(compare):
    found = compare([tensors(1.0), tensors(1.0 + 2**-23), tensors(1.0)], alike=True)
    assert found == "the replica of process 1 on bob differs from the others in 1 of 2 tensors (second, …)"


def test_processes_that_round_differently_may_differ_by_a_thousandth(compare):
    assert compare([tensors(1.0), tensors(1.0005), tensors(1.0)], alike=False) == ""
    for value in (1.002, float("nan")):
        found = compare([tensors(1.0), tensors(1.0), tensors(value)], alike=False)
        assert found == "the replica of process 2 on carol differs from the others in 1 of 2 tensors (second, …)"


def test_a_replica_consists_of_the_parameters_and_the_optimizers_states():
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2)).sum().backward()
    optimizer.step()
    names = set(replica(model, [optimizer]))
    assert {"weight", "bias", "optimizer 0, parameter 0, exp_avg", "optimizer 0, parameter 1, exp_avg_sq"} <= names
