"""Slices of an answer into the memory where they stay, with the digest of what they lead to."""

from collections.abc import Sequence

import numpy as np
import torch
import xxhash
from torch import Tensor

from forgather.checkpoint.storage import raw_bytes
from forgather.diloco.client import Answer
from forgather.diloco.encoding import BLOCK, Codec
from forgather.diloco.messages import Slice
from forgather.diloco.pieces import PIECE
from forgather.diloco.slices import covering_ranges, runs


def read_values(answer: Answer, out: Tensor) -> bytes:
    """Fill `out` with the elements of a slice; returns their digest."""
    digest = xxhash.xxh3_64()
    for piece in torch.split(out, PIECE):
        answer.read_into(raw_bytes(piece))
        digest.update(raw_bytes(piece))
    return digest.digest()


def read_change(
    answer: Answer,
    decoder: Codec,
    shape: Sequence[int],
    part: Slice,
    anchor: Tensor,
    out: Tensor,
    scratch: list[Tensor],
) -> bytes:
    """Fill `out` with the elements of a slice, which are `anchor` and its change; returns their digest.

    The change comes as the encoded ranges of the parameter that cover the slice. `scratch`, empty at first, has the
    memory that the slices of an answer are read into, one after the other.
    """
    digest = xxhash.xxh3_64()
    starts, length = runs(shape, part)
    done = there = 0  # what is decoded, and what is added and seen by the digest while it is near the processor
    for start, stop in covering_ranges(shape, part, BLOCK):
        num_bytes = decoder.encoded_bytes(stop - start)
        if not scratch or scratch[0].numel() < num_bytes:
            scratch[:] = [torch.empty(num_bytes, dtype=torch.uint8)]
        encoded = scratch[0][:num_bytes]
        answer.read_into(raw_bytes(encoded))
        for run in starts[np.searchsorted(starts, start) : np.searchsorted(starts, stop)].tolist():
            for first in range(0, length, PIECE):
                piece = out[done : done + min(PIECE, length - first)]
                decoder.decode(encoded, stop - start, piece, run + first - start)
                done += piece.numel()
                if done - there >= PIECE or done == out.numel():
                    digest.update(raw_bytes(out[there:done].add_(anchor[there:done])))
                    there = done
    return digest.digest()
