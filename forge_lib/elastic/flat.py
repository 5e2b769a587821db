"""The trained parameters of a model as one vector of fp32 numbers on the CPU, and how it is divided into shards."""

from dataclasses import dataclass

import torch
from torch import nn

from forge_lib.checkpoints.format import trainable
from forge_lib.elastic.compression import CHUNK, Codec, Half

VECTORS = Half(torch.bfloat16)  # norms and biases are few, and rounding them to 4 bits costs more than it saves


class FlatParameters:
    """The trainable parameters in one order that all peers share: first the matrices, then norms and biases.

    Args:
        model: unwrapped.

    Attributes:
        num_matrix, num_vector: numbers in matrices (two dimensions and more), and in the rest.
        total: both together.
    """

    def __init__(self, model: nn.Module):
        named = sorted(trainable(model).items())
        self.parameters = [p for _, p in named if p.ndim >= 2] + [p for _, p in named if p.ndim < 2]
        self.names = [name for name, p in named if p.ndim >= 2] + [name for name, p in named if p.ndim < 2]
        self.num_matrix = sum(p.numel() for p in self.parameters if p.ndim >= 2)
        self.num_vector = sum(p.numel() for p in self.parameters if p.ndim < 2)
        self.total = self.num_matrix + self.num_vector

    @torch.no_grad()
    def read(self, into: torch.Tensor) -> None:
        """Copies the parameters into a vector [total] fp32."""
        for parameter, part in zip(self.parameters, self.views(into), strict=True):
            part.copy_(parameter)

    @torch.no_grad()
    def read_gradients(self, into: torch.Tensor) -> None:
        """Copies the gradients into a vector [total] fp32; a parameter without one counts as 0."""
        for parameter, part in zip(self.parameters, self.views(into), strict=True):
            part.zero_() if parameter.grad is None else part.copy_(parameter.grad)

    @torch.no_grad()
    def write(self, values: torch.Tensor) -> None:
        """Copies a vector [total] fp32 into the parameters."""
        for parameter, part in zip(self.parameters, self.views(values), strict=True):
            parameter.copy_(part)

    @torch.no_grad()
    def write_gradients(self, values: torch.Tensor) -> None:
        """Copies a vector [total] fp32 into the gradients of the parameters that have one."""
        for parameter, part in zip(self.parameters, self.views(values), strict=True):
            if parameter.grad is not None:
                parameter.grad.copy_(part)

    def views(self, vector: torch.Tensor) -> list[torch.Tensor]:
        """Returns the part of a vector [total] that belongs to each parameter, in its shape, without a copy."""
        parts = vector.split([p.numel() for p in self.parameters])
        return [part.view(p.shape) for part, p in zip(parts, self.parameters, strict=True)]


@dataclass(frozen=True)
class Shards:
    """Divides a vector among the peers of an exchange: each owns a part of the matrices and a part of the rest.

    Attributes:
        num_matrix, num_vector: of FlatParameters.
        count: number of shards.
        codec: of the matrices; the rest is sent in bf16 unless the codec is exact.
    """

    num_matrix: int
    num_vector: int
    count: int
    codec: Codec

    @property
    def vector_codec(self) -> Codec:
        """The codec of norms and biases."""
        return self.codec if self.codec.is_exact else VECTORS

    def ranges(self, index: int) -> tuple[slice, slice]:
        """Returns the places of shard `index`: a part of the matrices, and a part of the rest."""
        matrix = [min(self.num_matrix, edge) for edge in _edges(self.num_matrix, self.count, CHUNK)]
        vector = [self.num_matrix + min(self.num_vector, edge) for edge in _edges(self.num_vector, self.count, 1)]
        return slice(matrix[index], matrix[index + 1]), slice(vector[index], vector[index + 1])

    def num_bytes(self, index: int) -> int:
        """Returns how many bytes shard `index` takes."""
        matrix, vector = self.ranges(index)
        return self.codec.num_bytes(_length(matrix)) + self.vector_codec.num_bytes(_length(vector))

    def encode(self, values: torch.Tensor, index: int) -> torch.Tensor:
        """Returns the bytes of shard `index` of a vector [total] fp32, as uint8."""
        return self.encode_parts(*(values[place] for place in self.ranges(index)))

    def encode_parts(self, matrix: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
        """Returns the bytes of a shard from the numbers of its matrix part and those of the rest."""
        return torch.cat([self.codec.encode(matrix), self.vector_codec.encode(vector)])

    def decode(self, data: torch.Tensor, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the numbers of shard `index` from its bytes: those of its matrix part, and those of the rest."""
        matrix, vector = map(_length, self.ranges(index))
        first = self.codec.num_bytes(matrix)
        return self.codec.decode(data[:first], matrix), self.vector_codec.decode(data[first:], vector)

    def decode_into(self, values: torch.Tensor, data: torch.Tensor, index: int) -> None:
        """Writes the numbers of shard `index` to their places in a vector [total] fp32."""
        for place, part in zip(self.ranges(index), self.decode(data, index), strict=True):
            values[place] = part


def _edges(total: int, count: int, unit: int) -> list[int]:
    """Returns where each of `count` parts of `total` numbers begins, in whole units, and where the last one ends."""
    units = -(-total // unit)
    return [units * index // count * unit for index in range(count + 1)]


def _length(place: slice) -> int:
    return place.stop - place.start
