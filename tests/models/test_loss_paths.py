"""How the loss of twelve families of models is computed, and that it is transformers' own, in value and gradient."""

import pytest
import torch
import transformers

from forge_lib.config import IGNORED_LABEL
from forge_lib.models.loss import add_loss, evaluation_sums, loss_sum

VOCAB_SIZE = 97
SMALL = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "ffn_dim": 48,
    "word_embed_proj_dim": 32, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4,
    "num_local_experts": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SLICES = ("gpt2", "llama", "mistral", "qwen3", "phi", "opt", "gpt_neox", "bloom", "mixtral", "cohere", "granite")
WHOLE = ("gemma2",)


def build(kind: str, **options) -> transformers.PreTrainedModel:
    """Returns a small model of a family, without dropout."""
    known = set(transformers.AutoConfig.for_model(kind).to_dict())
    config = transformers.AutoConfig.for_model(
        kind, **{name: SMALL[name] for name in SMALL if name in known}, **options
    )
    for name in known:
        if "pdrop" in name or "dropout" in name:
            setattr(config, name, 0.0)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)


@pytest.fixture(scope="module")
def batch() -> dict[str, torch.Tensor]:
    """Two sequences of 16 tokens; two of them are no targets."""
    ids = torch.randint(3, VOCAB_SIZE, (2, 16), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, 4] = labels[1, 15] = IGNORED_LABEL
    return {"input_ids": ids, "labels": labels}


@pytest.mark.parametrize("kind", [*SLICES, *WHOLE])
def test_loss_and_gradients_are_those_of_transformers(kind, batch):
    model = build(kind)
    expected = model(**batch, use_cache=False).loss
    expected.backward()
    wanted = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    add_loss(model)
    assert bool(model.full_logits_reason) == (kind in WHOLE), model.full_logits_reason
    num_targets = (batch["labels"][:, 1:] != IGNORED_LABEL).sum()
    loss = loss_sum(model, batch) / num_targets
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-4, atol=1e-6, msg=name)
    assert evaluation_sums(model, batch)[0] == pytest.approx(expected.item() * num_targets.item(), rel=1e-5)


@pytest.mark.parametrize(
    "kind, options, reason",
    [
        ("gemma2", {}, "it changes the logits after its output layer"),  # by 1e-10 at random weights
        ("phi", {}, ""),
        ("mpt", {}, ""),
    ],
)
def test_a_change_of_the_logits_is_found_even_where_it_has_no_effect_yet(kind, options, reason, batch):
    assert add_loss(build(kind, **options)).full_logits_reason == reason


def test_scaled_logits_of_a_head_with_bias_need_the_whole_logits():
    """The bias is scaled too; it is 0 at the beginning, so the logits alone would not show it."""
    model = build("phi")
    own = model.forward.__func__

    def forward(self, *args, **kwargs):
        outputs = own(self, *args, **kwargs)
        outputs.logits = outputs.logits * 0.5
        return outputs

    model.forward = forward.__get__(model)
    assert not model.lm_head.bias.any()
    assert add_loss(model).full_logits_reason == "it changes the logits after its output layer"


def test_an_unusual_head_needs_the_whole_logits():
    model = build("llama")
    model.lm_head = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Linear(32, VOCAB_SIZE))
    assert add_loss(model).full_logits_reason == "its output layer is Sequential, not a linear layer"
