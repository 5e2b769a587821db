"""Logs the rounds of a peer: one line and one row of metrics.jsonl for each."""

import logging
import time

from forge_lib.elastic.meeting import Exchanged
from forge_lib.elastic.peer import Peer
from forge_lib.elastic.peer_facts import Member
from forge_lib.elastic.work import Work
from forge_lib.peers_config import ElasticConfig
from forge_lib.training.anomalies import SpikeDetector
from forge_lib.training.run import Run
from forge_lib.training.unused_flags import describe_unused

logger = logging.getLogger("forge")


class RoundLog:
    """Collects the figures of this peer's steps, and logs each committed round.

    Args:
        run: of this peer.
        config: every flag.
    """

    def __init__(self, run: Run, config: ElasticConfig):
        self._run, self._config = run, config
        warn_of_flags_without_effect(config)
        self._spikes = SpikeDetector()
        self._grad_norm = 0.0
        self._lost_tokens = 0  # since the start
        self._row_began = time.monotonic()
        # Since the last row
        self._samples: list[list[int]] = []
        self._num_bytes, self._sync_seconds, self._compute_seconds = 0, 0.0, 0.0

    def step_done(self, mean_loss: float, grad_norm: float) -> None:
        """Records a step of this peer."""
        self._grad_norm = grad_norm
        usual = self._spikes.usual_loss(mean_loss)
        if usual is not None:
            logger.warning(f"step {self._run.step}: loss {mean_loss:.4f} is a spike; the usual loss is {usual:.4f}")
            self._run.log.write(step=self._run.step, event="loss_spike", loss=mean_loss, usual_loss=usual)

    def lost(self, num_targets: int) -> None:
        """Counts predicted tokens that this peer has computed and then dropped."""
        self._lost_tokens += num_targets
        logger.warning(f"{num_targets:,} tokens of this peer are lost; their samples are trained again")

    def committed(self, exchanged: Exchanged, own: Work) -> None:
        """Records a commit; `round_done` logs all since the last row.

        Whatever a peer of the round has computed that is not in the commit is lost. That peer may be gone, so its
        planned tokens count: at most so many it has computed.

        Args:
            exchanged: what was committed, and how long that took.
            own: this peer's work in it.
        """
        self._samples += exchanged.commit.samples
        self._num_bytes += exchanged.num_bytes
        self._sync_seconds += exchanged.seconds
        self._compute_seconds += own.compute_seconds
        for name, tokens in own.missing(exchanged.commit.contributors):
            self._lost_tokens += tokens
            logger.warning(f"at most {tokens:,} tokens of {name} are lost; their samples are trained again")

    def round_done(
        self, peer: Peer, exchanged: Exchanged, ready: list[Member], own: Work, learning_rate: float, step: int
    ) -> None:
        """Logs a committed round; with --sync-every 1, all steps since the last row.

        Args:
            peer: has the state after the round.
            exchanged: the last commit.
            ready: its members, with what they said before.
            own: this peer's work in it.
            learning_rate: of the next step of all peers.
            step: completed steps of all peers.
        """
        now = time.monotonic()
        seconds, self._row_began = now - self._row_began, now
        commit, config = exchanged.commit, self._config
        participants = describe_participants(ready)
        own_wait = max(0.0, seconds - self._compute_seconds - self._sync_seconds)
        num_sequences = sum(stop - start for start, stop in self._samples)
        row = {
            "step": step,
            "epoch": peer.state.ledger.num_committed / len(self._run.inputs.dataset),
            "tokens": peer.state.ledger.num_committed * config.sequence_length,
            "loss": sum(m.facts.loss for m in ready if m.id in commit.contributors) / commit.num_targets,
            "grad_norm": self._grad_norm,
            "learning_rate": learning_rate,
            "tokens_per_second": num_sequences * config.sequence_length / seconds,
            "step_seconds": own.compute_seconds / max(1, own.steps),
            "compute_seconds": self._compute_seconds,
            "sync_seconds": self._sync_seconds,
            "bytes_sent": self._num_bytes,
            "mfu": self._run.step_log.model_flops_utilization(own.targets / seconds),
            "peak_memory_bytes": self._run.step_log.memory.pop() or None,
            "num_processes": self._run.accelerator.num_processes,
            "round": commit.round + 1,
            "round_seconds": seconds,
            "wait_seconds": own_wait,
            "utilization": min(1.0, self._compute_seconds / seconds),
            "tokens_lost": self._lost_tokens,
            "weights_hash": peer.state.outer.weights_hash(),
            "samples": self._samples,
            "participants": participants,
        }
        self._run.log.write(**row)
        numbers = {name: value for name, value in row.items() if isinstance(value, int | float) and name != "step"}
        self._run.trackers.log(numbers | {"num_machines": len(participants)}, step)
        postfix = {"loss": f"{row['loss']:.4f}", "tokens_per_second": f"{row['tokens_per_second']:,.0f}"}
        self._run.step_log.postfix = postfix
        steps = ", ".join(f"{each['peer']} {each['steps']}" for each in participants)
        logger.info(
            f"round {commit.round + 1}  step {step}/{self._run.inputs.plan.num_steps}  loss {row['loss']:.4f}  "
            f"lr {learning_rate:.2e}  {row['tokens_per_second']:,.0f} tokens/s  steps: "
            f"{steps}  {seconds:.1f} s = "
            f"{self._compute_seconds:.1f} compute + {own_wait:.1f} wait + {self._sync_seconds:.1f} exchange  "
            f"{self._num_bytes / 1e6:.2f} MB  utilization {row['utilization']:.0%}{self._run.step_log.time_left(step)}"
        )
        self._samples, self._num_bytes, self._sync_seconds, self._compute_seconds = [], 0, 0.0, 0.0


def warn_of_flags_without_effect(config: ElasticConfig) -> None:
    """Logs which of the given flags have no effect with this --sync-every."""
    reasons = {"check_replicas_every": "all peers compare the hash of their weights after each exchange"}
    if config.sync_every == 1:
        no_rounds = "with --sync-every 1 there are no rounds"
        reasons |= dict.fromkeys(("outer_learning_rate", "outer_momentum", "late_seconds"), no_rounds)
    else:
        reasons["log_every"] = "each round is logged"
    for line in describe_unused(config, reasons):
        logger.warning(line)


def describe_participants(members: list[Member]) -> list[dict]:
    """Returns what each member has computed in a round, and how long it then waited until the last one was there.

    That is what the members know of each other: not how long the lighthouse or failed exchanges took.
    """
    slowest = max(member.facts.busy_seconds for member in members)
    return [
        {
            "peer": facts.name,
            "steps": facts.steps,
            "tokens": facts.tokens,
            "compute_seconds": facts.compute_seconds,
            "wait_seconds": slowest - facts.busy_seconds,
        }
        for facts in (member.facts for member in members)
    ]
