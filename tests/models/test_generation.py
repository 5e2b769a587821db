"""Text from a model."""

import torch
from transformers import AutoTokenizer

from forge_lib.config import ModelNameConfig
from forge_lib.models.generation import generate_text
from forge_lib.models.loading import load_trained_model


def test_text_follows_from_the_seed_and_does_not_change_the_random_state(trained):
    tokenizer = AutoTokenizer.from_pretrained(trained / "final")
    model = load_trained_model(ModelNameConfig(model_name=str(trained / "final"))).train()
    before = torch.get_rng_state()
    texts = [generate_text(model, tokenizer, "The", seed, max_new_tokens=12) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training


def test_an_empty_prompt_starts_like_a_document(trained):
    tokenizer = AutoTokenizer.from_pretrained(trained / "final")
    model = load_trained_model(ModelNameConfig(model_name=str(trained / "final")))
    generated = generate_text(model, tokenizer, "", 1, max_new_tokens=4, temperature=0)
    ids = torch.tensor([[tokenizer.eos_token_id]])
    for _ in range(4):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    assert generated == tokenizer.decode(ids[0], skip_special_tokens=True)
