"""Models small enough to build in every test."""

from pathlib import Path

import torch
from transformers import BartConfig, GPT2Config, LlamaConfig, PreTrainedConfig, PreTrainedModel

from forge_lib.config import ModelConfig
from forge_lib.models.loading import adapt_model, load_model

GPT2 = GPT2Config(vocab_size=97, n_positions=64, n_embd=32, n_layer=2, n_head=2)
LLAMA = LlamaConfig(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64,
)  # fmt: skip
BART = BartConfig(
    vocab_size=97, d_model=32, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=48, encoder_layers=1,
    encoder_attention_heads=2, encoder_ffn_dim=48, max_position_embeddings=64, is_decoder=True,
    is_encoder_decoder=False,
)  # fmt: skip


def build_model(config: PreTrainedConfig, folder: Path, **options) -> PreTrainedModel:
    """Returns a model with random weights from a configuration in `folder`, as train.py builds it."""
    config.save_pretrained(folder)
    torch.manual_seed(0)
    options = ModelConfig(model_name=str(folder), **options)
    return adapt_model(load_model(options, vocab_size=97, sequence_length=32), options)
