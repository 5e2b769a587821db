"""Which parts of a model --compile compiles, and whether they compute the same."""

import pytest
import torch
from small_models import GPT2, LLAMA, build_model
from torch import nn
from torch._dynamo.utils import counters

from forge_lib.models.compilation import compile_model
from forge_lib.models.loss import loss_sum


@pytest.fixture
def compiled(monkeypatch):
    """Compiles with the tracing compiler alone, without C++; returns the parts that were compiled."""
    parts, compile_part = [], nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda part: (parts.append(part), compile_part(part, backend="eager")))
    torch._dynamo.reset()
    counters.clear()
    yield parts
    torch._dynamo.reset()


@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_the_layers_are_traced_once_and_compute_the_same(config, tmp_path, compiled):
    model = build_model(config, tmp_path)
    ids = torch.randint(config.vocab_size, (2, 8), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids}
    expected = loss_sum(model, batch).item()
    compile_model(model)
    assert len(compiled) == config.num_hidden_layers > 1
    assert loss_sum(model, batch).item() == pytest.approx(expected, rel=1e-6)
    assert counters["frames"] == {"total": 1, "ok": 1}


def test_a_model_without_a_list_of_layers_is_compiled_as_a_whole(compiled):
    model = nn.Linear(2, 2)
    compile_model(model)
    assert compiled == [model]
