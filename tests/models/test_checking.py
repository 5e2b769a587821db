"""Two short forward passes before training show whether a model is causal, and what its evaluation mode does."""

import math

import pytest
import torch
from small_models import GPT2, LLAMA, build_model
from transformers import BertConfig, ElectraConfig, MambaConfig, MixtralConfig, RobertaConfig, RwkvConfig

from forge_lib.config import ModelConfig
from forge_lib.errors import UserError
from forge_lib.models.checking import check_model
from forge_lib.models.evaluation_mode import evaluation_mode
from forge_lib.models.fingerprints import hash_weights
from forge_lib.models.loading import load_model

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
MAMBA = MambaConfig(vocab_size=97, hidden_size=16, state_size=4, num_hidden_layers=1)
RWKV = RwkvConfig(vocab_size=97, hidden_size=32, num_hidden_layers=4, rescale_every=2)
MIXTRAL = MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4, max_position_embeddings=64)


@pytest.mark.parametrize("config", [GPT2, LLAMA, MAMBA, MIXTRAL])
def test_a_causal_model_is_accepted_and_not_changed(tmp_path, config):
    model = build_model(config, tmp_path)
    before = hash_weights(model)
    assert not check_model(model, mask_documents=False, sequence_length=32)
    assert hash_weights(model) == before
    assert model.training


@pytest.mark.parametrize("kind", [BertConfig, ElectraConfig, RobertaConfig])
def test_a_model_that_sees_later_tokens_is_refused_and_its_decoder_is_accepted(tmp_path, kind):
    model = build_model(kind(**SIZES, max_position_embeddings=64), tmp_path / "encoder")
    with pytest.raises(UserError, match=rf"\(type {kind.model_type}\) predicts tokens from later ones.*is_decoder"):
        check_model(model, mask_documents=False, sequence_length=32)
    assert not check_model(
        build_model(kind(**SIZES, is_decoder=True), tmp_path / "decoder"), mask_documents=False, sequence_length=32
    )


@pytest.mark.parametrize("sizes", [{"vocab_size": 7}, {"initializer_range": 1e-3}, {"max_position_embeddings": 4}])
def test_small_and_quiet_encoders_are_refused_too(tmp_path, sizes):
    BertConfig(**SIZES | sizes).save_pretrained(tmp_path)
    model = load_model(ModelConfig(model_name=str(tmp_path)), vocab_size=5, sequence_length=4)
    with pytest.raises(UserError, match="predicts tokens from later ones"):
        check_model(model, mask_documents=False, sequence_length=4)


def test_weights_that_are_not_finite_are_named_as_such(tmp_path):
    model = build_model(GPT2, tmp_path)
    model.transformer.ln_f.weight.data[0] = math.nan
    with pytest.raises(UserError, match="the model's logits are not finite"):
        check_model(model, mask_documents=False, sequence_length=32)


def test_a_model_that_ignores_position_ids_cannot_mask_documents(tmp_path):
    check_model(build_model(GPT2, tmp_path / "gpt2"), mask_documents=True, sequence_length=32)
    with pytest.raises(UserError, match="--mask-documents has no effect on models of type mamba"):
        check_model(build_model(MAMBA, tmp_path / "mamba"), mask_documents=True, sequence_length=32)


def test_a_model_that_changes_its_weights_in_evaluation_mode_is_found_and_evaluated_as_a_copy(tmp_path):
    """RWKV divides weights in evaluation mode, and multiplies them in the next forward pass of training."""
    ids = torch.arange(10)[None]
    model = build_model(RWKV, tmp_path / "checked")
    before = hash_weights(model)
    assert check_model(model, mask_documents=False, sequence_length=32)
    assert hash_weights(model) != before, "why a model is loaded again after the check"
    model = build_model(RWKV, tmp_path / "trained")
    expected, loaded = model(ids).logits, build_model(RWKV, tmp_path / "loaded").eval()
    with evaluation_mode(model, use_copy=True) as evaluated:
        assert not evaluated.training
        assert torch.equal(evaluated(ids).logits, loaded(ids).logits)
        assert hash_weights(evaluated) != hash_weights(model) == before
    assert model.training
    assert torch.equal(model(ids).logits, expected)
