"""Saves the checkpoints of a run on each machine, and reports in the log how that went."""

import logging
import threading
from dataclasses import asdict, dataclass

import torch
from accelerate import Accelerator
from torch import nn

from forge_lib.checkpoints.saver import Saver
from forge_lib.distributed.allocator import return_freed_memory
from forge_lib.distributed.peers import HANG_SECONDS
from forge_lib.errors import RESUME_HINT, UserError
from forge_lib.training.log import MetricsLog
from forge_lib.training.memory import PeakMemory
from forge_lib.training.session import Session

logger = logging.getLogger("forge")


@dataclass(frozen=True)
class FailedSave:
    """A checkpoint that a machine could not write."""

    step: int
    host: str
    error: str


@dataclass(frozen=True)
class SaveReport:
    """What a process tells the others about its saves: the step of its newest one, and the failed ones as dicts."""

    last_step: int
    failed: list[dict]


class Saving:
    """Writes this machine's checkpoints, and collects on the main process which ones other machines could not write.

    Args:
        session: the processes.
        log: where events are written.
        accelerator: the processes, too.

    Attributes:
        memory: measures the peak of the saves, and that of the rest.
    """

    def __init__(self, session: Session, log: MetricsLog, accelerator: Accelerator):
        self._session, self._peers, self._log = session, session.peers, log
        self._is_main, self.memory = accelerator.is_main_process, PeakMemory(accelerator.device)
        self._failed: list[FailedSave] = []  # of this process, not yet reported to the others
        self.enabled = session.lock.held and session.is_checkpoint_machine()  # whether this process writes
        config = session.config
        self.saver = Saver(
            session.folder / "checkpoints", config.keep_checkpoints, config.keep_best, config.checkpoint_async
        )

    def save(self, step: int, model: nn.Module, optimizers: list[torch.optim.Optimizer], state: dict) -> None:
        """Saves a checkpoint on each machine that keeps them, in the background if so configured. Call on all.

        Args:
            step: completed optimizer steps.
            model: unwrapped.
            optimizers: their states, in this order.
            state: the content of state.json.
        """
        self.finish_running(f"save/{step}")
        if self.enabled:
            self.memory.begin_save()
            self.saver.save(step, model, optimizers, state)
        if not self._session.config.checkpoint_async:
            self._peers.barrier(f"saved/{step}")

    def save_last(self, step: int, model: nn.Module, optimizers: list[torch.optim.Optimizer], state: dict) -> None:
        """Saves the checkpoint of a run that was asked to stop: it completes even if a launcher kills this process.

        Raises:
            UserError: no machine could write it.
        """
        self.finish_running(f"save/{step}")
        if self.enabled:
            self.memory.begin_save()
            self.saver.save_surviving(step, model, optimizers, state)
        reports = self.finish_running(f"last/{step}")
        if not any(report.last_step == step for report in reports):
            raise UserError(f"step {step} could not be saved on any machine: free some disk space. {RESUME_HINT}")

    def finish_running(self, name: str) -> list[SaveReport]:
        """Waits until no process is writing a checkpoint, and logs the failed ones of all. Call on all processes.

        This is where the others wait for a machine with a slow disk, for up to an hour.

        Returns:
            What each process reports, by rank.
        """
        self.saver.wait()
        self.report()
        mine = SaveReport(self.saver.last_step, [asdict(failed) for failed in self._failed])
        self._failed.clear()
        reports = self._peers.all_gather(mine, name, HANG_SECONDS)
        for rank, report in enumerate(reports):
            if self._is_main and rank != self._session.world.process_index:
                for failed in report.failed:
                    self._report_failed(FailedSave(**failed))
        return reports

    def report(self) -> None:
        """Logs the saves of this machine that have ended since the last call."""
        host = self._peers.host
        for outcome in self.saver.outcomes():
            return_freed_memory()  # the copy's: else the next steps would seem to need it
            peak = self.memory.end_save()
            if outcome.path:
                facts = {"path": str(outcome.path), "seconds": outcome.seconds, "peak_memory_bytes": peak}
                facts["hosts"] = self._session.checkpoint_hosts()
                self._log.write(step=outcome.step, event="checkpoint", **facts)
                if outcome.error:
                    logger.error(f"{host}: the checkpoint of step {outcome.step} was written, but {outcome.error}")
            else:
                failed = FailedSave(outcome.step, host, outcome.error)
                self._report_failed(failed)
                self._failed.append(failed)

    def wait(self, seconds: float) -> None:
        """Waits up to `seconds` for the running save, and logs its result."""
        waiting = threading.Thread(target=self.saver.wait, daemon=True)
        waiting.start()
        waiting.join(seconds)
        self.report()

    def _report_failed(self, failed: FailedSave) -> None:
        logger.error(f"{failed.host}: the checkpoint of step {failed.step} was not written: {failed.error}")
        self._log.write(step=failed.step, event="checkpoint_failed", host=failed.host, error=failed.error)
