"""Divides the global batch among unequal processes, by their measured speeds: `--balance`.

The samples of a step and their order stay the same, and so does the loss, up to rounding: only who computes which of
them changes. Every process measures how long its own forward and backward passes take, without communication. The
times of the last step travel in the all-reduce of the loss, so all processes know them, and decide the same.
"""

import logging
from collections import deque
from collections.abc import Sequence

import numpy as np

from forge_lib.config import TrainConfig
from forge_lib.data.batches import divide_batch, fit_shares
from forge_lib.errors import UserError
from forge_lib.process import World
from forge_lib.training.log import MetricsLog
from forge_lib.training.session import Session

logger = logging.getLogger("forge")

SKIPPED_STEPS = 3  # the first ones compile, and fill caches
CHECK_EVERY = 3  # steps; a check takes half a millisecond
# The shares change if the mean step becomes faster by a factor, in each half of the last steps. A large gain is taken
# soon. A small one must last: a machine's own speed often changes by a few percent for a dozen steps.
RULES = ((12, 1.25), (48, 1.05))  # number of steps, factor
CALM_STEPS, CALM_GAIN = 60, 1.4  # soon after a change, the next one needs a gain that only another speed explains
MIN_SIGMAS = 4  # the mean gain must have so many standard errors: noise alone gives less
WINDOW = 6  # steps, of the logged speeds and of the warning about a slow process
USUAL_STEPS = 200  # with which a process is compared:
SLOW_RATIO = 1.5  # if it takes this much longer in two windows, it is named
STEADY_RATIO = 1.2  # while the others do not


class Balancer:
    """The shares of the processes, and when they change.

    Args:
        config: every flag.
        world: the processes.

    Attributes:
        is_on: whether the shares follow the speeds: with `--balance auto`, and by default with several machines.
        shares: sequences of the next global batch, by rank.
        used: the shares of the running step.

    Raises:
        UserError: the flags exclude each other, or the batch cannot be divided as they say.
    """

    def __init__(self, config: TrainConfig, world: World):
        if config.balance == "auto" and config.shares:
            raise UserError(f"--shares {config.shares} and --balance auto exclude each other: give one of them")
        wanted = config.balance or ("auto" if world.num_local_processes < world.num_processes else "even")
        self.is_on = wanted == "auto" and not config.shares and world.num_processes > 1
        if self.is_on and config.batch_size >= world.num_processes:
            self.shares = fit_shares([1.0] * world.num_processes, config.batch_size)
        else:
            self.shares = divide_batch(config.batch_size, config.shares, world.num_processes)
        self.used, self._origin = self.shares, ""
        self._config, self._rank = config, world.process_index
        self._num_steps, self._changed_at = 0, -CALM_STEPS
        # Seconds per sequence, by rank, of the last steps
        self._times: deque[np.ndarray] = deque(maxlen=RULES[-1][0])  # with these shares, for the next change
        self._usual_times: deque[np.ndarray] = deque(maxlen=USUAL_STEPS)  # with these shares, to find a slower process
        self._recent_times: deque[np.ndarray] = deque(maxlen=WINDOW)  # for the log
        self._named: set[int] = set()  # the processes that are slow now, and were named

    def start(self, session: Session, log: MetricsLog, saved: dict, extra_state: dict[str, dict]) -> None:
        """Takes the shares of the checkpoint, if the machines and their devices are the same ones in the same order.

        Args:
            session: the processes.
            log: metrics.jsonl.
            saved: the checkpoint's state.json; empty: there is no checkpoint.
            extra_state: of the next checkpoints; the shares are kept in it.
        """
        self._session, self._log = session, log
        world = [{"host": each.host, "device": each.device_name} for each in session.agreement.processes]
        shares = saved.get("balance", {}).get("shares", [])
        if self.is_on and saved.get("world") == world and sum(shares) == self._config.batch_size:
            self.shares = self.used = shares
            self._origin = f"; they begin as in the checkpoint: {describe_shares(shares)}"
        self._extra_state = extra_state
        extra_state["balance"] = {"shares": self.shares}

    @property
    def is_settled(self) -> bool:
        """Whether the shares have been the same for a while."""
        return len(self._times) == RULES[-1][0]

    def describe(self) -> str:
        """Returns a line for the log if the shares follow the speeds, else an empty text."""
        follow = "the shares of the batch follow the speeds of the processes (--balance auto)"
        return follow + self._origin if self.is_on else ""

    def own_times(self, seconds: float) -> list[float]:
        """Returns what a process adds to the all-reduce: its seconds of the last step, and 0 for the others."""
        return [seconds if rank == self._rank else 0.0 for rank in range(len(self.shares))]

    def add(self, step: int, seconds: Sequence[float]) -> None:
        """Records a step, and changes the shares if that makes steps faster. Call on all processes.

        Args:
            step: completed steps.
            seconds: of the step before, by rank: what each process has computed; 0: not known.
        """
        used, self.used = self.used, self.shares
        self._num_steps += 1
        if self._num_steps <= SKIPPED_STEPS or min(seconds) <= 0:
            return
        self._recent_times.append(np.array(seconds) / np.maximum(1, used))
        if not self.is_on or used != self.shares:  # the first step with other shares may compile
            return
        self._times.append(self._recent_times[-1])
        self._usual_times.append(self._recent_times[-1])
        if self._num_steps % CHECK_EVERY:
            return
        self._warn_of_slow(step)
        least_gain = CALM_GAIN if self._num_steps - self._changed_at < CALM_STEPS else 1.0
        for num_steps, rule_gain in RULES:
            min_gain = max(rule_gain, least_gain)
            if len(self._times) >= num_steps and self._try_change(step, np.array(self._times)[-num_steps:], min_gain):
                return

    def sequences_per_second(self) -> list[float] | None:
        """Returns how many sequences each process computes per second, by rank; None: not measured yet."""
        if not self._recent_times:
            return None
        return (1 / np.median(np.array(self._recent_times), axis=0)).tolist()

    def _try_change(self, step: int, times: np.ndarray, min_gain: float) -> bool:
        """Changes the shares if they would have made these steps faster; returns whether it has.

        Args:
            step: completed steps.
            times: [steps, processes] seconds per sequence.
            min_gain: the mean step of each half must become faster by this factor.
        """
        half = len(times) // 2
        now = np.median(times[half:], axis=0)
        shares = fit_shares(now.tolist(), self._config.batch_size)
        as_now, as_then = (times * self.shares).max(axis=1), (times * shares).max(axis=1)  # seconds of each step
        saved = as_now - as_then
        gain = min(as_now[part].mean() / as_then[part].mean() for part in (slice(half), slice(half, None)))
        if gain <= min_gain or saved.mean() <= MIN_SIGMAS * saved.std(ddof=1) / len(saved) ** 0.5:
            return False
        self._warn_of_slow(step, is_last=True)
        self._change(step, shares, now, gain)
        return True

    def _change(self, step: int, shares: list[int], seconds: np.ndarray, gain: float) -> None:
        speeds = ", ".join(f"{1 / each:,.1f}" for each in seconds)
        logger.info(
            f"step {step}: the shares change from {describe_shares(self.shares)} to {describe_shares(shares)}: the "
            f"processes compute {speeds} sequences/s; a step should take {1 / gain:.0%} of its time"
        )
        self._log.write(
            step=step, event="shares", before=self.shares, shares=shares, seconds_per_sequence=seconds.tolist()
        )
        self.shares, self._changed_at = shares, self._num_steps
        self._extra_state["balance"] = {"shares": shares}  # a new one: a save may still write the old one
        self._times.clear()
        self._usual_times.clear()  # a small share takes longer per sequence

    def _warn_of_slow(self, step: int, is_last: bool = False) -> None:
        """Names a process that has become slower for good, once, while the others have not.

        Args:
            step: completed steps.
            is_last: the shares change now, because of the last window.
        """
        times = np.array(self._usual_times)
        if len(times) < 4 * WINDOW:
            return
        usual, before, now = (
            np.median(part, axis=0) for part in (times[: -2 * WINDOW], times[-2 * WINDOW : -WINDOW], times[-WINDOW:])
        )
        ratios = (now if is_last else np.minimum(before, now)) / usual
        slowest = int(ratios.argmax())
        if ratios[slowest] > SLOW_RATIO and np.median(np.delete(ratios, slowest)) < STEADY_RATIO:
            if slowest not in self._named:
                host = self._session.hosts[slowest]
                ratio = float(ratios[slowest])
                logger.warning(
                    f"step {step}: process {slowest} on {host} takes {ratio:.1f} times as long as before: is another "
                    "program running there, or is it too hot?"
                )
                self._log.write(step=step, event="slower", process=slowest, host=host, ratio=ratio)
            self._named.add(slowest)
        self._named = {each for each in self._named if ratios[each] > STEADY_RATIO}


def describe_shares(shares: Sequence[int]) -> str:
    """Returns shares as in `6 + 2`."""
    return " + ".join(map(str, shares))
