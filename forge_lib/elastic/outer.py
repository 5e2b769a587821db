"""The outer optimizer: applies the averaged change of a round to the weights that all peers share.

DiLoCo (arXiv 2311.08105): the change of a round, d = weights before - weights after, is averaged over the peers and
taken as the gradient of SGD with Nesterov momentum. What rounding leaves out is added to the next round's change
(error feedback). All peers compute this on the CPU, in fp32 and with separate multiplications and additions, so that
different processors get the same bits.
"""

import json
from typing import Any

import torch
import xxhash

from forge_lib.checkpoints.restore import CheckpointedOptimizer
from forge_lib.elastic.flat import FlatParameters, Shards

SPARSE_ERROR_DECAY = 0.95  # of the error feedback of sparse: SparseLoCo, arXiv 2508.15706


class OuterOptimizer(CheckpointedOptimizer):
    """The weights that all peers share, the outer momentum, and this peer's error feedback; vectors [total] fp32.

    Args:
        flat: the model's parameters.

    Attributes:
        weights: equal on all peers that have the state of the same round.
        momentum: equal too.
        error: of this peer alone.
    """

    def __init__(self, flat: FlatParameters):
        super().__init__(flat.parameters, {})
        self.flat = flat
        self.weights, self.momentum, self.error = (torch.zeros(flat.total) for _ in range(3))
        views = (flat.parameters, flat.views(self.momentum), flat.views(self.error))
        for parameter, momentum, error in zip(*views, strict=True):
            self.state[parameter] = {"momentum": momentum, "error": error}
        flat.read(self.weights)

    def state_shapes(self, shape: tuple) -> dict[str, tuple]:
        """Returns the shapes of the state of a parameter, for `restore.load`."""
        return {"momentum": shape, "error": shape}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copies a checkpoint's tensors into the vectors; the model's parameters are already loaded."""
        for index, parameter in enumerate(p for group in self.param_groups for p in group["params"]):
            for key, tensor in state_dict["state"].get(index, {}).items():  # none in a checkpoint of train.py
                self.state[parameter][key].copy_(tensor)
        self.flat.read(self.weights)

    @torch.no_grad()
    def change(self) -> torch.Tensor:
        """Returns how far this peer has moved in the round, plus its error feedback: what it would like to send."""
        change = torch.empty_like(self.weights)
        self.flat.read(change)
        return torch.sub(self.weights, change, out=change).add_(self.error)

    @torch.no_grad()
    def step(self, update: torch.Tensor, learning_rate: float, momentum: float) -> None:  # type: ignore[override]
        """Applies the averaged change, and writes the new weights into the model.

        Like every optimizer's `step` it first waits until a background save has copied the tensors.

        Args:
            update: [total] fp32, equal on all peers.
            learning_rate, momentum: of the outer optimizer.
        """
        self.momentum.mul_(momentum).add_(update)
        self.weights.sub_(self.momentum.mul(momentum).add_(update).mul_(learning_rate))
        self.flat.write(self.weights)

    @torch.no_grad()
    def keep_error(self, change: torch.Tensor, sent: list[torch.Tensor], shards: Shards, decay: float) -> None:
        """Keeps what the rounding of a committed change has left out.

        Args:
            change: from `change`; it is overwritten.
            sent: its bytes, by shard.
            shards: the division into shards.
            decay: factor of the error.
        """
        for index, data in enumerate(sent):
            for place, numbers in zip(shards.ranges(index), shards.decode(data, index), strict=True):
                change[place] -= numbers
        torch.mul(change, decay, out=self.error)

    def restore(self) -> None:
        """Drops what this peer has computed in the round: the model gets the shared weights again."""
        self.flat.write(self.weights)

    def state_hash(self, ledger: dict, round: int) -> str:
        """Returns the hash of the state that all peers share: 32 hexadecimal digits."""
        digest = xxhash.xxh3_128(json.dumps([ledger, round], sort_keys=True).encode())
        digest.update(self.weights.numpy())
        digest.update(self.momentum.numpy())
        return digest.hexdigest()

    def weights_hash(self) -> str:
        """Returns the hash of the shared weights alone: 32 hexadecimal digits."""
        return xxhash.xxh3_128(self.weights.numpy()).hexdigest()


def default_rates(num_peers: int, compression: str) -> tuple[float, float]:
    """Returns the outer learning rate and momentum for a number of peers.

    One peer alone has nothing to average, and sparse changes must not meet momentum (SparseLoCo). The rates of DiLoCo,
    0.7 / 0.9, are for a few hundred steps per round; docs/slow-links.md has the measurements with 20.
    """
    if num_peers == 1 or compression == "sparse":
        return 1.0, 0.0
    return 0.7, 0.6
