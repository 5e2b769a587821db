"""The Rounds object: what scripts/train_elastic.py needs besides Run to train with peers that come and go.

A peer is a run of its own, with its own processes (accelerate's world inside the peer), run folder and log. Between
two exchanges it trains alone, on samples that no other peer has. Only its main process talks to the other peers; it
tells its other processes what was decided.
"""

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import nn

from forge_lib.checkpoints.format import step_path
from forge_lib.elastic.catch_up import fetch_inputs
from forge_lib.elastic.flat import FlatParameters
from forge_lib.elastic.inner import copy_weights, tell_all
from forge_lib.elastic.joining import give_state, restore_state
from forge_lib.elastic.outer import OuterOptimizer
from forge_lib.elastic.pace import fits_grace, late_after
from forge_lib.elastic.peer import Peer
from forge_lib.elastic.round_log import RoundLog
from forge_lib.elastic.shared_evaluation import evaluate_parts
from forge_lib.elastic.work import Met, Summed, Work
from forge_lib.errors import UserError
from forge_lib.peers_config import ElasticConfig
from forge_lib.training.run import Run

logger = logging.getLogger("forge")

WARM_UP_STEPS = 16  # of a peer that joins later: its inner optimizer begins without moments
EVALUATION_LIMIT_SECONDS = 3600.0  # after that, the others go on without this peer
SPEED_MEMORY = 0.7  # weight of the earlier steps in the measured seconds per step


@dataclasses.dataclass(frozen=True)
class Decision:
    """What the main process tells the other processes of its peer.

    Attributes:
        work: of the next round; None if there is none.
        step, since: completed steps of all peers, now and before the last commit.
        is_complete: whether the run is complete.
        changed: whether the weights have changed.
    """

    work: Work | None
    step: int
    since: int
    is_complete: bool
    changed: bool


class Rounds:
    """The rounds of a peer. Use it as a context manager inside `Run`; call its methods on all processes of the peer.

    Args:
        config: every flag.
        run: of this peer.

    Attributes:
        outer: the outer optimizer; set by `build_outer`.
    """

    outer: OuterOptimizer
    _log: RoundLog

    def __init__(self, config: ElasticConfig, run: Run):
        self.config, self.run = config, run
        self._contexts = ExitStack()
        self._peer = Peer(config, self._report, self._is_asked_to_stop) if run.world.process_index == 0 else None
        self._work = Work()
        self._is_complete = False
        self._local_steps = self._num_met = 0
        self._joined_late = False
        self._targets = 0  # of this peer's part of the step
        self._summed: Summed | None = None  # of the step, with --sync-every 1
        self._schedule: Callable[[int], float] = lambda step: 0.0

    def __enter__(self) -> "Rounds":
        if self._peer:
            logger.setLevel(logging.INFO)  # what happens before the inputs are loaded is logged, too
            self._contexts.enter_context(self._peer)
        return self

    def __exit__(self, *error: Any) -> None:
        self._contexts.__exit__(*error)

    # Before the loop

    def fetch_inputs(self) -> None:
        """Downloads the model and the data that this machine lacks from a live peer.

        Raises:
            UserError: no peer can send them.
        """
        if self._peer:
            fetch_inputs(self.config, self._peer.membership, self._peer.facts(self._work), self._is_asked_to_stop)
        self.run.peers.barrier("inputs of the peer", math.inf)  # until another peer has them

    def build_outer(self) -> OuterOptimizer:
        """Returns the outer optimizer: it belongs into the checkpoints, but the loop does not step it."""
        inputs = self.run.inputs
        self.outer = OuterOptimizer(FlatParameters(inputs.model))
        if self._peer:
            give_state(self._peer, self.outer, self.config, self.run)
        return self.outer

    def begin(
        self, optimizers: list[torch.optim.Optimizer], learning_rate: Callable[[int], float]
    ) -> Callable[[int], float]:
        """Takes over the newest state of any peer, waits for --min-peers, and begins a round with all of them.

        Args:
            optimizers: of the loop.
            learning_rate: by step, of all peers.

        Returns:
            The learning rate of this peer's steps: lower at first if it joins peers that train already.
        """
        self._log, self._schedule = RoundLog(self.run, self.config), learning_rate
        self.run.step_log.measure_peak_flops()
        saved = self.run.saved_state("elastic")
        if self.config.sync_every == 1 and self.run.world.num_processes > 1:
            raise UserError(
                "--sync-every 1 works with one process per peer; start one peer for each GPU, or use train.py"
            )
        if self._peer:
            restore_state(self._peer.files, saved, optimizers, self.config, self.run)
        copy_weights(self.run.accelerator, self.outer.flat.parameters)
        has_checkpoint = self.run.step > 0  # and with it the moments of the inner optimizer
        self._meet()
        self._joined_late = not has_checkpoint and self.run.step > 0 and self.config.sync_every != 1

        def own_learning_rate(step: int) -> float:
            is_cold = self._joined_late and self._local_steps < WARM_UP_STEPS
            return learning_rate(step) * ((self._local_steps + 1) / WARM_UP_STEPS if is_cold else 1.0)

        return own_learning_rate

    # The loop

    def batches(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yields the number and the blocks [n] int64 of each step of this peer, until the run is complete.

        The number counts the steps of all peers, as if they took turns: the learning rate follows it. A step without
        blocks, if there are too few for all peers at the end of a run, has a gradient of 0.
        """
        while not self._is_complete and not self.run.stopped_by:
            work = self._work
            if not work.steps:
                work.begun_at = time.monotonic()
                if self._peer:
                    self._peer.expect(work)
            samples = work.todo[work.steps] if work.todo else np.arange(0)
            yield self._step_number(), self.run.inputs.plan.blocks(samples)

    def num_targets(self, blocks: np.ndarray) -> int:
        """Returns how many tokens are predicted in a step; with --sync-every 1, by all peers together."""
        plan, dataset, work = self.run.inputs.plan, self.run.inputs.dataset, self._work
        self._targets = dataset.num_targets(blocks)
        return self._targets if work.batch is None else dataset.num_targets(plan.blocks(work.batch))

    def add_gradients(self) -> None:
        """With --sync-every 1: adds up the gradients of all peers; else does nothing."""
        if self.config.sync_every != 1:
            return
        work = self._work
        loss, _ = self.run.totals(torch.zeros(()))
        self._count_step(loss)
        self._count_seconds(max(1, sum(map(len, work.todo))))  # per sequence, and without the exchange
        self._summed = self._peer.sum_gradients(work, self._gives_up)
        if self._summed:
            self.outer.flat.write_gradients(self._summed.gradient)

    def totals(self, grad_norm: torch.Tensor) -> tuple[float, float]:
        """Returns the loss sum of the step over this peer's processes, in nats, and the gradient's norm.

        With --sync-every 1, the loss is that of all peers; nan if the gradients were not added up.
        """
        loss, norm = self.run.totals(grad_norm)
        if self.config.sync_every != 1:
            self._count_step(loss)
            return loss, norm
        return sum(member.facts.loss for member in self._summed.group) if self._summed else math.nan, norm

    def _count_step(self, loss: float) -> None:
        work = self._work
        work.steps, work.targets, work.loss = work.steps + 1, work.targets + self._targets, work.loss + loss

    def may_update(self) -> bool:
        """Returns whether the step may update the weights: with --sync-every 1, if the gradients were added up."""
        return self.config.sync_every != 1 or self._summed is not None

    def step_done(self, mean_loss: float, grad_norm: float) -> None:
        """Records a step of this peer; after the last one of a round, averages the changes of all peers.

        Args:
            mean_loss: of the step, in nats.
            grad_norm: of the step's gradient, before clipping.
        """
        self.run.step_log.measure_own_time()
        if self.may_update():
            self._log.step_done(mean_loss, grad_norm)
        if self.config.sync_every == 1:
            self._gradient_step_done()
            return
        self._count_seconds(1)
        self.run.advance(self.run.step)
        if self.run.stopped_by or self._is_round_over():
            self._meet()

    def _count_seconds(self, divisor: int) -> None:
        """Adds the seconds of the step so far to those of the round; `divisor` makes them the speed of this peer."""
        seconds = self.run.step_log.seconds
        self._work.compute_seconds += seconds
        if self._peer and self._local_steps:  # the very first step may compile
            known = self._peer.step_seconds or seconds / divisor
            self._peer.step_seconds = SPEED_MEMORY * known + (1 - SPEED_MEMORY) * seconds / divisor
        self._local_steps += 1

    def _gradient_step_done(self) -> None:
        """Ends a step of --sync-every 1: all peers have made the same update, or none of them has."""
        summed, work = self._summed, self._work
        self._summed = None
        self.run.advance(self.run.step)
        if summed:
            self._peer.state.updated()
            state = self._peer.state
            self._is_complete = state.ledger.is_complete
            self.run.extra_state["elastic"] = state.describe()
            self.run.advance(self.run.inputs.plan.num_steps if self._is_complete else self.run.step + 1)
            self._log.committed(summed.exchanged, work)
            if self.run.is_due(self.config.log_every):
                rate = self._schedule(min(self.run.step, self.run.inputs.plan.num_steps - 1))
                self._log.round_done(self._peer, summed.exchanged, summed.group, work, rate, self.run.step)
            self._work = self._peer.plan(summed.group, summed.group)
        else:
            self._log.lost(work.targets)
        if self.run.stopped_by:
            self._peer.leave()
        elif not summed or not (summed.is_alone or self._is_complete):
            self._work = Work()
            self._meet()

    def evaluate(self, model: nn.Module) -> None:
        """Evaluates the shared weights on the held-out blocks, divided among the peers that are present."""
        if self._peer:
            self._peer.expect_soon(EVALUATION_LIMIT_SECONDS)
        evaluate_parts(self.run, model, self._peer, self._work)
        if self._peer:
            self._peer.expect_soon()

    def finish(self) -> None:
        """Waits until the other peers have the complete run, too: a late one gets it from this peer."""
        if self._peer and self._is_complete:
            self._peer.linger()
        self.run.peers.barrier("peers, complete", math.inf)

    # Rounds

    def _meet(self) -> None:
        """Meets the other peers, and tells the other processes of this peer what the result is."""
        met = self._peer.meet(self._work, self._gives_up) if self._peer else None
        decision = self._decide(met) if met else None
        self._num_met += 1
        self.run.peers.barrier(f"round/{self._num_met}", math.inf)  # until the lighthouse is back
        decision = tell_all(self.run.accelerator, decision)
        if decision.changed:
            copy_weights(self.run.accelerator, self.outer.flat.parameters)
        done, self._work = self._work, decision.work or Work()
        self._is_complete = decision.is_complete
        if decision.step != self.run.step:
            self.run.advance(decision.step, decision.since)
        if not self._work.group_size and not decision.is_complete:  # this peer was asked to stop
            self.run.stop(self.run.stop_request.reason() or "a stop request")
        if self._peer and self.run.stopped_by:
            self._peer.leave()
        elif self._peer:
            self._peer.expect_soon()
        if self._peer:
            self.run.extra_state["elastic"] = self._peer.state.describe()
            if self.run.must_save():
                self._peer.files.checkpoint_due(step_path(self.run.session.folder / "checkpoints", self.run.step))
            if met.lost_targets:
                self._log.lost(met.lost_targets)
            for exchanged, ready in met.exchanges:
                self._log.committed(exchanged, done)
                rate = self._schedule(min(self.run.step, self.run.inputs.plan.num_steps - 1))
                self._log.round_done(self._peer, exchanged, ready, done, rate, self.run.step)

    def _decide(self, met: Met) -> Decision:
        ledger, plan = self._peer.state.ledger, self.run.inputs.plan
        step = plan.num_steps if ledger.is_complete else ledger.num_committed // self.config.batch_size
        since = step  # nothing is due for a peer that has only taken over the state of others
        if met.exchanges:
            last = met.exchanges[-1][0].commit
            since = (
                ledger.num_committed - sum(stop - start for start, stop in last.samples)
            ) // self.config.batch_size
        return Decision(met.work, step, since, ledger.is_complete, met.changed or met.lost_targets > 0)

    def _step_number(self) -> int:
        work = self._work
        number = self.run.step + work.steps * work.num_planned // max(1, len(work.todo))
        return min(number, self.run.inputs.plan.num_steps - 1)

    def _is_round_over(self) -> bool:
        """Returns whether this peer has computed its steps, or would be late with another one."""
        work = self._work
        is_over = work.steps >= len(work.todo)
        if self._peer and work.planned_seconds:
            late = late_after(work.planned_seconds, self.config.late_seconds)
            is_over |= work.busy_seconds + self._peer.step_seconds > late
        return tell_all(self.run.accelerator, is_over)

    def _is_asked_to_stop(self) -> bool:
        return bool(self.run.stop_request.reason())

    def _gives_up(self) -> bool:
        """Returns whether this peer should stop now: unless its round ends soon, and its work can still be used."""
        if not self._is_asked_to_stop():
            return False
        work, grace = self._work, self.config.grace_seconds
        if self.config.sync_every == 1:  # the others are told first
            return not work.steps or work.busy_seconds > grace / 4
        exchange_seconds = self._peer.exchange_seconds
        is_known = work.planned_seconds and (exchange_seconds or work.group_size == 1)
        remaining = work.planned_seconds - work.busy_seconds
        return not work.steps or not is_known or not fits_grace(remaining, exchange_seconds, grace)

    def _report(self, event: str, **facts: Any) -> None:
        self.run.log.write(step=self.run.step, event=event, **facts)
