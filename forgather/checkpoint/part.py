"""One rank's part of a checkpoint that is being written: its file of tensors, and its record that this is done.

Ranks do not talk while they write. Each leaves `rank-00001.done` in the draft folder when its file is on the disk, or
`rank-00001.failed`; whoever commits reads these.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from forgather.checkpoint.folder import cause_of
from forgather.checkpoint.layout import Chunk
from forgather.checkpoint.manifest import FileRecord
from forgather.errors import CheckpointError

ALIGNMENT = 64  # of each tensor in its file and in memory, so that it can be looked at as any dtype


@dataclass(frozen=True)
class Item:
    """A rectangle of a tensor that this rank writes, `length` bytes at `at` of its file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    at: int
    length: int


@dataclass(frozen=True)
class Part:
    """What one rank has written: its file, the chunks in it, and its share of the state that is no tensor.

    `copies` has the digests of tensors that another rank writes and that must be the same here.
    """

    rank: int
    file: FileRecord
    chunks: Mapping[str, list[Chunk]]
    kinds: Mapping[str, tuple[str, tuple[int, ...]]]  # dtype and whole shape by name
    document: Mapping[str, Any]
    copies: Mapping[str, str] = field(default_factory=dict)


def file_name(rank: int) -> str:
    """The file of a rank's tensors."""
    return f"rank-{rank:05d}.bin"


def place(lengths: Iterable[int]) -> list[int]:
    """Where in a file pieces of these lengths begin, each aligned; the last number is the length of the file."""
    places = [0]
    for length in lengths:
        places.append(places[-1] + -(-length // ALIGNMENT) * ALIGNMENT)
    return places


def write_part(
    draft: Path,
    rank: int,
    data: Iterable[tuple[Item, memoryview]],
    document: Mapping[str, Any],
    copies: Mapping[str, str],
    taken: Callable[[], None] = lambda: None,
) -> None:
    """Write a rank's file into `draft`, which is made, and then its record; both are on the disk on return.

    `taken` is called when all of `data` was read, which is long before that on a slow disk. When something fails, a
    record of that is left for the others, as far as the disk allows one, and it is raised.
    """
    name = file_name(rank)
    try:
        draft.mkdir(parents=True, exist_ok=True)
        chunks: dict[str, list[Chunk]] = {}
        kinds: dict[str, tuple[str, tuple[int, ...]]] = {}
        whole = xxhash.xxh3_64()
        at = 0
        with (draft / name).open("wb", buffering=0) as file:
            for item, view in data:
                if item.at > at:
                    gap = memoryview(bytes(item.at - at))
                    write_all(file.fileno(), gap)
                    whole.update(gap)
                digest = xxhash.xxh3_64()
                for block in blocks_of(view):
                    write_all(file.fileno(), block)
                    digest.update(block)  # while it is in the cache of the processor
                    whole.update(block)
                at = item.at + item.length
                stored = chunks.setdefault(item.name, [])
                if item.length:  # not the shard of a tensor that is divided so unevenly that nothing is left for us
                    stored.append(Chunk(item.offsets, item.sizes, name, item.at, item.length, digest.hexdigest()))
                kinds[item.name] = (item.dtype, item.shape)
            taken()
            os.fsync(file.fileno())
        part = Part(rank, FileRecord(at, whole.hexdigest()), chunks, kinds, document, copies)
        _leave(draft / f"rank-{rank:05d}.done", _record(part))
    except BaseException as error:
        leave_failure(draft, rank, cause_of(error))
        raise


def leave_failure(draft: Path, rank: int, cause: str) -> None:
    """Tell whoever commits that this rank's part will not come; a disk that takes not even that is told nothing."""
    try:
        _leave(draft / f"rank-{rank:05d}.failed", {"cause": cause})
    except OSError:
        return


def read_part(draft: Path, rank: int) -> Part | None:
    """The record that `rank` has left, None as long as there is none. CheckpointError when it left that it failed."""
    try:
        content = json.loads((draft / f"rank-{rank:05d}.done").read_bytes())
    except FileNotFoundError:
        failed = draft / f"rank-{rank:05d}.failed"
        if failed.exists():
            cause = json.loads(failed.read_bytes())["cause"]
            raise CheckpointError(f"rank {rank} failed ({cause})") from None
        return None
    return Part(
        rank,
        FileRecord(**content["file"]),
        {name: [_chunk(stored) for stored in chunks] for name, chunks in content["chunks"].items()},
        {name: (dtype, tuple(shape)) for name, (dtype, shape) in content["kinds"].items()},
        content["document"],
        content["copies"],
    )


def remove_records(draft: Path, ranks: int) -> None:
    """Remove the records, which are no part of a checkpoint."""
    for rank in range(ranks):
        (draft / f"rank-{rank:05d}.done").unlink()


def blocks_of(data: memoryview, size: int = 1 << 20) -> Iterable[memoryview]:
    """`data` in pieces that stay in the processor's cache between being hashed and being written."""
    return (data[start : start + size] for start in range(0, data.nbytes, size))


def write_all(descriptor: int, data: memoryview) -> None:
    """Write every byte; one call takes at most 2 GiB on Linux, and less on a disk that fills up."""
    while data:
        data = data[os.write(descriptor, data) :]


def _record(part: Part) -> dict[str, Any]:
    return {
        "file": {"size": part.file.size, "xxh3": part.file.xxh3},
        "chunks": {
            name: [[c.offsets, c.sizes, c.file, c.at, c.length, c.xxh3] for c in chunks]
            for name, chunks in part.chunks.items()
        },
        "kinds": part.kinds,
        "document": part.document,
        "copies": part.copies,
    }


def _chunk(stored: list[Any]) -> Chunk:
    offsets, sizes, file, at, length, xxh3 = stored
    return Chunk(tuple(offsets), tuple(sizes), file, at, length, xxh3)


def _leave(path: Path, content: Mapping[str, Any]) -> None:
    """Let `path` appear with all of its content."""
    aside = path.with_suffix(f"{path.suffix}.new")
    aside.write_text(json.dumps(content))
    aside.rename(path)
