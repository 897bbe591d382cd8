"""Reading raw tensor bytes: any box of a stored tensor, straight into the memory where it stays.

A part of a tensor is its bytes, no archive and no pickle: 0.89 of the speed of plain file reads, where PyTorch's own
storage, which loads a whole part to copy a slice of it, has 0.35 (both with a warm cache).
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from forgather.checkpoint.layout import Chunk, Layout, StoredTensor
from forgather.checkpoint.manifest import require_damage
from forgather.checkpoint.part import blocks_of
from forgather.errors import CheckpointError
from forgather.tensor_boxes import Box, local_boxes, local_part

# Read and hashed in pieces of this size: small enough to stay near the processor between the two, large enough that the
# calls cost nothing. Half of it was as good here, twice of it 4 % slower, 1 MiB 11 %.
BLOCK = 256 << 10


def dtype_of(stored: StoredTensor) -> torch.dtype:
    """Its dtype as torch has it."""
    dtype = getattr(torch, stored.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(f"this version of torch knows no dtype {stored.dtype}", fix="use the one that saved it")
    return dtype


class DamagedFileError(CheckpointError):
    """A file's bytes are not those that were saved; `line` says so and names the file alone, for lists of damage."""

    def __init__(self, path: Path, what: str) -> None:
        super().__init__(f"{path} {what}", fix="bring that file back, or use another checkpoint")
        self.line = f"{path.name} {what}"


def read_into(folder: Path, layout: Layout, targets: Mapping[str, Tensor]) -> None:
    """Fill each of `targets`, or this rank's part of it, from the stored tensor of its name and shape.

    The target's dtype may be another. No communication, and no memory beside the target's where a part of it is stored
    in one piece and in its dtype. Chunks that are read whole are checked against their digests: DamagedFileError when
    one was altered, and when a file cannot be read.
    """
    perform(folder, reads_of(layout, targets))


def read_tensor(folder: Path, layout: Layout, name: str) -> Tensor:
    """The whole tensor called `name`, in memory of its own, each of its chunks checked against its digest.

    DamagedFileError when a chunk cannot be read or was altered.
    """
    stored = layout[name]
    whole = torch.empty(stored.shape, dtype=dtype_of(stored))
    read_into(folder, layout, {name: whole})
    return whole


def read_box(
    descriptor: int, folder: Path, name: str, stored: StoredTensor, chunk: Chunk, box: Box, target: Tensor
) -> None:
    """Fill `target`, which has the shape of `box`, from the open file of the `chunk` that the box lies in."""
    place = _place(chunk, stored, box, box[0], target)
    Read(name, chunk, stored, box, box[0], target, place).perform(descriptor, folder)


@dataclass(frozen=True)
class Check:
    """A chunk that is read for its digest alone."""

    name: str
    chunk: Chunk

    def perform(self, descriptor: int, folder: Path) -> None:
        """DamagedFileError unless its bytes are those that were saved."""
        digest = xxhash.xxh3_64()
        memory = memoryview(bytearray(min(BLOCK, self.chunk.length)))
        for start in range(0, self.chunk.length, BLOCK):
            _read_and_hash(descriptor, folder, self, memory[: self.chunk.length - start], start, digest)
        _compare(digest.hexdigest(), folder, self)


@dataclass(frozen=True)
class Read:
    """A box of the tensor `name` that is read from one chunk into one rank's part of it."""

    name: str
    chunk: Chunk
    stored: StoredTensor
    box: Box
    origin: tuple[int, ...]  # where the rank's part begins in the whole
    local: Tensor
    # The memory where it stays, when it can be read straight into that. Looked up for all reads before the first: what
    # a few calls of torch cost between two reads of megabytes, when nothing of them is in a cache, is ten times that.
    place: memoryview | None = None

    @property
    def is_whole(self) -> bool:
        """Whether all of the chunk is read, if only to use a part of it, so that its digest is checked."""
        return not self.box[1] or self.box[1][0] == self.chunk.sizes[0]

    def perform(self, descriptor: int, folder: Path) -> None:
        """Read the rows of the chunk that hold the box; straight into the target when they are all that is wanted."""
        offsets, sizes = self.box
        start = 0
        place, rows = self.place, None
        if place is None:
            rows = torch.empty((*sizes[:1], *self.chunk.sizes[1:]), dtype=dtype_of(self.stored))
            place = raw_bytes(rows)
        if not self.is_whole:
            start = (offsets[0] - self.chunk.offsets[0]) * (self.chunk.length // self.chunk.sizes[0])
        digest = xxhash.xxh3_64()
        _read_and_hash(descriptor, folder, self, place, start, digest)
        if self.is_whole:
            _compare(digest.hexdigest(), folder, self)
        if rows is not None:
            inner = _region(offsets, sizes, (offsets[0], *self.chunk.offsets[1:])) if sizes else ()
            _part_in(self.local, self.box, self.origin).copy_(rows[inner])


def reads_of(layout: Layout, targets: Mapping[str, Tensor]) -> list[Read]:
    """What is to be read so that each of `targets`, or this rank's part of it, has the values stored by its name."""
    reads = []
    for (name, target), box in zip(targets.items(), local_boxes(targets.values()), strict=True):
        stored, local = layout[name], local_part(target)
        for chunk in stored.chunks:
            if (overlap := _overlap(chunk, box)) is not None:
                place = _place(chunk, stored, overlap, box[0], local)
                reads.append(Read(name, chunk, stored, overlap, box[0], local, place))
    return reads


def _part_in(local: Tensor, box: Box, origin: tuple[int, ...]) -> Tensor:
    """The `box` of the whole, in a rank's part of it that begins at `origin`."""
    part = local.detach()
    return part if box[1] == part.shape else part[_region(*box, origin)]


def _place(chunk: Chunk, stored: StoredTensor, box: Box, origin: tuple[int, ...], local: Tensor) -> memoryview | None:
    """The memory of the `box`, when all that is to be read of the chunk belongs there as it is."""
    if box[1][1:] != chunk.sizes[1:] or local.device.type != "cpu" or local.dtype != dtype_of(stored):
        return None
    part = _part_in(local, box, origin)
    return raw_bytes(part) if part.is_contiguous() else None


def perform(folder: Path, reads: Iterable[Read | Check]) -> None:
    """Do all of `reads` in the files of `folder`. DamagedFileError at the first that finds other bytes, or none.

    UnreadableError when the system does not let a file be read.
    """
    # In the order of the files, so that the disk and its read-ahead go one way.
    in_order = sorted(reads, key=lambda read: (read.chunk.file, read.chunk.at))
    for name, of_file in groupby(in_order, key=lambda read: read.chunk.file):
        try:
            with (folder / name).open("rb", buffering=0) as file:
                for read in of_file:
                    read.perform(file.fileno(), folder)
        except OSError as error:
            require_damage(folder / name, error)
            raise DamagedFileError(folder / name, f"cannot be read: {error.strerror}") from error


def _read_and_hash(
    descriptor: int, folder: Path, read: Read | Check, data: memoryview, start: int, digest: xxhash.xxh3_64
) -> None:
    """Fill `data` from byte `start` of the chunk on, and let `digest` see it while it is near the processor."""
    at = read.chunk.at + start
    for block in blocks_of(data, BLOCK):
        if read_all(descriptor, block, at) != block.nbytes:
            raise DamagedFileError(folder / read.chunk.file, f"ends before the bytes of {read.name}")
        digest.update(block)
        at += block.nbytes


def _compare(digest: str, folder: Path, read: Read | Check) -> None:
    if digest != read.chunk.xxh3:
        raise DamagedFileError(
            folder / read.chunk.file,
            f"was altered where {read.name} is stored (xxh3 {digest}, saved {read.chunk.xxh3})",
        )


def _overlap(chunk: Chunk, box: Box) -> Box | None:
    """What two boxes have in common; None where that is nothing."""
    if (chunk.offsets, chunk.sizes) == box:  # on the mesh that saved, each of them
        return box
    starts: list[int] = []
    sizes: list[int] = []
    for left, own, right, other in zip(chunk.offsets, chunk.sizes, *box, strict=True):
        start = max(left, right)
        size = min(left + own, right + other) - start
        if size <= 0:
            return None
        starts.append(start)
        sizes.append(size)
    return tuple(starts), tuple(sizes)


def _region(offsets: tuple[int, ...], sizes: tuple[int, ...], origin: tuple[int, ...]) -> tuple[slice, ...]:
    """A box of the whole, as slices of what begins at `origin`."""
    return tuple(slice(at - start, at - start + size) for at, size, start in zip(offsets, sizes, origin, strict=True))


def raw_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, as bytes, not copied."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]  # an array is a buffer


def read_all(descriptor: int, data: memoryview, at: int) -> int:
    """Fill `data` from position `at`; return how many bytes there were."""
    done = count = os.preadv(descriptor, [data], at)
    while count and done < data.nbytes:
        count = os.preadv(descriptor, [data[done:]], at + done)
        done += count
    return done
