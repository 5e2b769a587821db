"""What happens when a loss or a gradient is not finite, or overflows fp16."""

import logging
import math

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from forge_lib.config import TrainConfig
from forge_lib.errors import UserError
from forge_lib.training.log import MetricsLog

logger = logging.getLogger("forge")

MAX_OVERFLOWS = 50  # steps in a row that the gradient scaler of fp16 may skip


class NonFiniteSteps:
    """Decides, equally on all processes, whether a step may change the weights, and counts those that may not."""

    def __init__(self, config: TrainConfig, accelerator: Accelerator, log: MetricsLog):
        self._config, self._accelerator, self._log = config, accelerator, log
        self._skipped = self._overflows = 0  # steps in a row

    def may_update(
        self, step: int, mean_loss: float, grad_norm: float, losses: list[torch.Tensor], blocks: list[int]
    ) -> bool:
        """Returns whether a step's loss and gradient are finite; if not, logs where. Call on all processes.

        With fp16 an infinite gradient of a finite loss is an overflow: the optimizer may be called, since the gradient
        scaler makes it skip the step and then scales the loss less.

        Args:
            step: completed optimizer steps, including this one.
            mean_loss, grad_norm: of the global batch.
            losses: of this process's micro-batches, scalars.
            blocks: this process's share of the batch.

        Raises:
            UserError: not finite, and `--on-nonfinite stop` is set or too many steps were skipped in a row; or too
                many steps in a row overflowed.
        """
        scaler = self._accelerator.scaler
        if math.isfinite(mean_loss) and (math.isfinite(grad_norm) or scaler):
            self._skipped = 0
            self._count_overflow(step, math.isfinite(grad_norm))
            return True
        self._skipped += 1
        where = self._find(losses, blocks)
        self._log.write(step=step, event="not_finite", where=where)
        if self._config.on_nonfinite == "stop" or self._skipped > self._config.max_skipped_steps:
            raise UserError(
                f"step {step}: not finite: {where} ({self._skipped} such step(s) in a row). The weights are those "
                "before this step; lower --learning-rate, check these samples, or use --on-nonfinite skip"
            )
        logger.warning(f"step {step} is skipped: not finite: {where}")
        if scaler:
            scaler.update()
        return False

    def _count_overflow(self, step: int, is_gradient_finite: bool) -> None:
        self._overflows = 0 if is_gradient_finite else self._overflows + 1
        if self._overflows > MAX_OVERFLOWS:
            raise UserError(
                f"step {step}: {self._overflows} steps in a row overflow fp16; use --mixed-precision bf16 or no"
            )

    def _find(self, losses: list[torch.Tensor], blocks: list[int]) -> str:
        """Returns which processes and blocks have a loss that is not finite. Call on all processes."""
        size = self._config.micro_batch_size
        bad = [
            block
            for number, loss in enumerate(losses)
            if not torch.isfinite(loss)
            for block in blocks[number * size : (number + 1) * size]
        ]
        found = [(rank, theirs) for rank, theirs in enumerate(gather_object([bad])) if theirs]
        where = "; ".join(f"process {rank}, samples {theirs}" for rank, theirs in found)
        return where or "not in the loss, but in the gradient"
