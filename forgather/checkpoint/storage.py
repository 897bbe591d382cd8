"""Reading raw tensor bytes: any box of a stored tensor, straight into the memory where it stays.

A part of a tensor is its bytes, no archive and no pickle: 0.89 of the speed of plain file reads, where PyTorch's own
storage, which loads a whole part to copy a slice of it, has 0.35 (both with a warm cache).
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from forgather.checkpoint.layout import Chunk, Layout, StoredTensor
from forgather.checkpoint.part import blocks_of
from forgather.errors import CheckpointError
from forgather.tensor_boxes import Box, local_box, local_part


def dtype_of(stored: StoredTensor) -> torch.dtype:
    """Its dtype as torch has it."""
    dtype = getattr(torch, stored.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(f"this version of torch knows no dtype {stored.dtype}", fix="use the one that saved it")
    return dtype


def read_into(folder: Path, layout: Layout, targets: Mapping[str, Tensor]) -> None:
    """Fill each of `targets`, or this rank's part of it, from the stored tensor of its name and shape.

    The target's dtype may be another. No communication, and no memory beside the target's where a part of it is stored
    in one piece and in its dtype. Chunks that are read whole are checked against their digests: CheckpointError, naming
    the file, when one was altered, and when a file cannot be read.
    """
    wanted = [
        _Wanted(name, layout[name], chunk, _overlap(chunk, box), box[0], local)
        for name, target in targets.items()
        for box, local in [(local_box(target), local_part(target))]
        for chunk in layout[name].chunks
        if _overlap(chunk, box) is not None
    ]
    # In the order of the files, so that the disk and its read-ahead go one way.
    wanted.sort(key=lambda part: (part.chunk.file, part.chunk.at))
    file, name = None, ""
    try:
        for part in wanted:
            if part.chunk.file != name or file is None:
                if file is not None:
                    file.close()
                name = part.chunk.file
                file = (folder / name).open("rb", buffering=0)
            part.read(file.fileno(), folder)
    except OSError as error:
        raise CheckpointError(f"cannot read {folder / name}: {error.strerror}") from error
    finally:
        if file is not None:
            file.close()


def read_tensor(folder: Path, layout: Layout, name: str) -> Tensor:
    """The whole tensor called `name`, in memory of its own, each of its chunks checked against its digest.

    CheckpointError, naming the file, when a chunk cannot be read or was altered.
    """
    stored = layout[name]
    whole = torch.empty(stored.shape, dtype=dtype_of(stored))
    read_into(folder, layout, {name: whole})
    return whole


def read_box(
    descriptor: int, folder: Path, name: str, stored: StoredTensor, chunk: Chunk, box: Box, target: Tensor
) -> None:
    """Fill `target`, which has the shape of `box`, from the open file of the `chunk` that the box lies in."""
    _Wanted(name, stored, chunk, box, box[0], target).read(descriptor, folder)


@dataclass(frozen=True)
class _Wanted:
    """A box of the whole tensor that is read from one chunk into one rank's part."""

    name: str
    stored: StoredTensor
    chunk: Chunk
    box: Box | None
    origin: tuple[int, ...]  # where the rank's part begins in the whole
    local: Tensor

    def read(self, descriptor: int, folder: Path) -> None:
        """Read the rows of the chunk that hold the box; straight into the target when they are all that is wanted."""
        assert self.box is not None, "only what overlaps is read"
        offsets, sizes = self.box
        dtype = dtype_of(self.stored)
        target = self.local.detach()[_region(offsets, sizes, self.origin)]
        first, count = (offsets[0] - self.chunk.offsets[0], sizes[0]) if sizes else (0, 1)
        row_bytes = prod(self.chunk.sizes[1:]) * dtype.itemsize
        only_rows = sizes[1:] == self.chunk.sizes[1:]
        direct = only_rows and target.is_contiguous() and target.device.type == "cpu" and target.dtype == dtype
        rows = target if direct else torch.empty((count, *self.chunk.sizes[1:]) if sizes else (), dtype=dtype)
        data = raw_bytes(rows)
        digest = xxhash.xxh3_64()
        at = self.chunk.at + first * row_bytes
        for block in blocks_of(data):
            if read_all(descriptor, block, at) != block.nbytes:
                raise CheckpointError(f"{folder / self.chunk.file} ends before the bytes of {self.name}")
            digest.update(block)  # while it is in the cache of the processor
            at += block.nbytes
        if data.nbytes == self.chunk.length and digest.hexdigest() != self.chunk.xxh3:
            raise CheckpointError(f"{folder / self.chunk.file} was altered where {self.name} is stored")
        if not direct:
            inner = _region(offsets, sizes, (offsets[0], *self.chunk.offsets[1:])) if sizes else ()
            target.copy_(rows[inner])


def _overlap(chunk: Chunk, box: Box) -> Box | None:
    """What two boxes have in common; None where that is nothing."""
    starts = tuple(max(left, right) for left, right in zip(chunk.offsets, box[0], strict=True))
    sizes = tuple(
        min(left + own, right + other) - start
        for left, own, right, other, start in zip(chunk.offsets, chunk.sizes, *box, starts, strict=True)
    )
    return (starts, sizes) if all(size > 0 for size in sizes) else None


def _region(offsets: tuple[int, ...], sizes: tuple[int, ...], origin: tuple[int, ...]) -> tuple[slice, ...]:
    """A box of the whole, as slices of what begins at `origin`."""
    return tuple(slice(at - start, at - start + size) for at, size, start in zip(offsets, sizes, origin, strict=True))


def raw_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, as bytes, not copied."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]  # an array is a buffer


def read_all(descriptor: int, data: memoryview, at: int) -> int:
    """Fill `data` from position `at`; return how many bytes there were."""
    done = 0
    while done < data.nbytes and (count := os.preadv(descriptor, [data[done:]], at + done)):
        done += count
    return done
