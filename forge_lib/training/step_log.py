"""Logs completed steps: times, throughput, loss spikes and stragglers, to the terminal, metrics.jsonl and trackers."""

import logging
import math
import time

import torch
from accelerate import Accelerator
from accelerate.utils import gather
from torch import nn

from forge_lib.config import TrainConfig
from forge_lib.distributed.speed import reliable_matmul_flops
from forge_lib.progress import format_seconds
from forge_lib.training.anomalies import SpikeDetector, find_straggler
from forge_lib.training.balance import Balancer
from forge_lib.training.gradient_sync import GradientSync
from forge_lib.training.inputs import Inputs
from forge_lib.training.log import MetricsLog
from forge_lib.training.memory import PeakMemory
from forge_lib.training.session import Session
from forge_lib.training.throughput import Throughput
from forge_lib.training.totals import sum_dtype
from forge_lib.training.trackers import Trackers

logger = logging.getLogger("forge")


class StepLog:
    """Times the steps of a run and logs them.

    Attributes:
        sync: measures DDP's synchronization of the gradient.
        postfix: figures of the last logged step, for a progress bar.
    """

    def __init__(
        self,
        config: TrainConfig,
        session: Session,
        inputs: Inputs,
        accelerator: Accelerator,
        logs: tuple[MetricsLog, Trackers, Balancer],
        memory: PeakMemory,
        model: nn.Module,
    ):
        self.config, self.session, self.inputs, self.accelerator = config, session, inputs, accelerator
        self.log, self.trackers, self._balancer = logs
        self.memory = memory
        self._started_at, self._first_step = time.monotonic(), -1  # of this start of the run
        self.sync = GradientSync(model, fp16=config.gradient_compression == "fp16")
        self.postfix: dict[str, str] = {}
        self._throughput = Throughput(inputs.model, config.sequence_length)
        self._spikes = SpikeDetector()
        self._own_seconds = 0.0  # computed by this process alone, since the last logged step
        self.own_seconds = 0.0  # of the last step: forward and backward passes

    def start_step(self) -> None:
        """Starts the clock of a step."""
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds since the step has begun."""
        return time.perf_counter() - self._start

    def model_flops_utilization(self, tokens_per_second: float) -> float | None:
        """Returns the share of the peak FLOP/s of all processes that this speed needs; None: not known."""
        return self._throughput.utilization(tokens_per_second)

    def measure_peak_flops(self) -> None:
        """Measures the peak FLOP/s of all processes at the same time: half a second. Call on all processes."""
        device = self.accelerator.device
        precision, rank = self.session.agreement.mixed_precision, self.accelerator.process_index
        is_slow = precision == "bf16" and "bf16" not in self.session.agreement.processes[rank].flops  # takes minutes
        dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        own = None if is_slow else reliable_matmul_flops(device, dtype)
        everyones = gather(torch.tensor([own or math.nan], dtype=sum_dtype(device), device=device))
        self._throughput.peak_flops = everyones.sum().item()

    def measure_own_time(self) -> None:
        """Records how long this process has computed, if `step_done` does not follow."""
        self.own_seconds = self.sync.pop()[2]

    def batch_read(self) -> None:
        """Records that the step's batch is in memory."""
        self._data_seconds = time.perf_counter() - self._start
        self.sync.compute_begins()

    def step_done(self, step: int, loss: float, grad_norm: float, learning_rate: float, is_due: bool) -> None:
        """Records a completed step, and logs it if it is due. Call on all processes.

        Args:
            step: completed optimizer steps.
            loss: mean over the tokens of the global batch, in nats.
            grad_norm: of the global batch, before clipping.
            learning_rate: of this step.
            is_due: whether to write a row; equal on all processes.
        """
        plan, config = self.inputs.plan, self.config
        sync_seconds, bytes_sent, self.own_seconds = self.sync.pop()
        step_seconds = time.perf_counter() - self._start
        num_sequences = plan.num_samples(step) - plan.num_samples(step - 1)
        self._throughput.add(num_sequences * config.sequence_length, step_seconds)
        self._own_seconds += step_seconds - sync_seconds
        self._log_spike(step, loss)
        if not is_due:
            return
        peak_memory, own_seconds = self._gather_figures()
        self._log_straggler(step, own_seconds)
        tokens_per_second, mfu = self._throughput.pop()
        row = {
            "step": step,
            "epoch": plan.num_samples(step) / len(self.inputs.dataset),
            "tokens": plan.num_samples(step) * config.sequence_length,
            "loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            "tokens_per_second": tokens_per_second,
            "step_seconds": step_seconds,
            "data_seconds": self._data_seconds,
            "compute_seconds": step_seconds - self._data_seconds - sync_seconds,
            "sync_seconds": sync_seconds,
            "bytes_sent": bytes_sent,
            "mfu": mfu,
            "peak_memory_bytes": peak_memory or None,
            "num_processes": self.accelerator.num_processes,
            "shares": self._balancer.used,
            "sequences_per_second": self._balancer.sequences_per_second(),
        }
        self.log.write(**row)
        figures = {name: value for name, value in row.items() if name != "step"}
        utilization = row["compute_seconds"] / step_seconds
        machines = len(set(self.session.hosts))
        self.trackers.log(figures | {"utilization": utilization, "num_machines": machines}, step)
        self.postfix = {"loss": f"{loss:.4f}", "tokens_per_second": f"{tokens_per_second:,.0f}"}
        logger.info(
            f"step {step}/{plan.num_steps}  loss {loss:.4f}  grad norm {grad_norm:.2f}  "
            f"lr {learning_rate:.2e}  {tokens_per_second:,.0f} tokens/s{self.time_left(step)}"
        )
        if not self._throughput.peak_flops:
            self.measure_peak_flops()  # here: it would delay the first row

    def time_left(self, step: int) -> str:
        """Returns how long the run will take at its present pace, for the log; empty if that is not known yet."""
        if self._first_step < 0:
            self._started_at, self._first_step = time.monotonic(), step  # the first steps are slow
            return ""
        seconds = (time.monotonic() - self._started_at) / max(1, step - self._first_step)
        remaining = self.inputs.plan.num_steps - step
        return f"  {format_seconds(seconds * remaining)} left" if remaining else ""

    def _gather_figures(self) -> tuple[int, list[float]]:
        """Returns the largest peak memory of any process, in bytes, and the seconds that each computed, by rank."""
        device = self.accelerator.device
        mine = [self.memory.pop(), self._own_seconds]
        everyones = gather(torch.tensor([mine], dtype=sum_dtype(device), device=device)).cpu()
        self._own_seconds = 0.0
        return int(everyones[:, 0].max()), everyones[:, 1].tolist()

    def _log_straggler(self, step: int, seconds: list[float]) -> None:
        if self._balancer.is_on and not self._balancer.is_settled:
            return
        if straggler := find_straggler(seconds):
            how = "see what else runs there" if self._balancer.is_on else "--balance auto gives it less"
            host = self.session.hosts[straggler.process]
            logger.warning(
                f"step {step}: the others wait for process {straggler.process} on {host}, which takes "
                f"{straggler.ratio:.1f} times as long; {how}"
            )
            self.log.write(step=step, event="straggler", process=straggler.process, host=host, ratio=straggler.ratio)

    def _log_spike(self, step: int, loss: float) -> None:
        usual = self._spikes.usual_loss(loss)
        if usual is not None:
            logger.warning(f"step {step}: loss {loss:.4f} is a spike; the usual loss is {usual:.4f}")
            self.log.write(step=step, event="loss_spike", loss=loss, usual_loss=usual)
