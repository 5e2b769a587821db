"""Model, loss, optimizers and schedules against the libraries' own answers."""

import math

import pytest
import torch
from commands import ROOT
from transformers import AutoTokenizer, GPT2Config, LlamaConfig, get_scheduler

from forge_lib.config import ModelConfig, ModelNameConfig, TrainConfig
from forge_lib.data.blocks import BlockDataset, TokenStream
from forge_lib.errors import UserError
from forge_lib.models import model as models

TINY = str(ROOT / "data" / "tiny_gpt2")
GPT2 = GPT2Config(vocab_size=97, n_positions=64, n_embd=32, n_layer=2, n_head=2)
LLAMA = LlamaConfig(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64,
)  # fmt: skip


def build(config, folder, **options):
    """A model from its config alone, as train.py builds it."""
    config.save_pretrained(folder)
    torch.manual_seed(0)
    return models.load_model(ModelConfig(model_name=str(folder), **options), vocab_size=97, sequence_length=32)


@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_the_loss_is_the_one_that_transformers_gives(tmp_path, config):
    model = build(config, tmp_path)
    ids = torch.randint(97, (3, 32))
    labels = ids.clone()
    labels[:, :5] = models.IGNORED
    output = model(ids, labels=labels)
    total = models.next_token_loss(output.logits, labels)
    assert (total / (3 * 27)).item() == pytest.approx(output.loss.item(), rel=1e-5)


@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_masked_documents_are_seen_one_by_one(tmp_path, config):
    """The loss of a block of documents with position ids is the sum of the documents' own losses."""
    model = build(config, tmp_path).eval()
    lengths = [7, 1, 12, 8, 4]
    documents = torch.tensor([0, *lengths]).cumsum(0).numpy().astype("uint64")
    tokens = torch.randint(97, (32,)).numpy().astype("uint16")
    item = BlockDataset(TokenStream(tokens, documents), 32, mask_documents=True)[0]
    batch = {name: tensor[None] for name, tensor in item.items()}
    labels = batch.pop("labels")
    packed = models.next_token_loss(model(**batch, use_cache=False).logits, labels)
    alone = 0.0
    for start, stop in zip(documents[:-1].astype(int), documents[1:].astype(int), strict=True):
        ids = batch["input_ids"][:, start:stop]
        alone += models.next_token_loss(model(ids).logits, ids) if stop - start > 1 else 0.0
    assert packed.item() == pytest.approx(alone.item(), rel=1e-5)
    del batch["position_ids"]
    unmasked = models.next_token_loss(model(**batch).logits, labels)
    assert abs(unmasked.item() - packed.item()) > 1e-3, "the mask must make a difference here"


def optimization(**options) -> TrainConfig:
    return TrainConfig(model_name="m", dataset_path="d", output_dir="o", **options)


def test_weight_decay_acts_on_matrices_alone(tmp_path):
    model = build(LLAMA, tmp_path)
    (optimizer,) = models.build_optimizers(model, optimization(weight_decay=0.3))
    for group in optimizer.param_groups:
        assert {p.ndim for p in group["params"]} == ({2} if group["weight_decay"] else {1})
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))


@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_muon_takes_the_hidden_matrices_and_adamw_the_rest(tmp_path, config):
    model = build(config, tmp_path)
    muon, adamw = models.build_optimizers(model, optimization(optimizer="muon"))
    names = {id(p): name for name, p in model.named_parameters()}
    in_muon, in_adamw = (
        {names[id(p)] for group in each.param_groups for p in group["params"]} for each in (muon, adamw)
    )
    assert in_muon | in_adamw == set(names.values())
    assert not in_muon & in_adamw
    assert all("weight" in name and "norm" not in name and "ln_" not in name for name in in_muon)
    assert not any(part in name for name in in_muon for part in ("embed", "wte", "wpe", "lm_head"))


@pytest.mark.parametrize("name", ["cosine", "linear", "constant_with_warmup", "warmup_stable_decay", "inverse_sqrt"])
def test_the_learning_rate_is_transformers_schedule_and_depends_on_the_step_alone(name):
    config = optimization(lr_scheduler=name, warmup_steps=5, learning_rate=0.1, decay_steps=7)
    schedule = models.learning_rate_schedule(config, 40)
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


def test_dropout_is_off_unless_asked_for(tmp_path):
    config = GPT2Config(vocab_size=97, n_positions=64, n_embd=32, n_layer=1, n_head=2)
    assert config.resid_pdrop == 0.1
    off, on = build(config, tmp_path / "off"), build(config, tmp_path / "on", dropout=0.3)
    assert {m.p for m in off.modules() if isinstance(m, torch.nn.Dropout)} == {0.0}
    assert {m.p for m in on.modules() if isinstance(m, torch.nn.Dropout)} == {0.3}


@pytest.mark.parametrize(
    ("options", "vocab_size", "sequence_length", "message"),
    [
        ({"model_name": TINY}, 2048, 513, "--sequence-length 513 is longer than the model's 512 positions"),
        ({"model_name": TINY}, 3000, 64, "knows 3000 tokens, but the model's vocabulary has 2048"),
        ({"model_name": "no/such-model"}, 10, 8, "--model-name no/such-model: neither a model folder here nor"),
        ({"model_name": "./nowhere"}, 10, 8, "--model-name ./nowhere: no such file or folder"),
        ({"model_name": str(ROOT / "tests")}, 10, 8, "holds no config.json"),
    ],
)
def test_a_model_that_cannot_be_used_is_named(options, vocab_size, sequence_length, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        models.load_model(ModelConfig(**options), vocab_size, sequence_length)


def test_a_folder_without_weights_is_trained_from_scratch_and_evaluated_never():
    assert not models.has_weights(TINY)
    with pytest.raises(UserError, match="holds no weights"):
        models.load_trained_model(ModelNameConfig(model_name=TINY))


def test_a_trained_folder_is_loaded_with_its_weights_unless_from_scratch(trained):
    folder = str(trained / "final")
    loaded = models.load_model(ModelConfig(model_name=folder), 2048, 64)
    kept = models.load_trained_model(ModelNameConfig(model_name=folder))
    torch.manual_seed(0)
    fresh = models.load_model(ModelConfig(model_name=folder, from_scratch=True), 2048, 64)
    assert models.hash_weights(loaded) == models.hash_weights(kept) != models.hash_weights(fresh)


def test_text_follows_from_the_seed_and_leaves_the_random_state_alone(trained):
    tokenizer = AutoTokenizer.from_pretrained(trained / "final")
    model = models.load_trained_model(ModelNameConfig(model_name=str(trained / "final"))).train()
    before = torch.get_rng_state()
    texts = [models.generate_text(model, tokenizer, "The", seed, max_new_tokens=12) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert math.isfinite(len(models.generate_text(model, tokenizer, "", 1, 4, temperature=0)))


def test_a_gguf_file_is_loaded_as_transformers_reads_it(tmp_path):
    """A Llama of random weights, written with the gguf package in llama.cpp's layout."""
    import gguf

    path = tmp_path / "tiny.gguf"
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
    from transformers.convert_slow_tokenizer import bytes_to_unicode

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
    config = ModelConfig(model_name=str(path))
    tokenizer = models.load_tokenizer(config)
    assert tokenizer.decode(tokenizer("ab cd")["input_ids"]) == "ab cd"
    model = models.load_model(config, len(tokenizer), 32)
    assert torch.equal(model.model.embed_tokens.weight, weights["token_embd.weight"])
    assert torch.equal(model.model.layers[0].mlp.down_proj.weight, weights["blk.0.ffn_down.weight"])
