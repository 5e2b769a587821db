"""Models and tokenizers from folders, from the Hub's cache and from .gguf files."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from commands import ROOT
from safetensors.torch import save_file
from small_models import GPT2, LLAMA, build_model
from transformers import (
    CTRLConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    OpenAIGPTConfig,
    RobertaConfig,
    T5Config,
    XLNetConfig,
)

from forge_lib.config import ModelConfig, ModelNameConfig
from forge_lib.errors import UserError
from forge_lib.models.fingerprints import hash_config, hash_weights
from forge_lib.models.loading import (
    adapt_model,
    load_model,
    load_tokenizer,
    load_trained_model,
    model_exists,
)
from forge_lib.models.weight_files import has_weights

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
        load_trained_model(ModelNameConfig(model_name=TINY), 2048)


def test_a_trained_folder_is_loaded_with_its_weights_unless_from_scratch(trained):
    folder = str(trained / "final")
    loaded = load_model(ModelConfig(model_name=folder), 2048, 64)
    kept = load_trained_model(ModelNameConfig(model_name=folder), 2048)
    torch.manual_seed(0)
    fresh = load_model(ModelConfig(model_name=folder, from_scratch=True), 2048, 64)
    assert hash_weights(loaded) == hash_weights(kept) != hash_weights(fresh)


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


def save(folder: Path, config=LLAMA) -> Path:
    """Writes a model with random weights, in shards, and returns its folder."""
    build_model(config, folder / "config").save_pretrained(folder / "model", max_shard_size="20KB")
    return folder / "model"


def load(folder: Path, sequence_length: int = 32, **options):
    options = ModelConfig(model_name=str(folder), **options)
    return adapt_model(load_model(options, 97, sequence_length), options)


def rename(folder: Path, new_name) -> None:
    """Renames the tensors of a model to what `new_name` returns for each; None leaves one out."""
    model = load(folder)
    tensors = {new_name(name): tensor.clone() for name, tensor in model.state_dict().items() if new_name(name)}
    for path in folder.glob("model*"):
        path.unlink()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def only(folder: Path, name: str) -> None:
    """Leaves one file of weights, under another name."""
    first, *rest = sorted(folder.glob("model*"))
    for path in rest:
        path.unlink()
    first.rename(folder / name)


def move_below(folder: Path) -> None:
    (folder / "original").mkdir()
    for path in folder.glob("model*"):
        path.rename(folder / "original" / path.name)


def make_pointer(folder: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 1\n"
    for path in folder.glob("*.safetensors"):
        path.write_bytes(pointer)


WEIGHTS = {
    "no shards": (lambda f: [p.unlink() for p in f.glob("*.safetensors")], r"lacks \d+ of the files in model.*index"),
    "a missing shard": (lambda f: min(f.glob("*.safetensors")).unlink(), "lacks 1 of the files in model.*model-0000"),
    "a damaged index": (lambda f: (f / "model.safetensors.index.json").write_text("{"), "index.json is damaged"),
    **{
        f"{name} alone": (lambda f, name=name: only(f, name), f"found {re.escape(name)}, which cannot be loaded")
        for name in (
            "tf_model.h5",
            "flax_model.msgpack",
            "model.pth",
            "model.safetensors.part",
            "model.safetensors.tmp",
            "consolidated.00.pth",
            "adapter_model.safetensors",
            "model.q4.gguf",
            "tf_model.h5.index.json",
        )
    },
    "keys of DDP": (lambda f: rename(f, "module.{}".format), r"lack 21 tensor.*does not know: module\.lm_head"),
    "a missing layer": (lambda f: rename(f, lambda n: None if "layers.1" in n else n), r"lack 9 .*layers\.1"),
    "a missing output layer": (
        lambda f: rename(f, lambda n: None if "lm_head" in n else n),
        r"lack 1 .*lm_head.weight",
    ),
    "weights in a folder below": (lambda f: move_below(f), r"found original/model\S*\.safetensors"),
    "pointers of Git LFS": (make_pointer, "is a Git LFS pointer.*git lfs pull"),
    "a cut file": (lambda f: [os.truncate(p, 1000) for p in f.glob("*.safetensors")], "weights are damaged"),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights_that_do_not_load_are_an_error_unless_from_scratch(tmp_path, case):
    """Otherwise transformers replaces them by random ones."""
    change, message = WEIGHTS[case]
    folder = save(tmp_path)
    change(folder)
    with pytest.raises(UserError, match=message):
        load(folder)
    with pytest.raises(UserError, match=rf"{message}|has no weights"):
        load_trained_model(ModelNameConfig(model_name=str(folder)), 97)
    assert load(folder, from_scratch=True)


@pytest.mark.parametrize("content", ["cut", "pointer", "text", "empty"])
def test_a_pytorch_model_bin_that_cannot_be_read_is_one_line(tmp_path, content):
    folder = save(tmp_path)
    torch.save(load(folder).state_dict(), folder / "pytorch_model.bin")
    for path in folder.glob("model*"):
        path.unlink()
    assert load(folder)
    path = folder / "pytorch_model.bin"
    data = {"cut": path.read_bytes()[:-500], "text": b"hello", "empty": b"", "pointer": b"version https://git-lfs..."}
    path.write_bytes(data[content])
    with pytest.raises(UserError, match=r"weights are damaged|Git LFS pointer") as error:
        load(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("other", ["pytorch_model.bin.index.json", "pytorch_model.bin", "q4.gguf", "tf_model.h5"])
def test_files_of_other_formats_beside_complete_weights_are_ignored(tmp_path, other):
    """Many folders of the Hub have several formats, of which one is downloaded."""
    model = build_model(LLAMA, tmp_path / "config")
    model.save_pretrained(tmp_path / "model")
    content = '{"weight_map": {"a": "missing.bin"}}' if other.endswith("json") else "version https://git-lfs"
    (tmp_path / "model" / other).write_text(content)
    (tmp_path / "model" / "model.safetensors.index.json").write_text('{"weight_map": {"a": "missing.safetensors"}}')
    assert hash_weights(load(tmp_path / "model")) == hash_weights(model)


def test_tied_weights_and_recomputed_tensors_need_no_file(tmp_path):
    """The output layer of GPT-2 is its embedding; older files have the causal masks that are computed now."""
    folder = save(tmp_path, GPT2)
    rename(folder, lambda name: None if "lm_head" in name else name)
    assert torch.equal(load(folder).lm_head.weight, load(folder).transformer.wte.weight)
    tied = LlamaConfig(**LLAMA.to_dict() | {"tie_word_embeddings": True})
    folder = save(tmp_path / "tied", tied)
    rename(folder, lambda name: None if "lm_head" in name else name)
    assert load(folder)


def test_a_vocabulary_larger_than_the_weights_is_one_line(tmp_path):
    folder = save(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 200}))
    with pytest.raises(UserError, match=r"fit config\.json: \S+ has the shape \[97, 32\], expected \[200, 32\]"):
        load(folder)


SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
OPENAI = OpenAIGPTConfig(vocab_size=97, n_embd=32, n_layer=1, n_head=2)
CTRL = CTRLConfig(vocab_size=97, n_embd=32, n_layer=1, n_head=2, dff=8)
MAMBA = MambaConfig(vocab_size=97, hidden_size=16, state_size=4, num_hidden_layers=1)
ROBERTA = RobertaConfig(**SIZES, is_decoder=True, max_position_embeddings=34, pad_token_id=1)


@pytest.mark.parametrize("values", [{"n_layer": "two"}, {"n_head": 0}, []])
def test_a_wrong_config_json_is_one_line(tmp_path, values):
    GPT2.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | values if values else []))
    with pytest.raises(UserError, match="can be loaded") as error:
        load(tmp_path)
    assert "\n" not in str(error.value)


def test_a_tensor_that_the_model_does_not_know_is_logged(tmp_path, caplog):
    """Such as a layer that config.json leaves out."""
    folder = save(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    load(folder)
    assert "the model does not use 9 tensor(s) of its weights: model.layers.1." in caplog.text


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (OPENAI, {"gradient_checkpointing": True}, "--gradient-checkpointing does not work with openai-gpt"),
        (
            CTRL,
            {"gradient_checkpointing": True},
            "with ctrl",
        ),
        (MAMBA, {"lora_rank": 4}, "--lora-rank does not work with mamba"),
        (CTRL, {"lora_rank": 4}, "--lora-rank does not work with ctrl"),
        (
            T5Config(vocab_size=97, d_model=16, num_layers=1, d_ff=16, num_heads=2),
            {},
            "has no causal language model of type t5",
        ),
        (ROBERTA, {"sequence_length": 33}, "--sequence-length 33 is longer than the model's 32 positions"),
        (XLNetConfig(vocab_size=97, d_model=16, n_layer=1, n_head=2, d_inner=16), {}, None),
        (ROBERTA, {}, None),
        (OPENAI, {}, None),
    ],
)
def test_what_a_model_does_not_support_is_one_line_that_names_the_flag(tmp_path, config, options, message):
    config.save_pretrained(tmp_path)
    if message is None:
        ids = torch.arange(32)[None]
        assert load(tmp_path, **options)(input_ids=ids, use_cache=False).logits.shape == (1, 32, 97)
        return
    with pytest.raises(UserError, match=message) as error:
        load(tmp_path, **options)
    assert "\n" not in str(error.value)


def test_a_folder_without_the_files_of_a_tokenizer_is_an_error(tmp_path):
    """transformers makes a tokenizer of them that knows the end-of-text token only: all documents would be empty."""
    build_model(GPT2, tmp_path).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="its tokenizer knows no text, only special tokens; expected the files"):
        load_tokenizer(ModelNameConfig(model_name=str(tmp_path)))


def test_a_folder_with_an_adapter_only_is_an_error(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="a LoRA adapter without its model"):
        load_model(ModelConfig(model_name=str(tmp_path)), 97, 32)


def test_dropout_also_replaces_a_whole_number_and_never_lacks_an_effect(tmp_path):
    config = GPT2Config(vocab_size=97, n_positions=64, n_embd=32, n_layer=1, n_head=2, resid_pdrop=0)
    model = build_model(config, tmp_path, dropout=0.5)
    assert (model.config.resid_pdrop, model.transformer.h[0].attn.resid_dropout.p) == (0.5, 0.5)
    mamba = MambaConfig(vocab_size=97, hidden_size=16, num_hidden_layers=1)
    with pytest.raises(UserError, match="--dropout has no effect on models of type mamba; remove the flag"):
        build_model(mamba, tmp_path, dropout=0.5)


def test_flags_that_do_not_change_the_model_do_not_change_the_hash_of_its_configuration(tmp_path):
    """So a run can be continued with them."""
    hashes = {
        hash_config(build_model(GPT2, tmp_path / str(n), **options))
        for n, options in enumerate(({}, {"dropout": 0.1}, {"gradient_checkpointing": True}))
    }
    assert len(hashes) == 1
    other = GPT2Config(**GPT2.to_dict() | {"n_inner": 48})
    assert hash_config(build_model(other, tmp_path / "other")) not in hashes
