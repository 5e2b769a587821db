"""The state that all peers share: weights, outer momentum, and which samples are committed."""

import itertools
import math
from dataclasses import dataclass

import torch

from forge_lib.elastic.compression import CODECS
from forge_lib.elastic.flat import Shards
from forge_lib.elastic.ledger import Ledger
from forge_lib.elastic.outer import OuterOptimizer

MAX_SHARDS = 1024  # of an update: one for each peer


@dataclass(frozen=True)
class Commit:
    """A committed round.

    Attributes:
        round: the round that it ends, from 0.
        compression, num_shards: how the update was sent.
        learning_rate, momentum: of the outer optimizer.
        samples: ranges [start, stop) of the samples that it commits.
        num_targets: that were predicted.
        contributors: identifiers of the peers whose changes are in it.
    """

    round: int
    compression: str
    num_shards: int
    learning_rate: float
    momentum: float
    samples: list[list[int]]
    num_targets: int
    contributors: list[str]

    @classmethod
    def from_json(cls, content: dict) -> "Commit":
        """Returns the commit whose fields these are; ValueError if they cannot be."""
        commit = cls(**content)
        numbers = [commit.round, commit.num_shards, commit.num_targets, *itertools.chain(*commit.samples)]
        rates = [commit.learning_rate, commit.momentum]
        is_valid = commit.compression in CODECS and 1 <= commit.num_shards <= MAX_SHARDS
        is_valid &= isinstance(commit.contributors, list)
        if not is_valid or not all(isinstance(each, int) for each in numbers) or not all(map(math.isfinite, rates)):
            raise ValueError("a field of the commit is not valid")
        return commit


class SharedState:
    """Weights, outer momentum and ledger after a number of rounds.

    Args:
        outer: the outer optimizer.
        ledger: the samples of the run.

    Attributes:
        inner_optimizers: with --sync-every 1, the loop's optimizers, whose state the peers share too.
        round: rounds that it contains.
        num_targets: that were predicted in them.
        num_contributors: peers whose changes are in the last one.
        hash: equal on two peers if their states are.
    """

    def __init__(self, outer: OuterOptimizer, ledger: Ledger):
        self.outer, self.ledger, self.round, self.num_targets, self.num_contributors = outer, ledger, 0, 0, 0
        self.inner_optimizers: list[torch.optim.Optimizer] = []
        self.hash = self._hash()

    def _hash(self) -> str:
        ledger = self.ledger.to_json() | {"num_targets": self.num_targets}
        del ledger["total"]  # a run may be continued with more steps
        return self.outer.state_hash(ledger, self.round)

    def describe(self) -> dict:
        """Returns the part of a checkpoint's state.json that belongs to the shared state."""
        return {
            "round": self.round,
            "num_targets": self.num_targets,
            "num_contributors": self.num_contributors,
            "ledger": self.ledger.to_json(),
            "hash": self.hash,
        }

    @staticmethod
    def check(description: dict) -> None:
        """Raises KeyError, TypeError or ValueError if `load` could not take this over."""
        for name in ("round", "num_targets", "num_contributors"):
            int(description[name])
        str(description["hash"])
        ledger = description["ledger"]
        Ledger(0, ledger["first_open"]).check(ledger["committed"])

    def load(self, description: dict) -> bool:
        """Takes over what `describe` returned, once the vectors are loaded; returns whether the hash is right."""
        self.round, self.num_targets = description["round"], description["num_targets"]
        self.num_contributors = description["num_contributors"]
        saved = description["ledger"]
        self.ledger.first_open, self.ledger.committed = saved["first_open"], saved["committed"]
        self.hash = self._hash()
        return self.hash == description["hash"]

    def shards(self, compression: str, count: int) -> Shards:
        """Returns the division of the weights for an exchange between `count` peers."""
        flat = self.outer.flat
        return Shards(flat.num_matrix, flat.num_vector, count, CODECS[compression])

    def apply(self, commit: Commit, data: list[torch.Tensor]) -> None:
        """Applies a committed round: all peers that do get the same bits.

        Args:
            commit: describes the round.
            data: the bytes of the averaged change, by shard.

        Raises:
            ValueError: a sample was committed before; nothing has changed.
        """
        self.ledger.check(commit.samples)
        shards = self.shards(commit.compression, commit.num_shards)
        update = torch.empty(self.outer.flat.total)
        for index, each in enumerate(data):
            shards.decode_into(update, each, index)
        self.outer.step(update, commit.learning_rate, commit.momentum)
        self.commit(commit)
        self.hash = self._hash()

    def commit(self, commit: Commit) -> None:
        """Records the samples of a committed round. With --sync-every 1, `updated` follows after the update."""
        self.ledger.commit(commit.samples)
        self.num_targets += commit.num_targets
        self.num_contributors = len(commit.contributors)
        self.round = commit.round + 1

    def start_after(self, num_samples: int) -> None:
        """Takes the model as it is, after that many samples: a run that train.py has begun."""
        self.ledger.first_open = num_samples
        self.hash = self._hash()

    def updated(self) -> None:
        """Takes over the model's weights: with --sync-every 1, the loop's optimizers have updated them."""
        self.outer.flat.read(self.outer.weights)
        self.hash = self._hash()
