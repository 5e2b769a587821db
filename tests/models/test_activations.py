"""The faster activations compute what transformers' own ones do."""

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig
from transformers.activations import ACT2FN, FastGELUActivation, NewGELUActivation

from forge_lib.models.activations import fuse_activations

SMALL = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 100, "n_positions": 16}


@pytest.mark.parametrize("name", ["gelu_new", "gelu_fast"])
def test_values_and_gradients_are_those_of_transformers(name):
    model = torch.nn.ModuleDict({"act": ACT2FN[name]})
    x = torch.linspace(-12, 12, 5001, requires_grad=True)
    expected = model["act"](x)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), x)
    fuse_activations(model)
    found = model["act"](x)
    (gradient,) = torch.autograd.grad(found.sum(), x)
    assert torch.allclose(found, expected, atol=1e-6) and torch.allclose(gradient, expected_gradient, atol=3e-6)


def test_only_these_activations_are_replaced_and_the_configuration_stays():
    model = AutoModelForCausalLM.from_config(GPT2Config(**SMALL))
    fuse_activations(model)
    assert not any(isinstance(each, NewGELUActivation | FastGELUActivation) for each in model.modules())
    assert model.config.activation_function == "gelu_new" and len(model.transformer.h) == 2
    config = GPTNeoXConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=100, intermediate_size=64
    )
    other = AutoModelForCausalLM.from_config(config)
    kinds = [type(each) for each in other.modules()]
    fuse_activations(other)
    assert [type(each) for each in other.modules()] == kinds, "exact GELU"
