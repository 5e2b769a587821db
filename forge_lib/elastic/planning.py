"""What each peer computes in the round that begins. All peers derive the same plan from what they have said."""

import numpy as np

from forge_lib.elastic.ledger import Ledger
from forge_lib.elastic.pace import CATCH_UP_SECONDS, UPDATES_PER_ROUND, Pace, plan_round
from forge_lib.elastic.peer_facts import Member
from forge_lib.elastic.work import Work
from forge_lib.peers_config import ElasticConfig

UPDATE_SECONDS_DECAY = 0.9  # per round, of what a peer that catches up has measured: it downloads meanwhile
IDLE_DECAY = 0.5  # in addition, once nobody downloads


def plan_work(
    config: ElasticConfig, ledger: Ledger, round: int, ready: list[Member], own: str, update_seconds: float
) -> Work:
    """Returns this peer's work in the next round; the same call on the others gives them theirs.

    Args:
        config: every flag.
        ledger: of the state that all `ready` members have.
        round: of that state.
        ready: the members of the round; those that are leaving compute nothing.
        own: identifier of this peer.
        update_seconds: from `slowest_update`.
    """
    staying = [member for member in ready if not member.facts.is_leaving] or ready
    ids = [member.id for member in staying]
    plan = f"{round} {' '.join(ids)}"
    facts = [member.facts for member in staying]
    seconds = [each.step_seconds for each in facts]
    speeds = [1 / each for each in seconds] if all(seconds) else [1.0] * len(seconds)
    batch = None
    if config.sync_every == 1:
        samples = [[part] for part in ledger.divide(config.batch_size, speeds)]
        batch, pace = np.concatenate([part for (part,) in samples]), Pace([1], 0.0)
    else:
        exchange_seconds = max(each.exchange_seconds for each in facts)
        pace = plan_round(seconds, exchange_seconds, config.sync_every, update_seconds)
        samples = [
            ledger.samples_of(number, len(ids), steps, config.batch_size) for number, steps in enumerate(pace.steps)
        ]
    if own not in ids:
        return Work(plan=plan, batch=batch)
    index = ids.index(own)
    tokens = [sum(map(len, each)) * config.sequence_length for each in samples]
    return Work(
        index=index,
        group_size=len(ids),
        plan=plan,
        todo=[each for each in samples[index] if len(each)],
        batch=batch,
        planned_seconds=pace.seconds,
        num_planned=sum(pace.steps),
        planned_tokens={m.id: (m.facts.name, count) for m, count in zip(staying, tokens, strict=True)},
        speeds=speeds,
    )


def slowest_update(members: list[Member]) -> float:
    """Returns the seconds that a peer which catches up needs for one update; 0: no peer does, or not known.

    Each peer repeats it in what it says in the next quorum (see `remembered`), so that all know it while that peer
    downloads.
    """
    seconds = max(member.facts.update_seconds for member in members)
    return UPDATE_SECONDS_DECAY * min(seconds, CATCH_UP_SECONDS / UPDATES_PER_ROUND)  # with more, no round is longer


def remembered(update_seconds: float, is_serving: bool) -> float:
    """Returns what a peer repeats of `slowest_update`.

    Args:
        update_seconds: from `slowest_update`.
        is_serving: whether a peer downloads from this one; if none does, that peer is up to date, or gone.
    """
    return update_seconds if is_serving else IDLE_DECAY * update_seconds
