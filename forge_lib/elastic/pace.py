"""How long a round is, and how many steps each peer computes in it. All peers derive the same from the same facts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

FIRST_STEPS = 2  # of a round if no peer's speed, or no exchange, is known yet
MIN_STEPS, MAX_STEPS = 10, 100  # of --sync-every, if it is derived; and most of a round that waits for a slow peer
UPDATES_PER_ROUND = 4  # how many updates the slowest peer that catches up can download in a round
CATCH_UP_SECONDS = 600.0  # a round does not become longer than this for a peer that catches up
EXCHANGE_SHARE = 1 / 25  # of a round, with a derived --sync-every: peers compute 95 % of the time
LATE = 1.1  # a peer that has not arrived after this multiple of the round's seconds is late
FEW_STEPS = 5  # of a peer: from so many on, half a step is at most a tenth of the round


@dataclass(frozen=True)
class Pace:
    """The plan of a round.

    Attributes:
        steps: of each peer.
        seconds: that the steps take, 0 if no peer's speed is known.
    """

    steps: list[int]
    seconds: float


def plan_round(
    step_seconds: Sequence[float], exchange_seconds: float, sync_every: int, update_seconds: float = 0.0
) -> Pace:
    """Returns the steps of each peer: all compute for the same time, and together make `sync_every` steps on average.

    They make more if a step of the slowest peer takes longer than that: it then makes a whole one, and nobody waits
    for it. With a peer for which they had to make more than MAX_STEPS, they do wait.

    Args:
        step_seconds: seconds per step of each peer; 0: not known. Such a peer is planned as if it were as fast as the
            slowest of the others; if it is slower, it ends its round early, before it would be late.
        exchange_seconds: of the slowest of the last exchanges; 0: not known.
        sync_every: average steps of a peer; 0: derived, so that the exchange takes a small share of the round.
        update_seconds: that a peer which catches up needs to download one update; 0: no peer does. Rounds are not
            shorter than a few of them, or that peer would never have all updates.
    """
    known = [seconds for seconds in step_seconds if seconds > 0]
    if not known:
        return Pace([min(FIRST_STEPS, sync_every or FIRST_STEPS)] * len(step_seconds), 0.0)
    mean_seconds = len(known) / sum(1 / seconds for seconds in known)  # of a step, averaged over all steps
    average = sync_every
    if not average:
        average = round(exchange_seconds / EXCHANGE_SHARE / mean_seconds)
        average = min(MAX_STEPS, max(MIN_STEPS, average))
        if not exchange_seconds and len(step_seconds) > 1:
            average = FIRST_STEPS  # the first exchange follows soon, and is measured
    for_late_peer = min(UPDATES_PER_ROUND * update_seconds, CATCH_UP_SECONDS)
    average = max(average, math.ceil(for_late_peer / mean_seconds))
    slowest = max(known)
    average = max(average, min(MAX_STEPS, math.ceil(slowest / mean_seconds)))  # the slowest peer makes one step
    seconds = average * mean_seconds
    if slowest <= seconds < FEW_STEPS * slowest:
        seconds = round(seconds / slowest) * slowest  # whole steps of that peer: else the others would wait for it
    return Pace([max(1, round(seconds / (each or slowest))) for each in step_seconds], seconds)


def fits_grace(remaining_seconds: float, exchange_seconds: float, grace_seconds: float) -> bool:
    """Returns whether a peer that is asked to stop has the time to finish its round and its exchange, and to save.

    Args:
        remaining_seconds: until the planned end of the round; below 0: the others are late.
        exchange_seconds: of the last exchange.
        grace_seconds: until the process is ended; a half of it is for the save.
    """
    if remaining_seconds <= -grace_seconds / 4:
        return False
    return max(0.0, remaining_seconds) + exchange_seconds <= grace_seconds / 2


def late_after(planned_seconds: float, late_seconds: float) -> float:
    """Returns the seconds from the begin of a round after which a peer is late.

    Args:
        planned_seconds: of the round.
        late_seconds: --late-seconds; 0: a tenth of the round.
    """
    return planned_seconds + late_seconds if late_seconds else LATE * planned_seconds
