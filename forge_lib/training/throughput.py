"""Tokens per second and model FLOP/s utilization."""

from torch import nn


def model_flops_per_token(model: nn.Module, sequence_length: int) -> float:
    """Returns the FLOPs of a training step per token: 6 per parameter, plus 12 L d T for attention.

    Chowdhery et al., "PaLM", 2022, appendix B. Frozen parameters, as with LoRA, take 4 instead of 6.
    """
    config = model.config.get_text_config()
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    head = model.get_output_embeddings()
    used_twice = {id(p) for p in head.parameters()} if head is not None else set()
    flops = sum(
        (6 if p.requires_grad else 4) * p.numel()
        for p in model.parameters()
        if id(p) not in embeddings or id(p) in used_twice
    )
    layers, width = (getattr(config, name, 0) for name in ("num_hidden_layers", "hidden_size"))
    return flops + 12 * layers * width * sequence_length


class Throughput:
    """Tokens per second of all processes, and model FLOP/s utilization.

    Args:
        model: unwrapped.
        sequence_length: tokens per sequence.

    Attributes:
        peak_flops: FLOP/s of a large matrix product, summed over all processes; 0: not measured yet, nan: not known.
    """

    def __init__(self, model: nn.Module, sequence_length: int):
        self._flops_per_token, self.peak_flops = model_flops_per_token(model, sequence_length), 0.0
        self._tokens, self._seconds = 0, 0.0

    def add(self, num_tokens: int, seconds: float) -> None:
        """Counts a step."""
        self._tokens += num_tokens
        self._seconds += seconds

    def pop(self) -> tuple[float, float | None]:
        """Returns tokens per second and model FLOP/s utilization since the last call."""
        speed = self._tokens / self._seconds
        self._tokens, self._seconds = 0, 0.0
        return speed, self.utilization(speed)

    def utilization(self, tokens_per_second: float) -> float | None:
        """Returns the share of the peak FLOP/s that a speed needs; None: the peak is not known."""
        return tokens_per_second * self._flops_per_token / self.peak_flops if self.peak_flops > 0 else None
