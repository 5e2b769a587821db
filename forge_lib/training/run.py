"""The Run object: what a training loop needs besides mathematics. The loop calls Run; Run never calls the loop."""

import dataclasses
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn

from forge_lib.config import TrainConfig
from forge_lib.data.batches import micro_batches, read_batch, share_of
from forge_lib.data.blocks import EMPTY_BLOCK
from forge_lib.distributed.agreement import check_world
from forge_lib.distributed.lock import RunLock
from forge_lib.distributed.peers import Peers
from forge_lib.distributed.timeouts import GroupTimeout
from forge_lib.errors import PeerLostError, Stopped
from forge_lib.process import World, die_with_launcher
from forge_lib.progress import progress_bar
from forge_lib.training import log as messages
from forge_lib.training.balance import Balancer
from forge_lib.training.gradient_sync import settle_buckets
from forge_lib.training.hub import push_to_hub
from forge_lib.training.inputs import Inputs, load_inputs, log_start
from forge_lib.training.micro_batch import choose_micro_batch
from forge_lib.training.nonfinite import NonFiniteSteps
from forge_lib.training.periodic import Periodic
from forge_lib.training.profiling import StepProfiler
from forge_lib.training.replica_check import check_replicas
from forge_lib.training.resume import resume
from forge_lib.training.saving import Saving
from forge_lib.training.session import Session, join
from forge_lib.training.state import changed_settings, describe_run, describe_state, step_seed
from forge_lib.training.step_log import StepLog
from forge_lib.training.stop import StopRequest
from forge_lib.training.totals import StepTotals
from forge_lib.training.trackers import Trackers, choose_trackers

logger = logging.getLogger("forge")


class Run:
    """One process's view of a run. Use it as a context manager, and call its methods on all processes.

    Attributes:
        config: every flag.
        step: completed optimizer steps.
        stopped_by: what asked the run to stop; empty: nothing did.
        world, peers, stop_request: the ranks, the side channel to the other processes, and what asks to stop.
        session: what all processes have agreed on; set by `join`.
        accelerator, inputs: set by `load_inputs`.
        log, trackers: metrics.jsonl, and --report-to; the main process writes them; set by `resume`.
        step_log: times the steps; set by `begin`.
        extra_state: further values for state.json of the checkpoints, by name.
    """

    # Set by __enter__
    peers: Peers
    world: World
    stop_request: StopRequest
    _lock: RunLock
    # Set by join
    balancer: Balancer  # the shares of the global batch
    session: Session
    # Set by load_inputs
    accelerator: Accelerator
    inputs: Inputs
    # Set by resume
    log: messages.MetricsLog
    trackers: Trackers
    _state: dict | None  # state.json of the checkpoint from which the run continues
    _timeout: GroupTimeout
    # Set by begin
    _optimizers: list[AcceleratedOptimizer]
    _saved_optimizers: list[torch.optim.Optimizer]  # these and others
    _nonfinite: NonFiniteSteps
    step_log: StepLog
    _periodic: Periodic
    # Set in each step
    _share: np.ndarray  # this process's block indices
    _totals: StepTotals

    def __init__(self, config: TrainConfig):
        self.config, self.step, self.stopped_by = config, 0, ""
        self.extra_state: dict[str, dict] = {}
        self._contexts, self._progress = ExitStack(), ExitStack()
        self._saving, self._final = None, None  # the folder of the final model, on the main process
        self._evaluated: tuple[int, dict] = (-1, {})  # the step and the results of the last evaluation

    def __enter__(self) -> "Run":
        """Connects to the other processes: from now on, an error on one of them is reported to all."""
        logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
        world = World.from_environment()
        die_with_launcher(world)
        with ExitStack() as contexts:
            self.stop_request = contexts.enter_context(StopRequest(Stopped))
            self.peers = contexts.enter_context(Peers(world, self.config.timeout_seconds))
            self._lock = contexts.enter_context(RunLock(Path(self.config.output_dir).expanduser()))
            contexts.callback(self._wait_for_save)
            self.world = world
            contexts.push(self._progress)
            self._contexts = contexts.pop_all()
        return self

    def __exit__(self, *error) -> bool | None:
        is_handled = self._contexts.__exit__(*error)
        if self._final and self.config.push_to_hub and not any(error):  # here: it may take hours
            push_to_hub(self._final, self.config.push_to_hub)
        return is_handled

    def saved_state(self, name: str) -> dict | None:
        """Returns what the checkpoint from which the run continues has of `extra_state`, or None."""
        return (self._state or {}).get(name)

    # Before the loop

    def join(self) -> dict:
        """Agrees with the other processes on how to train; returns the arguments of `Accelerator(...)`.

        Raises:
            UserError: the machines differ in something that must be equal, or the run folder cannot be used.
        """
        self.balancer = Balancer(self.config, self.world)
        self.session = join(self.config, self.world, self.peers, self._lock)
        self.config = self.session.config  # with the values that were chosen
        return self.session.accelerator_arguments() | {"log_with": choose_trackers(self.config, self.world) or None}

    def load_inputs(self, accelerator: Accelerator) -> Inputs:
        """Loads tokenizer, model and data, from another machine if this one lacks them.

        Raises:
            UserError: something cannot be loaded, or the machines have loaded different models or data.
        """
        check_world(self.world, accelerator.num_processes)
        logger.setLevel(logging.INFO if accelerator.is_main_process else logging.ERROR)
        self.accelerator, self.inputs = accelerator, load_inputs(self.session, accelerator)
        self.session, self.config = choose_micro_batch(self.session, accelerator, self.inputs, self.balancer)
        if self.inputs.eval_dataset and self.config.eval_every:
            import forge_lib.training.evaluation_metrics  # noqa: F401 (slow, or broken: now rather than at the first evaluation)
        return self.inputs

    def resume(self, optimizers: list[torch.optim.Optimizer]) -> None:
        """Loads the newest checkpoint of any machine, if there is one, into the model and the optimizers.

        Raises:
            UserError: `--resume` cannot be followed, or the checkpoints belong to another run.
        """
        self._state, lines = resume(self.session, self.inputs, optimizers)
        self.log = messages.MetricsLog(self.session.folder, self.accelerator.is_main_process)
        self._saving = Saving(self.session, self.log, self.accelerator)
        self._saving.saver.attach(optimizers)
        if self._state and self._lock.held and not self._saving.enabled:
            self._saving.saver.prune(self._state["step"])  # a machine without checkpoints keeps what it was sent
        self._timeout = GroupTimeout(self.accelerator, self.inputs.model, self.config.timeout_seconds)
        self.balancer.start(self.session, self.log, self._state or {}, self.extra_state)
        log_start(self.session, self.inputs, self.balancer, lines)
        self.trackers = Trackers(self.accelerator)
        self.trackers.start(self.session.folder.resolve().name, dataclasses.asdict(self.config))

    def begin(
        self,
        model: nn.Module,
        optimizers: list[AcceleratedOptimizer],
        also_save: Sequence[torch.optim.Optimizer] = (),
    ) -> None:
        """Prepares the first step: gradient scaler, DDP's buckets, log. Call once.

        Args:
            model, optimizers: as returned by `prepare`.
            also_save: other optimizers for the checkpoints, as passed to `resume` behind those.
        """
        scaler, state = self.accelerator.scaler, self._state
        if scaler and state and state["scaler"]:
            scaler.load_state_dict(state["scaler"])
        self._optimizers, self._saved_optimizers = optimizers, [*optimizers, *also_save]
        self._nonfinite = NonFiniteSteps(self.config, self.accelerator, self.log)
        logs, memory = (self.log, self.trackers, self.balancer), self._saving.memory
        self.step_log = StepLog(self.config, self.session, self.inputs, self.accelerator, logs, memory, model)
        self._set_step(state["step"] if state else 0)
        self._periodic = Periodic(self.step, self.inputs.plan.num_steps)
        self._write_run_json()
        changed = changed_settings(self.session, self.inputs.plan, state) if state else None
        messages.log_begin(self.log, self.step, self.inputs.plan, self.session, changed)
        self.peers.on_peer_error = self._on_peer_error
        settle_buckets(self.accelerator, model, optimizers, self.inputs.dataset[EMPTY_BLOCK], self.step_log.sync)

    # The loop

    def steps(
        self, batches: Iterable[tuple[int, np.ndarray]] | None = None
    ) -> Iterator[tuple[int, np.ndarray, dict[str, torch.Tensor]]]:
        """Yields each step until the end, or until a person or another machine asks the run to stop.

        Args:
            batches: (step, block indices) of each step; None: those of the plan, from the current step on.

        Yields:
            step: from 0.
            blocks: [n] int64, the block indices of the global batch.
            batch: this process's share of it, [n, sequence_length] int64 tensors on the CPU; a block without labels
                if its share of a short last batch is empty, since every process has to synchronize.
        """
        plan, accelerator, rank = self.inputs.plan, self.accelerator, self.world.process_index
        self.stop_request.defer(self._lock.folder if self.world.is_local_main else None)
        bar = self._progress.enter_context(progress_bar(plan.num_steps, self.step, is_main=rank == 0))
        profiler = StepProfiler(accelerator, self.session.folder / "profile", self.config.profile_steps)
        self._progress.enter_context(profiler)
        for step, blocks in batches or plan.batches(self.step):
            self.step_log.start_step()
            self.peers.set_status("reading its batch")
            self.inputs.store.check_unchanged()
            self._share = share_of(blocks, self.balancer.shares, rank)
            self._is_short = step == plan.num_steps - 1 and len(blocks) < self.config.batch_size  # not compiled for it
            batch = read_batch(self.inputs.dataset, self._share, pin_memory=accelerator.device.type == "cuda")
            self.step_log.batch_read()
            self.peers.set_status("computing")
            torch.manual_seed(step_seed(self.config.seed, step, rank))  # for dropout
            yield step, blocks, batch
            profiler.step_done()
            bar.update(self.step - bar.n)
            bar.set_postfix(self.step_log.postfix, refresh=False)
            if self.stopped_by:
                break
        self._progress.close()

    def micro_batches(self, batch: dict[str, torch.Tensor]) -> Iterator[tuple[dict[str, torch.Tensor], bool]]:
        """Yields (micro-batch on the device, whether it is the last one), of up to --micro-batch-size sequences."""
        for each, is_last in micro_batches(batch, self.config.micro_batch_size):
            is_odd = self._is_short or (self.balancer.is_on and len(each["input_ids"]) != self.config.micro_batch_size)
            with torch.compiler.set_stance("force_eager" if is_odd else "default"):  # compiled for whole ones
                yield {name: t.to(self.accelerator.device, non_blocking=True) for name, t in each.items()}, is_last
        self.step_log.sync.backward_done()

    def begin_totals(self, losses: list[torch.Tensor]) -> None:
        """Starts the all-reduce of the step's loss; call before the last backward pass, which overlaps it.

        The same all-reduce counts how many processes are asked to stop, so all of them stop after the same step.

        Args:
            losses: the loss sum of each of this process's micro-batches, scalars.
        """
        if reason := self.stop_request.reason():
            self.peers.set_first("stop", reason)
        self._totals = StepTotals(losses, bool(reason), self.balancer.own_times(self.step_log.own_seconds))

    def totals(self, grad_norm: torch.Tensor) -> tuple[float, float]:
        """Returns the loss sum over all processes, in nats, and the gradient's norm. A GPU's only wait in a step."""
        total, num_stopping, norm, times = self._totals.wait(grad_norm)
        self.balancer.add(self.step + 1, times)
        if num_stopping:
            self.stop(self.peers.get_first("stop"))
        return total, norm

    def stop(self, reason: str) -> None:
        """Makes this the last step. Call on all processes."""
        if not self.stopped_by:
            self.stopped_by = reason
            self.stop_request.set_time_limit(self.config.grace_seconds)
            logger.info(f"stopping after step {self.step + 1}: {reason}")

    def may_update(self, mean_loss: float, grad_norm: float) -> bool:
        """Returns whether the step may change the weights: its loss and gradient are finite. If not, logs where.

        Raises:
            UserError: not finite, and `--on-nonfinite stop` is set or too many steps were skipped in a row; or too
                many steps in a row overflowed fp16.
        """
        return self._nonfinite.may_update(self.step + 1, mean_loss, grad_norm, self._totals.losses, self._share)

    def step_done(self, loss: float, grad_norm: float, learning_rate: float) -> None:
        """Records a completed step, logs it if it is due, and compares the replicas if that is due.

        Args:
            loss: mean over the tokens of the global batch, in nats.
            grad_norm: of the global batch, before clipping.
            learning_rate: of this step.

        Raises:
            DivergedError: the weights or the optimizer states of the processes differ.
        """
        self.advance(self.step + 1)
        is_due = self._periodic.is_due(self.config.log_every)
        self.step_log.step_done(self.step, loss, grad_norm, learning_rate, is_due)
        if self.must_save() or self._periodic.is_due(self.config.check_replicas_every):
            self.peers.set_status("comparing its replica")
            check_replicas(self.accelerator, self.inputs.model, self._optimizers, self.session, self.log, self.step)

    def advance(self, step: int, since: int | None = None) -> None:
        """Sets the number of completed steps; the work that became due since another one, or the last call, is due."""
        is_first = not self._periodic.has_begun
        self._periodic.advance(step, since)
        self._set_step(step)
        self._saving.report()  # the background saves that have ended
        if is_first:
            self._timeout.first_step_done()
            self._write_run_json()

    def is_due(self, every: int) -> bool:
        """Returns whether periodic work is due: every `every` steps and after the last one, unless asked to stop.

        Before the loop, it is due in a new run and in one that is already complete.
        """
        return not self.stopped_by and self._periodic.is_due(every)

    def must_save(self) -> bool:
        """Returns whether a checkpoint is due: by `--checkpoint-every`, or because the run was asked to stop."""
        return bool(self.stopped_by) or self._periodic.is_due(self.config.checkpoint_every)

    def save(self, next_learning_rate: float) -> None:
        """Saves a checkpoint on each machine that keeps them.

        Args:
            next_learning_rate: of the next step; state.json records it.

        Raises:
            UserError: the run was asked to stop, and no machine could save.
        """
        scaler = self.accelerator.scaler
        state = describe_state(self.session, self.inputs, self.step, scaler.state_dict() if scaler else None)
        evaluated_at, results = self._evaluated
        eval_loss = results["eval_loss"] if evaluated_at == self.step else None
        state |= self.extra_state | {"learning_rate": next_learning_rate, "eval_loss": eval_loss}
        with self.pause("saving"):
            write = self._saving.save_last if self.stopped_by else self._saving.save
            write(self.step, self.inputs.model, self._saved_optimizers, state)

    def log_evaluation(self, results: dict[str, float]) -> None:
        """Logs the results of an evaluation; the next checkpoint and the model card contain them."""
        self._evaluated = (self.step, results)
        self.log.write(step=self.step, **results)
        self.trackers.log(results, step=self.step)
        logger.info(f"step {self.step}: {messages.describe_evaluation(results)}")

    @contextmanager
    def pause(self, status: str) -> Iterator[None]:
        """Sets this process's status for slow work between steps, and raises the group's timeout to allow for it."""
        self.peers.set_status(status)
        start = time.monotonic()
        yield
        self._timeout.paused(time.monotonic() - start)

    # After the loop

    def finish(self) -> Path:
        """Writes the final model, ends the process group, and returns the model's folder.

        Call it when the function that holds the prepared model has returned: if DDP's reducer were the last owner of a
        gloo group, it would destroy the group with Python's lock held, which gloo's threads need (torch 2.13).

        Raises:
            Stopped: the run was asked to stop; it is saved.
        """
        self.peers.set_status("finishing")
        self._saving.saver.wait()
        self._saving.report()
        self._write_run_json()
        if self.stopped_by:
            self.log.write(step=self.step, event="stop", reason=self.stopped_by)
        elif self.accelerator.is_main_process:
            from forge_lib.training.finishing import write_results  # matplotlib and others: slow to import

            figures = {"steps": self.step} | self._evaluated[1]
            self._final = write_results(self.config, self.inputs, self.session.folder, figures)
        self._saving.finish_running("saves")
        self.peers.barrier("end")
        if self.stopped_by:
            self.peers.release_launchers()
        self.stop_request.done()
        self.trackers.finish()  # it may be slow
        self._optimizers = self._saved_optimizers = self.step_log = self._totals = None  # the last owners of DDP
        self.accelerator.free_memory()
        self.accelerator.end_training()
        if self.stopped_by:
            raise Stopped(f"stopped after step {self.step} by {self.stopped_by}; start it again to continue")
        return self.session.folder / "final"

    def _set_step(self, step: int) -> None:
        self.step = self.peers.step = step
        self._lock.set_step(step)

    def _write_run_json(self) -> None:
        if self.accelerator.is_main_process:
            content = describe_run(self.session, self.inputs, self.balancer.shares, self._timeout.describe())
            messages.write_run_json(self.session.folder, content)

    def _wait_for_save(self) -> None:
        if self._saving:
            self._saving.wait(self.config.grace_seconds)

    def _on_peer_error(self, error: BaseException) -> None:
        """Called before this process exits because another one failed."""
        self._wait_for_save()
        if isinstance(error, PeerLostError):
            self.log.write(step=self.step, event="peer_lost", message=str(error))
