"""The loss of a batch, against transformers' own loss and against sums by hand."""

import pytest
import torch
from small_models import BART, GPT2, LLAMA, build_model
from transformers import MixtralConfig

from forge_lib.config import IGNORED_LABEL
from forge_lib.data.blocks import BlockDataset, TokenStream
from forge_lib.models.loss import evaluation_sums, loss_sum, unused_parameters


@pytest.fixture(params=[GPT2, LLAMA], ids=["gpt2", "llama"])
def model(request, tmp_path):
    return build_model(request.param, tmp_path)


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """Three sequences of 32 tokens; the first five of each are no targets."""
    ids = torch.randint(97, (3, 32), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :5] = IGNORED_LABEL
    return {"input_ids": ids, "labels": labels}


def test_the_loss_is_the_one_that_transformers_gives(model, batch):
    expected = model(batch["input_ids"], labels=batch["labels"]).loss
    assert (loss_sum(model, batch) / (3 * 27)).item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_sums_of_an_evaluation_are_those_of_the_single_predictions(model, batch):
    logits = model(batch["input_ids"]).logits
    batch["labels"][0, 5] = logits[0, 4].argmax()  # at least one prediction is correct
    expected_loss, num_correct = 0.0, 0
    for sequence, labels in zip(logits, batch["labels"], strict=True):
        for position in range(5, 32):
            expected_loss -= sequence[position - 1].log_softmax(-1)[labels[position]].item()
            num_correct += int(sequence[position - 1].argmax() == labels[position])
    loss, num_targets, found_correct = evaluation_sums(model, batch)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert (num_targets, found_correct) == (3 * 27, num_correct)


def test_training_and_evaluation_have_the_same_loss_bit_for_bit(model, batch):
    assert evaluation_sums(model, batch)[0] == loss_sum(model, batch).item()


def test_masked_documents_have_the_loss_of_single_documents(model):
    """The loss of a block of documents with position ids is the sum of the documents' own losses."""
    model.eval()
    lengths = [7, 1, 12, 8, 4]
    documents = torch.tensor([0, *lengths]).cumsum(0).numpy().astype("uint64")
    tokens = torch.randint(97, (32,)).numpy().astype("uint16")
    item = BlockDataset(TokenStream(tokens, documents), 32, mask_documents=True)[0]
    batch = {name: tensor[None] for name, tensor in item.items()}
    packed = loss_sum(model, batch).item()
    alone = 0.0
    for start, stop in zip(documents[:-1].astype(int), documents[1:].astype(int), strict=True):
        ids = batch["input_ids"][:, start:stop]
        alone += loss_sum(model, {"input_ids": ids, "labels": ids}).item() if stop - start > 1 else 0.0
    assert packed == pytest.approx(alone, rel=1e-5)
    del batch["position_ids"]
    assert abs(loss_sum(model, batch).item() - packed) > 1e-3, "the mask must make a difference here"


def test_the_balance_of_experts_is_part_of_the_loss_if_the_configuration_asks_for_it(tmp_path, batch):
    """As transformers adds it; each micro-batch counts by its targets, and an evaluation reports the text alone."""
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    config = MixtralConfig(**sizes, output_router_logits=True, router_aux_loss_coef=0.5)
    model = build_model(config, tmp_path / "balanced")
    plain = build_model(MixtralConfig(**sizes, router_aux_loss_coef=0.5), tmp_path / "plain")
    outputs = model(batch["input_ids"], labels=batch["labels"])
    assert (loss_sum(model, batch) / (3 * 27)).item() == pytest.approx(outputs.loss.item(), rel=1e-5)
    text_alone = loss_sum(plain, batch).item()
    assert outputs.aux_loss.item() > 1
    assert loss_sum(model, batch).item() == pytest.approx(text_alone + 0.5 * outputs.aux_loss.item() * 81, rel=1e-5)
    assert evaluation_sums(model, batch)[0] == pytest.approx(text_alone, rel=1e-6)
    parts = [{name: tensor[rows] for name, tensor in batch.items()} for rows in (slice(0, 1), slice(1, 3))]
    divided = sum(loss_sum(model, part).item() for part in parts)
    assert divided == pytest.approx(loss_sum(model, batch).item(), rel=0.02)


def test_parameters_without_influence_on_the_loss_are_found(tmp_path):
    """The decoder of BART has attention to an encoder, which no text reaches."""
    for n, options in enumerate(({}, {"gradient_checkpointing": True}, {"lora_rank": 2})):
        assert unused_parameters(build_model(GPT2, tmp_path / str(n), **options)) == []
    bart = build_model(BART, tmp_path / "bart")
    names = unused_parameters(bart)
    assert names and all("encoder_attn" in name for name in names)
    assert all(parameter.grad is None for parameter in bart.parameters())
