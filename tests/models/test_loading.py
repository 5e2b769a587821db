"""Models and tokenizers from folders, from the Hub's cache and from .gguf files."""

from pathlib import Path

import pytest
import torch
from commands import ROOT
from small_models import GPT2, build_model
from transformers import GPT2Config, MambaConfig

from forge_lib.config import ModelConfig, ModelNameConfig
from forge_lib.errors import UserError
from forge_lib.models.fingerprints import hash_weights
from forge_lib.models.loading import (
    check_document_mask,
    has_weights,
    load_model,
    load_tokenizer,
    load_trained_model,
    model_exists,
)

TINY = str(ROOT / "data" / "tiny_gpt2")


def test_dropout_is_off_unless_requested(tmp_path):
    config = GPT2Config(vocab_size=97, n_positions=64, n_embd=32, n_layer=1, n_head=2)
    assert config.resid_pdrop == 0.1
    off, on = build_model(config, tmp_path / "off"), build_model(config, tmp_path / "on", dropout=0.3)
    assert {m.p for m in off.modules() if isinstance(m, torch.nn.Dropout)} == {0.0}
    assert {m.p for m in on.modules() if isinstance(m, torch.nn.Dropout)} == {0.3}


@pytest.mark.parametrize(
    ("options", "vocab_size", "sequence_length", "message"),
    [
        ({"model_name": TINY}, 2048, 513, "--sequence-length 513 is longer than the model's 512 positions"),
        ({"model_name": TINY}, 3000, 64, "knows 3000 tokens, but the model's vocabulary has 2048"),
        ({"model_name": "no/such-model"}, 10, 8, "--model-name no/such-model: neither a local model folder nor"),
        ({"model_name": "./nowhere"}, 10, 8, "--model-name ./nowhere: no such file or folder"),
        ({"model_name": str(ROOT / "tests")}, 10, 8, "has no config.json"),
    ],
)
def test_a_model_that_cannot_be_used_is_reported(options, vocab_size, sequence_length, message):
    with pytest.raises(UserError, match=message):
        load_model(ModelConfig(**options), vocab_size, sequence_length)


@pytest.mark.parametrize(
    ("name", "exists"),
    [(TINY, True), ("./nowhere", False), ("a/b/c", False), ("no/such-model", False), ("some.gguf", True)],
)
def test_a_model_exists_if_it_is_a_folder_a_gguf_file_or_in_the_cache(name, exists):
    """The tests are offline: a name of the Hub that is not in the cache does not exist."""
    assert model_exists(name) == exists


def test_a_folder_without_weights_is_trained_from_scratch_and_never_evaluated():
    assert not has_weights(TINY)
    with pytest.raises(UserError, match="has no weights"):
        load_trained_model(ModelNameConfig(model_name=TINY))


def test_a_trained_folder_is_loaded_with_its_weights_unless_from_scratch(trained):
    folder = str(trained / "final")
    loaded = load_model(ModelConfig(model_name=folder), 2048, 64)
    kept = load_trained_model(ModelNameConfig(model_name=folder))
    torch.manual_seed(0)
    fresh = load_model(ModelConfig(model_name=folder, from_scratch=True), 2048, 64)
    assert hash_weights(loaded) == hash_weights(kept) != hash_weights(fresh)


def test_a_model_that_ignores_position_ids_cannot_mask_documents(tmp_path):
    check_document_mask(build_model(GPT2, tmp_path / "gpt2"))
    config = MambaConfig(vocab_size=97, hidden_size=16, state_size=4, num_hidden_layers=1)
    with pytest.raises(UserError, match="--mask-documents has no effect on models of type mamba"):
        check_document_mask(build_model(config, tmp_path / "mamba"))


def write_gguf(path: Path) -> dict[str, torch.Tensor]:
    """Writes a Llama of random weights with the gguf package, in llama.cpp's layout; returns its weights."""
    import gguf
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(260)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    tokens = ["<|endoftext|>"]
    tokens += [*bytes_to_unicode().values(), "ab", "cd", "ef"]
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * 259)
    writer.add_token_merges(["a b", "c d", "e f"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    torch.manual_seed(0)
    shapes = {"token_embd": (260, 32), "output_norm": (32,), "output": (260, 32)}
    shapes |= {"blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,)}
    shapes |= {"blk.0.attn_q": (32, 32), "blk.0.attn_k": (16, 32), "blk.0.attn_v": (16, 32)}
    shapes |= {"blk.0.attn_output": (32, 32), "blk.0.ffn_gate": (48, 32), "blk.0.ffn_up": (48, 32)}
    shapes |= {"blk.0.ffn_down": (32, 48)}
    weights = {f"{name}.weight": torch.randn(shape) for name, shape in shapes.items()}
    for name, tensor in weights.items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def test_a_gguf_file_is_loaded_as_transformers_reads_it(tmp_path):
    weights = write_gguf(tmp_path / "tiny.gguf")
    config = ModelConfig(model_name=str(tmp_path / "tiny.gguf"))
    tokenizer = load_tokenizer(config)
    assert tokenizer.decode(tokenizer("ab cd")["input_ids"]) == "ab cd"
    model = load_model(config, len(tokenizer), 32)
    assert torch.equal(model.model.embed_tokens.weight, weights["token_embd.weight"])
    assert torch.equal(model.model.layers[0].mlp.down_proj.weight, weights["blk.0.ffn_down.weight"])
