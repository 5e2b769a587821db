"""What a training script does before its loop: meet the others, get model, data and checkpoint, agree on all of it.

It is made of the other modules of forge_lib, and the only one that imports them: each training script needs the same.
All functions here are called on all processes.
"""

import dataclasses
import logging
import uuid
import warnings
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from transformers import PreTrainedTokenizerBase

from forge_lib.checkpoints import format as checkpoint
from forge_lib.checkpoints import saver
from forge_lib.config import TrainConfig, flag_name
from forge_lib.data import batches, blocks, corpus
from forge_lib.data.token_store import TokenStore, is_store, open_store, received_folder, verify_store
from forge_lib.distributed import agreement as cluster
from forge_lib.distributed import transfer
from forge_lib.distributed.lock import RunLock
from forge_lib.distributed.peers import Peers
from forge_lib.errors import UserError
from forge_lib.models import model as models
from forge_lib.process import World

logger = logging.getLogger("forge")


def join(
    config: TrainConfig, world: World, peers: Peers, lock: RunLock, trackers: list[str]
) -> tuple[Accelerator, cluster.Agreement]:
    """Meets the other processes, locks the run folder, and forms a process group; call on all processes."""
    output_dir = lock.folder
    device = cluster.choose_device(config.device, world)
    if world.is_local_main:
        make_folder(output_dir, world)
    peers.set_status("measuring its speed")
    facts = cluster.local_facts(config, world, device)
    facts |= {"machine": world.machine, "run_id": uuid.uuid4().hex, "has": has_inputs(config)}
    peers.address = facts["address"]
    agreement = cluster.agree(peers.all_gather(facts), config)
    for turn in (True, False):  # on a disk that machines share, the main one gets the folder
        if world.is_local_main and (world.process_index == 0) == turn:
            lock.take(agreement.peers[0]["run_id"])
        peers.barrier(f"locks, {'main machine' if turn else 'others'}")

    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")  # its successor is not in torch 2.8
    handlers = [DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)]
    if world.num_processes > 1:
        timeout = timedelta(seconds=cluster.GROUP_START_SECONDS)
        handlers.append(InitProcessGroupKwargs(backend=agreement.backend, timeout=timeout))
    accelerator = Accelerator(
        cpu=device == "cpu",
        mixed_precision=agreement.mixed_precision,
        log_with=trackers or None,
        project_dir=output_dir,
        kwargs_handlers=handlers,
    )
    cluster.check_world(world, accelerator.num_processes)
    logger.setLevel(logging.INFO if accelerator.is_main_process else logging.ERROR)
    return accelerator, agreement


def make_folder(output_dir: Path, world: World) -> None:
    """Makes the run folder; UserError where it cannot be written to."""
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        (output_dir / "run.lock").touch()
        if world.process_index == 0:
            (output_dir / "metrics.jsonl").touch()
    except OSError as error:
        raise UserError(f"--output-dir {output_dir} cannot be written to: {error.strerror}") from None


def has_inputs(config: TrainConfig) -> dict[str, bool]:
    """Tells, by flag, whether the model folder and the data lie on this machine."""
    return {
        "model_name": models.is_here(config.model_name),
        "dataset_path": corpus.is_here(config.dataset_path),
        "eval_dataset_path": corpus.is_here(config.eval_dataset_path),
    }


def keeps_checkpoints(config: TrainConfig, world: World, agreement: cluster.Agreement) -> bool:
    """Tells whether this process's machine is among `--checkpoint-machines`."""
    machines = sorted({peer["machine"] for peer in agreement.peers})
    count = {"all": len(machines), "main": 1}.get(config.checkpoint_machines) or int(config.checkpoint_machines)
    return world.machine in machines[:count]


@dataclass(frozen=True)
class Inputs:
    """What a run works on, the same on all processes.

    Attributes:
        tokenizer, model: as loaded, on the CPU.
        store: the tokens to train on.
        eval_store: the store of the held-out tokens, if need be the same one.
        dataset, eval_dataset: blocks to train on, and held-out ones if there are any.
        plan: which blocks each step takes.
        run: what must not change while a run goes on.
        warnings: differences between the machines that do no harm.
    """

    tokenizer: PreTrainedTokenizerBase
    model: torch.nn.Module
    store: TokenStore
    eval_store: TokenStore
    dataset: blocks.BlockDataset
    eval_dataset: blocks.BlockDataset | None
    plan: batches.BatchPlan
    run: dict
    warnings: list[str]


def load_inputs(config: TrainConfig, world: World, peers: Peers, agreement: cluster.Agreement) -> Inputs:
    """Loads model and data, from another machine where this one lacks them, and compares them; call on all."""
    peers.set_status("loading the model")
    fetch_model(config, world, peers, agreement)
    tokenizer = models.load_tokenizer(config)
    torch.manual_seed(config.seed)
    model = models.load_model(config, len(tokenizer), config.sequence_length)
    if config.mask_documents:
        models.check_document_mask(model)
    store = fetch_store(config, "dataset_path", tokenizer, world, peers, agreement)
    eval_store = store
    if config.eval_dataset_path:
        eval_store = fetch_store(config, "eval_dataset_path", tokenizer, world, peers, agreement)
    dataset, eval_dataset = make_datasets(config, store, eval_store)
    plan = batches.BatchPlan.of_run(len(dataset), config.batch_size, config.max_steps, config.epochs, config.seed)
    peers.set_status("hashing the model")
    random_weights = config.from_scratch or not models.has_weights(config.model_name)
    weights = models.hash_weights(model)
    run = describe_run(config, model, store) | {"initial_weights": "random" if random_weights else weights}
    facts = {
        "host": peers.host,
        "weights": weights,
        "random_weights": random_weights,
        "fingerprints": {
            "--dataset-path": store.fingerprint,
            "--eval-dataset-path": eval_store.fingerprint if eval_dataset else "none",
            "model configuration": models.hash_config(model),
            "kind of initial weights": "random" if random_weights else "pretrained",
            "tokenizer": corpus.tokenizer_fingerprint(tokenizer),
        },
    }
    differences = cluster.compare(peers.all_gather(facts, "inputs"))
    return Inputs(tokenizer, model, store, eval_store, dataset, eval_dataset, plan, run, differences)


def fetch_model(config: TrainConfig, world: World, peers: Peers, agreement: cluster.Agreement) -> None:
    """Gets the model folder from another machine where this one lacks it."""
    if any(peer["has"]["model_name"] for peer in agreement.peers):
        folder = Path(config.model_name).expanduser()
        fetch("the model", folder if models.is_here(config.model_name) else None, folder, world, peers, agreement)


def fetch_store(
    config: TrainConfig,
    field: str,
    tokenizer: PreTrainedTokenizerBase,
    world: World,
    peers: Peers,
    agreement: cluster.Agreement,
) -> TokenStore:
    """Opens the token store of `--dataset-path` or `--eval-dataset-path`, making it or getting it from a machine.

    What was made from raw text on another machine comes into the cache; a token store comes to the path that the flag
    names.
    """
    path = getattr(config, field)
    config = dataclasses.replace(config, dataset_path=path, eval_dataset_path="")
    have_it = [peer["has"][field] for peer in agreement.peers]
    store = None
    if have_it[world.process_index] or not any(have_it):
        store = corpus.prepare_store(config, tokenizer, progress=peers.set_status)
        if world.is_local_main:
            verify_store(store, progress=peers.set_status)
    facts = {"fingerprint": store.fingerprint if store else "", "is_store": is_store(path)}
    theirs = next(facts for facts in peers.all_gather(facts, field) if facts["fingerprint"])
    folder = store.folder if store else received_folder(theirs["fingerprint"])
    if not store and theirs["is_store"] and not corpus.is_here(str(folder)):
        folder = Path(path).expanduser()
    here = is_store(folder)
    if here and not store and world.is_local_main:  # received in an earlier run
        verify_store(open_store(folder), progress=peers.set_status)
    fetch(f"the token store of {flag_name(field)}", folder if here else None, folder, world, peers, agreement)
    return store or open_store(folder)


def fetch(
    what: str, held: Path | None, target: Path, world: World, peers: Peers, agreement: cluster.Agreement
) -> None:
    """Copies a folder from the first machine that holds it to all that do not; call on all processes.

    Args:
        what: for messages; also the name under which the processes meet here, so once for each.
        held: the folder where this machine holds it, else None.
        target: where it shall lie.
    """
    mine = {"held": held is not None, "sends": held is not None and held.is_dir()}  # what is in a cache stays there
    found = peers.all_gather(mine, f"{what}, who has it")
    firsts = sorted({peer["machine"] for peer in agreement.peers})  # the first process of each machine
    lacking = [rank for rank in firsts if not found[rank]["held"]]
    sender = next((rank for rank in firsts if found[rank]["sends"]), None)
    if not lacking or sender is None:
        return
    files = {}
    if world.process_index == sender:
        peers.set_status(f"hashing {what}")
        files = transfer.list_files(held)
    files = peers.all_gather({"files": files}, f"{what}, its files")[sender]["files"]
    group = dist.new_group(backend="gloo") if agreement.backend == "nccl" else None
    hosts = [peer["host"] for peer in agreement.peers]
    if world.process_index == sender:
        transfer.send(held, files, {rank: hosts[rank] for rank in lacking}, group, peers.set_status)
    elif world.process_index in lacking:
        transfer.receive(target, files, sender, hosts[sender], group, peers.set_status)
    peers.set_status(f"waiting for {what} to arrive")
    peers.barrier(f"{what}, arrived")


def resume(
    config: TrainConfig,
    world: World,
    peers: Peers,
    agreement: cluster.Agreement,
    inputs: Inputs,
    optimizers: list[torch.optim.Optimizer],
    lock: RunLock,
) -> tuple[dict | None, list[str]]:
    """Settles from which checkpoint the run goes on, brings it to the machines without it, and loads it; call on all.

    Returns:
        The state in it, if there is one, and lines for the log.

    Raises:
        UserError: `--resume` cannot be followed, or all checkpoints that there are belong to another run.
    """
    folder = lock.folder / "checkpoints"
    lines, found = [], None
    peers.set_status("verifying its checkpoints")
    if world.is_local_main:
        if lock.held:
            lines += saver.sweep(folder)
        found = checkpoint.find(folder, config.resume, inputs.run)
        lines += found.passed_over
    mine = {
        "step": found.step if found and found.path else -1,
        "sha256": found.sha256 if found else "",
        "path": str(found.path) if found else "",
        "lines": [f"{peers.host}: {line}" for line in lines],
        "foreign": found.foreign if found else [],
    }
    all_found = peers.all_gather(mine, "checkpoints")
    lines = [line for each in all_found for line in each["lines"]]
    foreign = [line for each in all_found for line in each["foreign"]]
    newest = max(each["step"] for each in all_found)
    if newest < 0:
        if foreign:
            raise UserError(f"{'; '.join(dict.fromkeys(foreign))}. Keep the old values, or name another --output-dir")
        if config.resume not in ("auto", "never"):
            raise UserError(f"--resume {config.resume}: no such checkpoint on any machine")
        return None, lines
    lines += [f"passed over: {line}" for line in foreign]
    best = next(each for each in all_found if each["step"] == newest)
    theirs = all_found[world.machine]  # of this machine's first process
    held = Path(theirs["path"]) if theirs["sha256"] == best["sha256"] else None
    target = checkpoint.step_path(folder, newest)
    fetch(f"checkpoint {target.name}", held, target, world, peers, agreement)
    if newest > inputs.plan.num_steps:
        raise UserError(
            f"{best['path']} is at step {newest}, but the run shall end at step {inputs.plan.num_steps}; raise "
            "--max-steps or --epochs, or name another --output-dir"
        )
    state = checkpoint.load(held or target, inputs.model, optimizers)
    peers.barrier("checkpoint, loaded")
    if lock.held and config.resume != "auto":  # the path's is the run's newest from now on
        lines += [f"{name}, newer than {best['path']}, is set aside" for name in checkpoint.set_aside(folder, newest)]
        checkpoint.adopt(held or target, folder, newest)
    return state, lines


def make_datasets(
    config: TrainConfig, store: TokenStore, eval_store: TokenStore
) -> tuple[blocks.BlockDataset, blocks.BlockDataset | None]:
    """Returns the blocks to train on, and the held-out ones if there are any."""
    stream, eval_stream = blocks.TokenStream(store.tokens, store.documents), None
    if config.eval_fraction:
        stream, eval_stream = blocks.split_documents(store.tokens, store.documents, config.eval_fraction, config.seed)
    elif config.eval_dataset_path:
        eval_stream = blocks.TokenStream(eval_store.tokens, eval_store.documents)
    cut = (config.sequence_length, config.mask_documents)
    return (
        blocks.BlockDataset(stream, *cut),
        blocks.BlockDataset(eval_stream, *cut, keep_tail=True) if eval_stream else None,
    )


def describe_run(config: TrainConfig, model: torch.nn.Module, store: TokenStore) -> dict:
    """Returns what a run is, whatever its length and learning rate: a checkpoint goes on in the same run alone."""
    same = (
        "lora_rank",
        "lora_alpha",
        "batch_size",
        "sequence_length",
        "mask_documents",
        "eval_fraction",
        "optimizer",
        "seed",
    )
    return {
        "data": store.fingerprint,
        "model_config": models.hash_config(model),
        "tokenizer": store.manifest["tokenizer"]["fingerprint"],
        "model": f"{model.config.model_type} of {sum(p.numel() for p in model.parameters()):,} parameters",
        **{name: getattr(config, name) for name in same},
    }
