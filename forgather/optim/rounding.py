"""Stochastic rounding to bfloat16, the same on any mesh.

A bf16 parameter has 8 bits of precision: rounded to nearest, an update of less than 1/512 of it is lost, every time.
Rounded up with the probability of what would be cut off, it is right on average (Gupta et al., Deep learning with
limited numerical precision, 2015). The random bits of an element are a hash of a key and of its place in the whole
tensor, with no generator between: replicas that hold an element round it alike, on whatever mesh or device.
"""

import hashlib
from math import prod

import torch
from torch import Tensor

from forgather.tensor_boxes import Box

# The factors of lowbias32, in which every bit of a result depends on every bit of what it is made of.
_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B - 2**32
_FRACTION = 0xFFFF  # the bits of a float32 that a bfloat16 does not have


def stochastic_round(values: Tensor, bits: Tensor) -> Tensor:
    """float32 `values` as bfloat16, each rounded away from 0 when its `bits` (int32, 0 to 65535) say so.

    The cut-off part of a value is compared with its bits, so with even bits the mean is the value. What bfloat16 can
    represent stays as it is, zeros and infinities among it.
    """
    return (values.view(torch.int32) + bits).bitwise_and_(~_FRACTION).view(torch.float32).to(torch.bfloat16)


def random_bits(key: int, places: Tensor) -> Tensor:
    """16 random bits for each of `places` (int64), as int32 from 0 to 65535: a hash of `key` and place."""
    # One hash has enough for two neighbours.
    bits = _hash(key, places >> 1)
    return (bits >> ((places & 1) * 16).to(torch.int32)).bitwise_and_(_FRACTION)


def random_bits_of_range(key: int, start: int, count: int, device: torch.device) -> Tensor:
    """`random_bits` of `count` places from `start` on, at a fraction of the cost."""
    pairs = torch.arange(start >> 1, ((start + count - 1) >> 1) + 1, device=device)
    # In memory the low half of a number comes first, on every machine that torch runs on.
    bits = _hash(key, pairs).view(torch.int16)[start & 1 : (start & 1) + count]
    return bits.to(torch.int32).bitwise_and_(_FRACTION)


def _hash(key: int, numbers: Tensor) -> Tensor:
    """Ettinger's lowbias32 of the low 32 bits of each number, with 62 bits of `key` mixed in at two places."""
    bits = numbers.to(torch.int32).bitwise_xor_(key & 0x7FFFFFFF)
    _fold(bits, 16)
    bits.mul_(_FIRST).add_((key >> 31) & 0x7FFFFFFF)
    _fold(bits, 15)
    bits.mul_(_SECOND)
    _fold(bits, 16)
    return bits


def _fold(bits: Tensor, shift: int) -> None:
    # `>>` drags the sign along; a hash wants zeros.
    bits.bitwise_xor_((bits >> shift).bitwise_and_((1 << (32 - shift)) - 1))


class Rounding:
    """Writes float32 values of one tensor at one step to where they belong.

    `name` and `step` make the key, `box` says where the local part stands in a whole of `shape`. Without a `seed`
    values are rounded to nearest, as they always are in float32 and float16.
    """

    def __init__(self, seed: int | None, name: str, step: int, box: Box, shape: torch.Size) -> None:
        self.seed = seed
        self.key = int.from_bytes(hashlib.blake2b(f"{seed}\0{name}\0{step}".encode(), digest_size=8).digest(), "big")
        self.box = box
        self.shape = shape

    def write(self, target: Tensor, values: Tensor, start: int) -> None:
        """Copy `values` to `target`, which is flat and begins at element `start` of the local part."""
        if target.dtype != torch.bfloat16 or self.seed is None:
            target.copy_(values)
        else:
            target.copy_(stochastic_round(values, self._bits(start, target.numel(), target.device)))

    def _bits(self, start: int, count: int, device: torch.device) -> Tensor:
        """The random bits of `count` elements of the local part, row-major, by their places in the whole."""
        offsets, sizes = self.box
        if tuple(sizes[1:]) == tuple(self.shape[1:]):  # whole rows: they are neighbours in the whole too
            first = start + (offsets[0] * prod(sizes[1:]) if offsets else 0)
            return random_bits_of_range(self.key, first, count, device)
        rest = torch.arange(start, start + count, device=device)
        places = torch.zeros_like(rest)
        stride = 1
        for offset, size, length in reversed(list(zip(offsets, sizes, self.shape, strict=True))):
            places += (rest % size + offset) * stride
            rest //= size
            stride *= length
        return random_bits(self.key, places)
