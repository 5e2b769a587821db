"""How the change of the weights is rounded before it is sent: the codecs of `--outer-compression`.

Each codec turns a vector of fp32 numbers into bytes and back. The bytes depend on nothing but the numbers, and so does
what `decode` returns: every peer decodes the same bytes to the same bits, because it only multiplies. Everything runs
on the CPU, without Triton, for models that train on a GPU too.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

BLOCK = 128  # numbers that share a scale, in int8 and int4
CHUNK = 4096  # numbers of which sparse keeps the TOP largest: SparseLoCo, arXiv 2508.15706
TOP = 64
PIECE = 8192  # blocks that are encoded at a time: what is computed between them stays in the processor's cache


class Fp32:
    """Sends the numbers as they are."""

    is_exact = True

    @staticmethod
    def num_bytes(count: int) -> int:
        """Returns how many bytes `count` numbers take."""
        return 4 * count

    @staticmethod
    def encode(values: torch.Tensor) -> torch.Tensor:
        """Returns [num_bytes] uint8 for [n] fp32 values."""
        return values.contiguous().view(torch.uint8).clone()

    @staticmethod
    def decode(data: torch.Tensor, count: int) -> torch.Tensor:
        """Returns the [count] fp32 values of [num_bytes] uint8."""
        return data.clone().view(torch.float32)


@dataclass(frozen=True)
class Half:
    """Sends fp16 or bf16. A value that fp16 cannot hold is clamped, and error feedback sends the rest later."""

    dtype: torch.dtype
    is_exact = False

    @staticmethod
    def num_bytes(count: int) -> int:
        """Returns how many bytes `count` numbers take."""
        return 2 * count

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        """Returns [num_bytes] uint8 for [n] fp32 values."""
        largest = torch.finfo(self.dtype).max
        return values.clamp(-largest, largest).to(self.dtype).view(torch.uint8)

    def decode(self, data: torch.Tensor, count: int) -> torch.Tensor:
        """Returns the [count] fp32 values of [num_bytes] uint8."""
        return data.clone().view(self.dtype).to(torch.float32)


@dataclass(frozen=True)
class Integers:
    """Rounds to integers of 8 or 4 bits; each block of 128 numbers has its own scale, from the largest one, in bf16.

    The bytes are first the scales, then the integers; two integers of 4 bits share a byte.
    """

    bits: int
    is_exact = False

    @property
    def largest(self) -> int:
        """The largest integer: 127 or 7."""
        return (1 << self.bits - 1) - 1

    def num_bytes(self, count: int) -> int:
        """Returns how many bytes `count` numbers take."""
        blocks = -(-count // BLOCK)
        return 2 * blocks + blocks * BLOCK * self.bits // 8

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        """Returns [num_bytes] uint8 for [n] fp32 values."""
        data = torch.empty(self.num_bytes(len(values)), dtype=torch.uint8)
        scales, packed = self._parts(data, len(values))
        for rows in _pieces(len(scales)):
            blocks = _padded(values[rows.start * BLOCK : rows.stop * BLOCK], BLOCK)
            scales[rows] = _scales(blocks, self.largest)
            integers = _divide(blocks, scales[rows]).round_().clamp_(-self.largest, self.largest).to(torch.int8)
            if self.bits == 4:
                pairs = integers.add_(8).view(torch.int16)  # little endian: the first one is in the lower byte
                packed[rows] = (pairs & 0x0F | pairs >> 4).to(torch.uint8)
            else:
                packed[rows] = integers.view(torch.uint8)
        return data

    def decode(self, data: torch.Tensor, count: int) -> torch.Tensor:
        """Returns the [count] fp32 values of [num_bytes] uint8."""
        scales, packed = self._parts(data.clone() if data.storage_offset() % 2 else data, count)
        values = torch.empty(len(scales), BLOCK)
        for rows in _pieces(len(scales)):
            integers = packed[rows].view(torch.int8)
            if self.bits == 4:
                pairs = packed[rows].to(torch.int16)
                integers = (pairs & 0x0F | (pairs & 0xF0) << 4).view(torch.int8).sub_(8)
            torch.mul(integers, scales[rows].to(torch.float32)[:, None], out=values[rows])
        return values.view(-1)[:count]

    def _parts(self, data: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the scales [blocks] bf16 and the packed integers [blocks, bytes] of a message, without a copy."""
        blocks = -(-count // BLOCK)
        return data[: 2 * blocks].view(torch.bfloat16), data[2 * blocks :].view(blocks, BLOCK * self.bits // 8)


class Sparse:
    """Sends the 64 largest of each 4,096 numbers, as integers of 8 bits with one scale and their places."""

    is_exact = False

    @staticmethod
    def num_bytes(count: int) -> int:
        """Returns how many bytes `count` numbers take."""
        return -(-count // CHUNK) * (2 + 2 * TOP + TOP)

    @staticmethod
    def encode(values: torch.Tensor) -> torch.Tensor:
        """Returns [num_bytes] uint8 for [n] fp32 values."""
        chunks = _padded(values, CHUNK)
        places = chunks.abs().topk(TOP, dim=1, sorted=False).indices.sort(dim=1).values
        largest = chunks.gather(1, places)
        scales = _scales(largest, 127)
        integers = _divide(largest, scales).round_().clamp_(-127, 127).to(torch.int8)
        parts = (scales, places.to(torch.int16), integers)
        return torch.cat([part.reshape(-1).view(torch.uint8) for part in parts])

    @staticmethod
    def decode(data: torch.Tensor, count: int) -> torch.Tensor:
        """Returns the [count] fp32 values of [num_bytes] uint8."""
        chunks = -(-count // CHUNK)
        scales, places, integers = data.split([2 * chunks, 2 * TOP * chunks, TOP * chunks])
        largest = _multiply(integers.view(torch.int8).reshape(chunks, TOP), scales.clone().view(torch.bfloat16))
        places = places.clone().view(torch.int16).reshape(chunks, TOP).long().clamp_(0, CHUNK - 1)
        values = torch.zeros(chunks, CHUNK).scatter_(1, places, largest.view(chunks, TOP))
        return values.view(-1)[:count]


Codec = Fp32 | Half | Integers | Sparse
CODECS: dict[str, Codec] = {
    "no": Fp32(),
    "fp16": Half(torch.float16),
    "int8": Integers(8),
    "int4": Integers(4),
    "sparse": Sparse(),
}


def _padded(values: torch.Tensor, size: int) -> torch.Tensor:
    """Returns [n] values as [ceil(n / size), size], filled up with zeros."""
    return torch.nn.functional.pad(values, (0, -len(values) % size)).view(-(-len(values) // size), size)


def _pieces(count: int) -> Iterator[slice]:
    """Yields ranges of up to PIECE of `count` rows."""
    for start in range(0, count, PIECE):
        yield slice(start, min(start + PIECE, count))


def _scales(blocks: torch.Tensor, largest: int) -> torch.Tensor:
    """Returns the bf16 scale of each row, so that its largest number becomes the integer `largest`."""
    low, high = torch.aminmax(blocks, dim=1)
    return (torch.maximum(-low, high) / largest).to(torch.bfloat16)


def _divide(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Returns the rows divided by their scales; a row of zeros stays one."""
    factors = scales.to(torch.float32).reciprocal().nan_to_num_(posinf=0.0)
    return blocks * factors[:, None]


def _multiply(integers: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return (integers.to(torch.float32) * scales.to(torch.float32)[:, None]).view(-1)
