"""Reading raw tensor bytes: any box of a stored tensor, straight into the memory where it stays.

A part of a tensor is its bytes, no archive and no pickle: 0.89 of the speed of plain file reads, where PyTorch's own
storage, which loads a whole part to copy a slice of it, has 0.35 (both with a warm cache).
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby, product
from math import prod
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
# What does not belong where it stays as it is stored (a cut across the rows, another dtype, memory of a device) goes
# through memory of at most this size: a whole piece there would be the model's largest matrix beside each rank's shard.
STAGED = 8 << 20


class Staging:
    """Memory that tensors go through in pieces; taken when it is first needed, and used for all."""

    def __init__(self) -> None:
        self._memory: Tensor | None = None

    def room(self, num_bytes: int, *, for_cuda: bool) -> Tensor:
        """So many bytes, at most `STAGED`. From pinned memory a device copies at its full speed."""
        memory = self._memory
        if memory is None or memory.nbytes < num_bytes or (for_cuda and not memory.is_pinned()):
            # All of it at once, unless a small tensor is all there is.
            size = num_bytes if memory is None else STAGED
            self._memory = memory = torch.empty(size, dtype=torch.uint8, pin_memory=for_cuda)
        return memory[:num_bytes]


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

    The target's dtype may be another. No communication, and no memory beside the target's but `STAGED` bytes. Chunks
    that are read whole are checked against their digests: DamagedFileError when one was altered, and when a file cannot
    be read.
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
    Read(name, chunk, stored, box, box[0], target, place).perform(descriptor, folder, Staging())


@dataclass(frozen=True)
class Check:
    """A chunk that is read for its digest alone."""

    name: str
    chunk: Chunk

    def perform(self, descriptor: int, folder: Path, _staging: Staging) -> None:
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

    def perform(self, descriptor: int, folder: Path, staging: Staging) -> None:
        """Read the rows of the chunk that hold the box; straight into the target when they are all that is wanted."""
        start = 0
        if not self.is_whole:
            start = (self.box[0][0] - self.chunk.offsets[0]) * (self.chunk.length // self.chunk.sizes[0])
        digest = xxhash.xxh3_64()
        if self.place is not None:
            _read_and_hash(descriptor, folder, self, self.place, start, digest)
        else:
            for piece in self._pieces():
                start += self._pass_on(descriptor, folder, piece, start, digest, staging)
        if self.is_whole:
            _compare(digest.hexdigest(), folder, self)

    def _pieces(self) -> Iterator[Box]:
        """The rows that hold the box, in boxes of at most `STAGED` bytes that are stored one after the other."""
        offsets = (*self.box[0][:1], *self.chunk.offsets[1:])
        sizes = (*self.box[1][:1], *self.chunk.sizes[1:])
        most = STAGED // dtype_of(self.stored).itemsize
        # Of dimensions before `dim` a piece has one index, of `dim` as many as there is room for, of later ones all.
        dim = next((dim for dim in range(len(sizes)) if prod(sizes[dim + 1 :]) <= most), None)
        if dim is None:
            yield offsets, sizes  # a single number
            return
        length = most // prod(sizes[dim + 1 :])
        for outer in product(*map(range, sizes[:dim])):
            before = tuple(at + index for at, index in zip(offsets, outer, strict=False))
            for start in range(0, sizes[dim], length):
                yield (
                    (*before, offsets[dim] + start, *offsets[dim + 1 :]),
                    (*(1,) * dim, min(length, sizes[dim] - start), *sizes[dim + 1 :]),
                )

    def _pass_on(
        self, descriptor: int, folder: Path, piece: Box, start: int, digest: xxhash.xxh3_64, staging: Staging
    ) -> int:
        """Read a piece, let the target have what of the box is in it, and return its length in bytes."""
        dtype = dtype_of(self.stored)
        num_bytes = prod(piece[1]) * dtype.itemsize
        room = staging.room(num_bytes, for_cuda=self.local.is_cuda)
        _read_and_hash(descriptor, folder, self, raw_bytes(room), start, digest)
        if (wanted := _common(piece, self.box)) is not None:
            values = room.view(dtype).view(piece[1])
            _part_in(self.local, wanted, self.origin).copy_(values[_region(*wanted, piece[0])])
        return num_bytes


def reads_of(layout: Layout, targets: Mapping[str, Tensor]) -> list[Read]:
    """What is to be read so that each of `targets`, or this rank's part of it, has the values stored by its name."""
    reads = []
    for (name, target), box in zip(targets.items(), local_boxes(targets.values()), strict=True):
        stored, local = layout[name], local_part(target)
        for chunk in stored.chunks:
            if (overlap := _common((chunk.offsets, chunk.sizes), box)) is not None:
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
    staging = Staging()
    # In the order of the files, so that the disk and its read-ahead go one way.
    in_order = sorted(reads, key=lambda read: (read.chunk.file, read.chunk.at))
    for name, of_file in groupby(in_order, key=lambda read: read.chunk.file):
        try:
            with (folder / name).open("rb", buffering=0) as file:
                for read in of_file:
                    read.perform(file.fileno(), folder, staging)
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


def _common(one: Box, other: Box) -> Box | None:
    """What two boxes have in common; None where that is nothing."""
    if one == other:  # on the mesh that saved, each of them
        return one
    starts: list[int] = []
    sizes: list[int] = []
    for left, own, right, another in zip(*one, *other, strict=True):
        start = max(left, right)
        size = min(left + own, right + another) - start
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
