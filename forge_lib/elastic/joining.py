"""The state with which a peer begins: from its checkpoint and its own files. Other peers may have a newer one."""

import torch

from forge_lib.elastic.catch_up import serve_inputs
from forge_lib.elastic.ledger import Ledger
from forge_lib.elastic.outer import OuterOptimizer
from forge_lib.elastic.peer import Peer
from forge_lib.elastic.shared_state import SharedState
from forge_lib.elastic.state_files import StateFiles
from forge_lib.errors import UserError
from forge_lib.peers_config import ElasticConfig
from forge_lib.training.run import Run

FIXED_FLAGS = (  # equal on all peers, like the data, the model and the tokenizer
    "batch_size", "sequence_length", "mask_documents", "max_steps", "epochs", "seed", "eval_fraction", "eval_every",
    "optimizer", "learning_rate", "lr_scheduler", "warmup_steps", "decay_steps", "weight_decay", "max_grad_norm",
    "dropout", "lora_rank", "lora_alpha", "sync_every", "compression", "outer_learning_rate", "outer_momentum",
)  # fmt: skip
FIXED_INPUTS = ("data", "model_config", "tokenizer", "initial_weights")


def give_state(peer: Peer, outer: OuterOptimizer, config: ElasticConfig, run: Run) -> None:
    """Gives a peer the state that it shares with the others, and lets it serve its model and data."""
    inputs = run.inputs
    flags = {name: getattr(config, name) for name in FIXED_FLAGS}
    flags |= {name: inputs.identity[name] for name in FIXED_INPUTS}
    flags |= {"held-out data": inputs.eval_store.fingerprint}
    identity = inputs.identity | {"is_inner_state_shared": config.sync_every == 1}
    state = SharedState(outer, Ledger(inputs.plan.num_samples(inputs.plan.num_steps)))
    folder = run.session.folder / "shared"
    files = StateFiles(state, folder, peer.shared, identity, keeps_checkpoints=config.checkpoint_every > 0)
    peer.own_state(files, flags)
    stores = {"dataset_path": inputs.store.folder}
    if config.eval_dataset_path:
        stores["eval_dataset_path"] = inputs.eval_store.folder
    serve_inputs(config, peer.shared, stores)
    peer.membership.on_wait = run.session.lock.set_waiting


def restore_state(
    files: StateFiles, saved: dict | None, optimizers: list[torch.optim.Optimizer], config: ElasticConfig, run: Run
) -> None:
    """Brings the shared state to the last round that this machine knows.

    Args:
        files: of the peer's state; the checkpoint's vectors are loaded already.
        saved: the checkpoint's description of the state; None: there is none.
        optimizers: of the loop.
        config: every flag.
        run: of this peer.

    Raises:
        UserError: a file is damaged, or the run cannot go on with --sync-every 1.
    """
    state = files.state
    if saved and config.sync_every == 1 and run.saved_state("config")["sync_every"] != 1:
        raise UserError(
            "--sync-every 1 cannot continue this run: its peers have trained alone for some steps, so the moments of "
            "their optimizers differ. Keep --sync-every, or name another --output-dir"
        )
    if config.sync_every == 1:
        state.inner_optimizers = optimizers
    if saved and not state.load(saved):
        raise UserError("the checkpoint's shared state does not have its hash: remove this checkpoint")
    if not saved and run.step:
        state.start_after(run.inputs.plan.num_samples(run.step))
    if config.resume == "auto":
        files.replay()
    else:
        files.forget()
