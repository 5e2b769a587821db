"""What state.json of a checkpoint and run.json of a run folder contain, and the random seed of a step."""

import dataclasses

import numpy as np

from forge_lib.config import flag_name
from forge_lib.data.batches import BatchPlan
from forge_lib.training.inputs import Inputs
from forge_lib.training.session import Session

STEP_SEED = "numpy SeedSequence((seed, step, process_index))"  # state.json records how `step_seed` works


def step_seed(seed: int, step: int, process_index: int) -> int:
    """Returns the seed of torch's random generator (for dropout) in one step of one process, from 0 to 2^63 - 1.

    numpy's SeedSequence hashes the three numbers: its result is documented to stay the same on all platforms and
    versions.
    """
    sequence = np.random.SeedSequence((seed % (1 << 64), step, process_index))
    return int(sequence.generate_state(1, np.uint64)[0]) >> 1


def warn_about_dropout(dropout: float, state: dict) -> list[str]:
    """Returns a line for the log if the run continues with other dropout masks than it would have had."""
    if dropout and state.get("random", {}).get("of_a_step") != STEP_SEED:
        return ["an older version of this program wrote the checkpoint: the dropout masks differ from its own"]
    return []


def describe_state(session: Session, inputs: Inputs, step: int, scaler_state: dict | None) -> dict:
    """Returns what a checkpoint contains besides its tensors: the same on all machines."""
    num_samples, num_blocks = inputs.plan.num_samples(step), inputs.plan.num_blocks
    processes = session.agreement.processes
    return {
        "run": inputs.identity,
        "config": agreed_config(session),
        "world": [{"host": process.host, "device": process.device_name} for process in processes],
        "sampler": {"num_samples": num_samples, "num_blocks": num_blocks, "epoch": num_samples / num_blocks},
        "random": {"seed": session.config.seed, "of_a_step": STEP_SEED},
        "scaler": scaler_state,
    }


def agreed_config(session: Session) -> dict:
    """Returns the configuration that all processes share, with the precision that they agreed on."""
    return session.agreement.processes[0].config | {"mixed_precision": session.agreement.mixed_precision}


def changed_settings(session: Session, plan: BatchPlan, state: dict) -> list[str]:
    """Returns a phrase for each flag whose value differs from the one that the checkpoint was written with."""
    before = state["config"]
    lines = [
        f"{flag_name(name)} was {before[name]!r} and is now {value!r}"
        for name, value in agreed_config(session).items()
        if name in before and before[name] != value and name != "resume"
    ]
    missing = plan.num_samples(state["step"]) - state["sampler"]["num_samples"]
    if missing > 0:
        lines.append(f"{missing} sequence(s) are left out, because the last batch of the shorter run was not full")
    return lines


def describe_run(session: Session, inputs: Inputs, shares: list[int], timeout: dict) -> dict:
    """Returns the content of run.json.

    Args:
        session: the processes.
        inputs: model, data and plan.
        shares: sequences of each global batch, by rank.
        timeout: of `GroupTimeout.describe`.
    """
    world = [dataclasses.asdict(process) for process in session.agreement.processes]
    return {
        "config": dataclasses.asdict(session.config),
        "batches": dataclasses.asdict(inputs.plan) | {"shares": shares},
        "world": [{key: value for key, value in process.items() if key != "config"} for process in world],
        "data": _describe_data(inputs),
        "backend": session.agreement.backend,
        "mixed_precision": session.agreement.mixed_precision,
        "process_group_timeout": timeout,
        "run": inputs.identity,
    }


def _describe_data(inputs: Inputs) -> dict:
    """Returns what people ask about the data: its size, and its fingerprints."""
    facts = {
        "num_tokens": inputs.store.manifest["num_tokens"],
        "num_documents": inputs.store.manifest["num_documents"],
    }
    facts["fingerprint"] = inputs.store.fingerprint
    if inputs.eval_dataset:
        facts |= {
            "num_held_out_blocks": len(inputs.eval_dataset),
            "held_out_fingerprint": inputs.eval_store.fingerprint,
        }
    return facts
