"""Attention of single documents, against the dense mask of transformers."""

import pytest
import torch
from small_models import GPT2, LLAMA, build_model
from transformers import MistralConfig

from forge_lib.models.document_attention import NAME, use_document_attention
from forge_lib.models.loss import evaluation_sums, loss_sum

SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
WINDOW = MistralConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2, sliding_window=4)


def batch_of_documents() -> dict[str, torch.Tensor]:
    """Two sequences of 16 tokens, of three documents and of one."""
    ids = torch.randint(97, (2, 16), generator=torch.Generator().manual_seed(0))
    positions = torch.stack([torch.cat([torch.arange(5), torch.arange(1), torch.arange(10)]), torch.arange(16)])
    return {"input_ids": ids, "labels": ids, "position_ids": positions}


@pytest.mark.parametrize("config", [GPT2, LLAMA, WINDOW], ids=["gpt2", "llama", "mistral with a window"])
def test_loss_and_gradients_are_those_of_a_mask(config, tmp_path):
    model, batch = build_model(config, tmp_path), batch_of_documents()
    loss = loss_sum(model, batch)
    loss.backward()
    expected = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    assert use_document_attention(model) and model.config._attn_implementation == NAME
    found = loss_sum(model, batch)
    found.backward()
    assert found.item() == pytest.approx(loss.item(), rel=1e-6)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-5)
    assert evaluation_sums(model, batch)[0] == pytest.approx(loss.item(), rel=1e-6)


def test_a_model_with_its_own_attention_keeps_it(tmp_path):
    model = build_model(LLAMA, tmp_path)
    model.set_attn_implementation("eager")
    assert not use_document_attention(model) and model.config._attn_implementation == "eager"


def test_it_also_writes_text(tmp_path):
    model = build_model(LLAMA, tmp_path).eval()
    ids = torch.tensor([[3, 4, 5]])
    expected = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert use_document_attention(model)
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0), expected)
