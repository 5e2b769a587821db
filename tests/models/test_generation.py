"""Text from a model."""

import torch
from transformers import AutoTokenizer

from forge_lib.config import ModelNameConfig
from forge_lib.models.generation import generate_ids
from forge_lib.models.loading import load_trained_model


def test_text_follows_from_the_seed_and_does_not_change_the_random_state(trained):
    tokenizer = AutoTokenizer.from_pretrained(trained / "final")
    model = load_trained_model(ModelNameConfig(model_name=str(trained / "final")), 2048).train()
    before = torch.get_rng_state()
    prompt, end = tokenizer("The")["input_ids"], tokenizer.eos_token_id
    ids = [generate_ids(model, prompt, end, seed, max_new_tokens=12) for seed in (1, 1, 2)]
    assert ids[0] == ids[1] != ids[2]
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training


def test_temperature_0_takes_the_likeliest_tokens_after_the_prompt(trained):
    tokenizer = AutoTokenizer.from_pretrained(trained / "final")
    model = load_trained_model(ModelNameConfig(model_name=str(trained / "final")), 2048)
    end = tokenizer.eos_token_id
    generated = generate_ids(model, [end], end, 1, max_new_tokens=4, temperature=0)
    ids = torch.tensor([[tokenizer.eos_token_id]])
    for _ in range(4):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    assert generated == ids[0].tolist()
