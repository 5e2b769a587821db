"""Optimizers and learning-rate schedules, built with torch.optim and transformers."""

from collections.abc import Callable

import torch
import transformers
from torch import nn

from forge_lib.config import OptimizationConfig
from forge_lib.errors import UserError

BETAS = (0.9, 0.95)  # of AdamW
MIN_RATE_FACTOR = 0.1  # the final learning rate of cosine_with_min_lr, as a fraction of the peak


def build_optimizers(model: nn.Module, config: OptimizationConfig) -> list[torch.optim.Optimizer]:
    """Returns the optimizers of the trainable parameters: one or, for Muon, Muon and AdamW.

    Weight decay applies to matrices, not to biases, norms and other vectors. Muon updates the matrices between the
    embeddings and the output layer; its updates are scaled to the size of AdamW's, so that both use one learning rate.

    Raises:
        UserError: Muon, and the model has no such matrix.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in parameters if parameter.ndim >= 2]
    vectors = [parameter for parameter in parameters if parameter.ndim < 2]
    if config.optimizer == "adafactor":
        return [torch.optim.Adafactor(_groups(matrices, vectors, config.weight_decay), lr=config.learning_rate)]
    if config.optimizer == "adamw":
        return [_adamw(matrices, vectors, config)]
    assert config.optimizer == "muon", f"build_optimizers lacks {config.optimizer}"
    outer = _find_outer_parameters(model)
    hidden = [parameter for parameter in matrices if id(parameter) not in outer and parameter.ndim == 2]
    others = [parameter for parameter in matrices if id(parameter) in outer or parameter.ndim != 2]
    if not hidden:
        raise UserError("--optimizer muon: the model has no matrix between its embeddings and its output; use adamw")
    muon = torch.optim.Muon(
        hidden, lr=config.learning_rate, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    return [muon, _adamw(others, vectors, config)] if others or vectors else [muon]


def _adamw(
    matrices: list[nn.Parameter], vectors: list[nn.Parameter], config: OptimizationConfig
) -> torch.optim.Optimizer:
    groups = _groups(matrices, vectors, config.weight_decay)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=BETAS, fused=True)


def _groups(matrices: list[nn.Parameter], vectors: list[nn.Parameter], weight_decay: float) -> list[dict]:
    pairs = [(matrices, weight_decay), (vectors, 0.0)]
    return [{"params": parameters, "weight_decay": decay} for parameters, decay in pairs if parameters]


def _find_outer_parameters(model: nn.Module) -> set[int]:
    """Returns the ids of the parameters of the embeddings and of the output layer."""
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    outer = {id(parameter) for module in embeddings for parameter in module.parameters()}
    head_names = ("lm_head", "embed_out")
    return outer | {id(p) for name, p in model.named_parameters() if any(head in name for head in head_names)}


def learning_rate_schedule(config: OptimizationConfig, num_steps: int) -> Callable[[int], float]:
    """Returns the learning rate as a pure function of the step (from 0): transformers' schedule of that name.

    Raises:
        UserError: warmup and decay together are longer than the run.
    """
    specific = {}
    if config.lr_scheduler == "warmup_stable_decay":
        specific["num_decay_steps"] = config.decay_steps or max(1, num_steps // 5)
        if config.warmup_steps + specific["num_decay_steps"] > num_steps:
            raise UserError(
                f"--warmup-steps {config.warmup_steps} and --decay-steps {specific['num_decay_steps']} do not fit "
                f"into a run of {num_steps} steps; lower one of them, or raise --max-steps or --epochs"
            )
    elif config.lr_scheduler == "cosine_with_min_lr":
        specific["min_lr_rate"] = MIN_RATE_FACTOR
    unused = torch.optim.SGD([torch.zeros(1)], lr=config.learning_rate)  # a scheduler needs an optimizer
    scheduler = transformers.get_scheduler(config.lr_scheduler, unused, config.warmup_steps, num_steps, specific)
    factor = scheduler.lr_lambdas[0]
    return lambda step: config.learning_rate * factor(step)


def set_learning_rate(optimizers: list[torch.optim.Optimizer], rate: float) -> None:
    """Sets the learning rate of all parameters; the optimizers may be prepared by accelerate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
