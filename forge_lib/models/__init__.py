"""Tokenizer and model: loading, loss, optimizers, generation, and the folder of the final model."""
