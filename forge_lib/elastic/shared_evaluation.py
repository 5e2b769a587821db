"""Evaluates the shared weights; the peers that are present divide the held-out blocks, and each token counts once."""

import math

import numpy as np
from torch import nn
from torch.utils.data import Subset

from forge_lib.elastic.inner import tell_all
from forge_lib.elastic.meeting import ready_members
from forge_lib.elastic.peer import Peer
from forge_lib.elastic.work import Work
from forge_lib.training.evaluation import evaluation_totals
from forge_lib.training.run import Run


def evaluate_parts(run: Run, model: nn.Module, peer: Peer | None, work: Work) -> None:
    """Evaluates the model and logs the results. Call on all processes of the peer, right after a commit.

    There is one part for each peer of the round that begins, in proportion to the peers' speeds. Should a peer be lost
    before it has told its sums, the others compute its part.

    Args:
        run: of this peer.
        model: prepared, with the shared weights.
        peer: on the main process.
        work: of the round that begins; without one, this peer evaluates all blocks.
    """
    from forge_lib.training.evaluation_metrics import compute_metrics

    dataset, count = run.inputs.eval_dataset, max(1, work.group_size)
    edges = part_edges(len(dataset), work.speeds or [1.0])
    sums: dict[int, list[float]] = {}
    todo, num_met = [max(0, work.index)], 0
    with run.pause("evaluating"):
        while True:
            for part in todo:
                blocks = Subset(dataset, range(edges[part], edges[part + 1]))
                sums[part] = evaluation_totals(run, model, blocks, f"part {part}") if len(blocks) else [0.0] * 3
            todo = _meet(run, peer, work, sums, count) if peer else None
            num_met += 1
            run.peers.barrier(f"evaluation/{run.step}/{num_met}", math.inf)  # while the main process meets the peers
            todo = tell_all(run.accelerator, todo)
            if not todo:
                break
        if todo is None:
            return
        rows = tell_all(run.accelerator, [sums[part] for part in sorted(sums)])
        results = compute_metrics(np.array(rows), run.inputs.eval_tokens_per_byte)
    results["eval_loss"] = results.pop("loss")
    run.log_evaluation(results)


def part_edges(num_blocks: int, speeds: list[float]) -> list[int]:
    """Returns where the parts begin, and where the last one ends: part i of the blocks is [edges[i], edges[i + 1])."""
    return np.round(np.cumsum([0.0, *speeds]) / sum(speeds) * num_blocks).astype(int).tolist()


def _meet(run: Run, peer: Peer, work: Work, sums: dict[int, list[float]], count: int) -> list[int] | None:
    """Collects the sums of the other peers.

    Returns:
        The parts that this peer has to add, none if there are all; or None: it is asked to stop.
    """
    if count == 1:
        return []
    told = {"round": peer.state.round, "parts": {str(part): each for part, each in sums.items()}}
    facts = peer.facts(Work(work.index, work.group_size), sums=told)
    members = peer.membership.quorum(facts, lambda: bool(run.stop_request.reason()))
    if members is None:
        return None
    present = [each for each in ready_members(members) if each.facts.sums.get("round") == peer.state.round]
    for each in present:
        sums.update({int(part): values for part, values in each.facts.sums["parts"].items()})
    missing = [part for part in range(count) if part not in sums]
    ids = [each.id for each in present]
    return missing[ids.index(peer.membership.id) :: len(ids)] if peer.membership.id in ids else missing
