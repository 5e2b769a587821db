"""Evaluation mode that leaves a model as it was, and compiles nothing."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluation_mode(model: nn.Module, use_copy: bool = False) -> Iterator[nn.Module]:
    """Yields a model in evaluation mode; afterwards it is in the mode in which it was.

    Args:
        model: not wrapped.
        use_copy: evaluate a copy, for a model that changes its weights in evaluation mode (`check_model`): RWKV
            divides them, and multiplies them again in the next step of training, so a save between the two would be
            wrong.
    """
    was_training = model.training
    evaluated = copy.deepcopy(model) if use_copy else model
    evaluated.eval()
    try:
        with torch.compiler.set_stance("force_eager"):  # its batches have other shapes
            yield evaluated
    finally:
        model.train(was_training)
