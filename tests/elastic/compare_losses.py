"""Compares the loss of averaging every H steps with that of one global batch, at equal tokens.

    python tests/elastic/compare_losses.py --output artifacts/losses.json

Peers are simulated in one process, one after the other, with the code that real peers run: ledger, codecs, exchange
(in memory), outer optimizer. The model is the bundled one, trained with one global batch for a while; the text is
Python's own library. Held-out loss after the same number of tokens. The baseline is one model with the global batch
of all peers, which is H = 1 without compression. Prints tables with the means over the seeds. Cases that the output
file has already are not run again; beside it lie the text and the trained models.
"""

import argparse
import copy
import itertools
import json
import statistics
import sys
import threading
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from python_library import prepare_library  # noqa: E402

from forge_lib.data.batches import BatchPlan, read_batch  # noqa: E402
from forge_lib.elastic import averaging  # noqa: E402
from forge_lib.elastic.compression import CODECS  # noqa: E402
from forge_lib.elastic.flat import FlatParameters, Shards  # noqa: E402
from forge_lib.elastic.ledger import Ledger  # noqa: E402
from forge_lib.elastic.meeting import to_ranges  # noqa: E402
from forge_lib.elastic.outer import SPARSE_ERROR_DECAY, OuterOptimizer, default_rates  # noqa: E402
from forge_lib.flags import parse_config  # noqa: E402
from forge_lib.models.loading import load_model, load_tokenizer  # noqa: E402
from forge_lib.models.loss import evaluation_sums, loss_sum  # noqa: E402
from forge_lib.models.optimizers import build_optimizers, learning_rate_schedule, set_learning_rate  # noqa: E402
from forge_lib.peers_config import ElasticConfig  # noqa: E402
from forge_lib.training.inputs import make_datasets, prepare_store  # noqa: E402

FLAGS = ["--model-name", "data/tiny_gpt2", "--eval-fraction", "0.005", "--output-dir", "unused"]
FLAGS += ["--lighthouse", "http://unused:1"]


@dataclass(frozen=True)
class Case:
    """One run: its peers, the steps of a round (0: the baseline, one model with the batch of all), and how it
    sends."""

    num_peers: int
    sync_every: int
    compression: str
    optimizer: str
    seed: int
    outer: tuple[float, float] | None = None  # learning rate and momentum; None: the defaults

    @property
    def name(self) -> str:
        """Describes it, without the seed."""
        how = f"H = {self.sync_every}, {self.compression}" if self.sync_every else "one global batch"
        outer = f", outer {self.outer[0]:g} / {self.outer[1]:g}" if self.outer and self.sync_every else ""
        return f"{self.optimizer}, {self.num_peers} peers, {how}{outer}"


class Mailbox:
    """The messages between simulated peers."""

    def __init__(self) -> None:
        self._queues: dict[tuple, Queue] = {}
        self._lock = threading.Lock()

    def queue(self, *key: Any) -> Queue:
        """Returns the queue of (sender, receiver, tag)."""
        with self._lock:
            return self._queues.setdefault(key, Queue())


class MemoryGroup:
    """A PeerGroup whose messages stay in memory."""

    def __init__(self, mailbox: Mailbox, rank: int, size: int):
        self._mailbox, self.rank, self.size = mailbox, rank, size

    def transfer(self, sent: dict, received: dict, tag: int, timeout_seconds: float) -> None:
        """Puts copies of tensors into the queues of their receivers, and waits for those that this peer receives."""
        for rank, tensor in sent.items():
            self._mailbox.queue(self.rank, rank, tag).put(tensor.clone())
        for rank, tensor in received.items():
            tensor.copy_(self._mailbox.queue(rank, self.rank, tag).get(timeout=timeout_seconds))


class SimulatedPeer:
    """A model with its optimizers."""

    def __init__(self, config: ElasticConfig, model: torch.nn.Module):
        self.model = model
        self.optimizers = build_optimizers(model, config)
        self.outer = OuterOptimizer(FlatParameters(model))
        self.owner_error: torch.Tensor | None = None

    def train(self, config: ElasticConfig, dataset, blocks: np.ndarray, rate: float) -> None:
        """Makes one step."""
        self.compute_gradient(dataset, blocks)
        self.update(config, rate)

    def compute_gradient(self, dataset, blocks: np.ndarray) -> None:
        """Computes the gradient of the mean loss of some blocks."""
        loss_sum(self.model, read_batch(dataset, blocks.tolist())).div(dataset.num_targets(blocks)).backward()

    def update(self, config: ElasticConfig, rate: float) -> None:
        """Changes the weights, and drops the gradient."""
        set_learning_rate(self.optimizers, rate)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.max_grad_norm)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()


def average_gradients(peers: list[SimulatedPeer], case: Case) -> None:
    """Gives each peer the average of all gradients, as --sync-every 1 sends them."""
    gradients = []
    for peer in peers:
        gradient = torch.empty(peer.outer.flat.total)
        peer.outer.flat.read_gradients(gradient)
        gradients.append(gradient.add_(peer.outer.error))
    average = average_vectors(peers, gradients, case)
    for peer in peers:
        peer.outer.flat.write_gradients(average)


def exchange_changes(peers: list[SimulatedPeer], case: Case) -> None:
    """Averages the changes of all peers, and applies the result to each."""
    update = average_vectors(peers, [peer.outer.change() for peer in peers], case)
    for peer in peers:
        peer.outer.step(update, *(case.outer or default_rates(len(peers), case.compression)))


def average_vectors(peers: list[SimulatedPeer], changes: list[torch.Tensor], case: Case) -> torch.Tensor:
    """Returns the average of a vector of each peer as they would receive it; keeps what the rounding leaves out."""
    flat, mailbox, results = peers[0].outer.flat, Mailbox(), [None] * len(peers)
    shards = Shards(flat.num_matrix, flat.num_vector, len(peers), CODECS[case.compression])
    sent = [[shards.encode(change, index) for index in range(len(peers))] for change in changes]

    def run(rank: int) -> None:
        error = peers[rank].owner_error
        if error is None or shards.codec.is_exact:
            error = torch.zeros(sum(each.stop - each.start for each in shards.ranges(rank)))
        weights = [1 / len(peers)] * len(peers)
        group = MemoryGroup(mailbox, rank, len(peers))
        results[rank] = averaging.average(group, shards, sent[rank], weights, error, 600)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(peers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    update = torch.empty(flat.total)
    for index, data in enumerate(results[0].data):
        shards.decode_into(update, data, index)
    decay = SPARSE_ERROR_DECAY if case.compression == "sparse" else 1.0
    for rank, peer in enumerate(peers):
        if not shards.codec.is_exact:
            peer.outer.keep_error(changes[rank], sent[rank], shards, decay)
        peer.owner_error = results[rank].owner_error.mul_(decay)
    return update


@dataclass(frozen=True)
class Work:
    """What all runs have in common.

    Attributes:
        folder: of the text and the trained models.
        steps: of each peer.
        batch_size: sequences of a step of one peer.
        sequence_length: tokens of a sequence.
        learning_rate: at the start of the compared runs, and at the peak before.
        trained_steps: of the model with which all runs begin.
    """

    folder: Path
    steps: int
    batch_size: int
    sequence_length: int
    learning_rate: float
    trained_steps: int

    def model_folder(self, optimizer: str, seed: int) -> Path:
        """Returns where the model lies with which runs begin."""
        return self.folder / f"{optimizer}-{seed}-{self.trained_steps}-{self.sequence_length}-{self.learning_rate:g}"

    def config(self, optimizer: str, seed: int, *flags) -> ElasticConfig:
        """Returns the flags of a run."""
        shape = ["--sequence-length", self.sequence_length, "--learning-rate", self.learning_rate]
        shape += ["--dataset-path", self.folder / "store", "--seed", seed, "--optimizer", optimizer]
        return parse_config(ElasticConfig, [*FLAGS, *map(str, [*shape, *flags])])


def train_start(optimizer: str, seed: int, work: Work) -> None:
    """Trains the model with which runs begin: one global batch of four peers at each step, at a constant rate."""
    folder = work.model_folder(optimizer, seed)
    if folder.exists():
        return
    torch.set_num_threads(1)
    flags = ["--lr-scheduler", "constant_with_warmup", "--warmup-steps", 50]
    config = work.config(optimizer, seed, *flags)
    tokenizer = load_tokenizer(config)
    store = prepare_store(config, tokenizer)
    dataset, _ = make_datasets(config, store, store)
    torch.manual_seed(seed)
    peer = SimulatedPeer(config, load_model(config, len(tokenizer), work.sequence_length))
    batch_size = 4 * work.batch_size
    plan = BatchPlan(len(dataset), batch_size, work.trained_steps, seed + 1000)  # another order than the compared runs
    schedule = learning_rate_schedule(config, work.trained_steps)
    for step in range(work.trained_steps):
        samples = np.arange(step * batch_size, (step + 1) * batch_size)
        peer.train(config, dataset, plan.blocks(samples), schedule(step))
    tokenizer.save_pretrained(folder)
    peer.model.save_pretrained(folder)


def run_case(case: Case, work: Work) -> float:
    """Returns the held-out loss after a run."""
    torch.set_num_threads(1)
    start = work.model_folder(case.optimizer, case.seed)
    steps, batch_size, total = work.steps, work.batch_size, work.steps * case.num_peers
    config = work.config(case.optimizer, case.seed, "--model-name", start, "--warmup-steps", total // 20)
    tokenizer = load_tokenizer(config)
    store = prepare_store(config, tokenizer)
    dataset, held_out = make_datasets(config, store, store)
    model = load_model(config, len(tokenizer), work.sequence_length)
    plan = BatchPlan(len(dataset), batch_size, total, case.seed)
    schedule = learning_rate_schedule(config, total)
    if not case.sync_every:
        peer = SimulatedPeer(config, model)
        for step in range(steps):
            samples = np.arange(step, step + 1)[:, None] * batch_size * case.num_peers
            samples = (samples + np.arange(batch_size * case.num_peers)).ravel()
            peer.train(config, dataset, plan.blocks(samples), schedule(step * case.num_peers))
        return held_out_loss(peer.model, held_out)
    peers = [SimulatedPeer(config, copy.deepcopy(model)) for _ in range(case.num_peers)]
    ledger = Ledger(plan.num_samples(total))
    done = 0
    while not ledger.is_complete:
        count = min(case.sync_every, steps - done)
        parts = [ledger.samples_of(index, len(peers), count, batch_size) for index in range(len(peers))]
        for peer, part in zip(peers, parts, strict=True):
            for step, samples in enumerate(part):
                if case.sync_every == 1:
                    peer.compute_gradient(dataset, plan.blocks(samples))
                else:
                    peer.train(config, dataset, plan.blocks(samples), schedule((done + step) * case.num_peers))
        if case.sync_every == 1:
            average_gradients(peers, case)
            for peer in peers:
                peer.update(config, schedule(done * case.num_peers))
        else:
            exchange_changes(peers, case)
        ledger.commit(to_ranges(np.sort(np.concatenate([samples for part in parts for samples in part]))))
        done += count
    return held_out_loss(peers[0].model, held_out)


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, dataset) -> float:
    """Returns the mean loss over all held-out targets, in nats."""
    model.eval()
    loss, count = 0.0, 0
    for start in range(0, len(dataset), 32):
        batch = read_batch(dataset, list(range(start, min(start + 32, len(dataset)))))
        batch_loss, batch_count, _ = evaluation_sums(model, batch)
        loss, count = loss + batch_loss, count + batch_count
    return loss / count


def print_table(
    found: dict[str, dict[str, float]], optimizer: str, peers: int, args: argparse.Namespace, outer: tuple | None
) -> None:
    """Prints the mean losses over the seeds, and how much they are above those of one global batch; -: not run."""

    def mean(every: int, compression: str) -> float:
        losses = found.get(Case(peers, every, compression, optimizer, 0, outer).name, {}).values()
        return statistics.mean(losses) if losses else 0.0

    def describe(loss: float) -> str:
        return f"{loss:.4f}, {loss / baseline - 1:+.1%}" if loss and baseline else "-"

    baseline = mean(0, "")
    print(f"\n{optimizer}, {peers} peers; one global batch: {baseline:.4f}\n")
    print("| steps of a round |", *(f"{each} |" for each in args.compressions))
    print("| --- " * (1 + len(args.compressions)) + "|")
    for every in filter(None, args.sync_every):
        losses = [mean(0 if every == 1 and each == "no" else every, each) for each in args.compressions]
        print(f"| {every} |", *(f"{describe(loss)} |" for loss in losses))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file with the losses")
    parser.add_argument("--peers", type=int, nargs="*", default=[2, 4])
    parser.add_argument("--sync-every", type=int, nargs="*", default=[0, 1, 10, 20, 50])
    parser.add_argument("--compressions", nargs="*", default=["no", "int8", "int4", "sparse"])
    parser.add_argument("--optimizers", nargs="*", default=["adamw", "muon"])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1000, help="of each peer")
    parser.add_argument("--batch-size", type=int, default=4, help="sequences of a step of one peer")
    parser.add_argument("--sequence-length", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--trained-steps", type=int, default=1000, help="of the model with which all runs begin")
    parser.add_argument(
        "--outer", type=float, nargs=2, help="outer learning rate and momentum; default: the program's"
    )
    args = parser.parse_args()
    outer = tuple(args.outer) if args.outer else None
    cases = [
        Case(peers, every, compression, optimizer, seed, outer)
        for optimizer, peers, every, compression, seed in itertools.product(
            args.optimizers, args.peers, args.sync_every, args.compressions, args.seeds
        )
        if every > 1 or (every == 1 and compression != "no") or (not every and compression == args.compressions[0])
    ]
    found: dict[str, dict[str, float]] = json.loads(args.output.read_text()) if args.output.exists() else {}
    cases = [case for case in cases if str(case.seed) not in found.get(case.name, {})]
    folder = args.output.resolve().parent
    if not (folder / "store").exists():
        prepare_library(folder)
    shape = (args.steps, args.batch_size, args.sequence_length, args.learning_rate, args.trained_steps)
    work = Work(folder, *shape)
    with ProcessPoolExecutor(2) as pool:
        starts = sorted({(case.optimizer, case.seed) for case in cases})
        list(pool.map(train_start, *zip(*starts, strict=True), [work] * len(starts)))
        for case, loss in zip(cases, pool.map(run_case, cases, itertools.repeat(work)), strict=True):
            found.setdefault(case.name, {})[str(case.seed)] = loss
            print(case.name, case.seed, f"{loss:.4f}", flush=True)
            args.output.write_text(json.dumps(found, indent=1))
    for optimizer, peers in itertools.product(args.optimizers, args.peers):
        print_table(found, optimizer, peers, args, outer)


if __name__ == "__main__":
    main()
