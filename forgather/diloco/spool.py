"""Where contributions lie until their round closes: in memory up to a budget, beyond it in files.

Room for a part is taken whole before its first byte is read, so that a full disk is told at once, and is given back
when the part is torn, replaced or used. A file has no name: what a killed server leaves takes no space. One whose room
is a file is written a MiB at a time, by a thread, because a disk may keep a writer waiting.
"""

import errno
import mmap
import os
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from pathlib import Path
from typing import Protocol

import torch
import xxhash
from torch import Tensor

from forgather.diloco.messages import ProtocolError

_BATCH_BYTES = 1 << 20
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

Submit = Callable[[Callable[[], None]], "Future[None]"]


class Room(Protocol):
    """Place for so many bytes."""

    num_bytes: int

    def write(self, data: memoryview) -> "Future[None] | None":
        """Take the next bytes. A future is to be waited for before the next call."""

    def finish(self) -> "Future[None] | None":
        """All bytes were given."""

    def view(self, start: int, length: int) -> Tensor:
        """Bytes that were written, as uint8, not copied."""

    def forget(self, start: int, length: int) -> None:
        """Bytes that need not stay in memory, as they are not looked at soon."""

    def release(self) -> None:
        """Give it back. Views that are still there stay good."""


class Spool:
    """Gives room for contributions: `memory_bytes` of it in memory, the rest in `folder`.

    ProtocolError (507) when the disk is full, too.
    """

    def __init__(self, folder: Path, memory_bytes: int, submit: Submit) -> None:
        self.folder = folder
        self.memory_bytes = memory_bytes
        self.memory_used = 0
        self.disk_used = 0
        self._submit = submit

    def room(self, num_bytes: int) -> Room:
        """Room for so many bytes, none of which is written yet."""
        if self.memory_used + num_bytes <= self.memory_bytes:
            return _Memory(self, num_bytes)
        try:
            return _File(self, num_bytes, self._submit)
        except OSError as error:
            raise refusal(self.folder, error) from error


def refusal(folder: Path, error: OSError) -> ProtocolError:
    """What a worker is told when its contribution cannot be kept."""
    if error.errno in _FULL:
        return ProtocolError(
            f"the server's disk is full: {error.strerror}",
            status=507,
            fix=f"free space where the server's folder {folder.name!r} is; the worker tries again",
        )
    return ProtocolError(f"the server cannot keep it: {error.strerror}", status=500)


class _Memory:
    """Pages of its own, so that they go back to the system at once."""

    def __init__(self, spool: Spool, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self._spool: Spool | None = spool
        # Private, as only such pages can be huge ones.
        self._map = mmap.mmap(-1, max(1, num_bytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE") and num_bytes >= 2 << 20:
            self._map.madvise(mmap.MADV_HUGEPAGE)  # the first touch of a small page costs ten times what a copy does
        self._data = memoryview(self._map)
        self._at = 0
        spool.memory_used += num_bytes

    def write(self, data: memoryview) -> None:
        self._data[self._at : self._at + data.nbytes] = data
        self._at += data.nbytes

    def finish(self) -> None:
        """Nothing is kept back."""

    def view(self, start: int, length: int) -> Tensor:
        return torch.frombuffer(self._data, dtype=torch.uint8, count=length, offset=start) if length else _nothing()

    def forget(self, start: int, length: int) -> None:
        """It is the only copy."""

    def release(self) -> None:
        if self._spool is not None:
            self._spool.memory_used -= self.num_bytes
            self._spool = None
            self._data = memoryview(b"")
            del self._map  # unmapped with its last view


class _File:
    """A file without a name in the server's folder."""

    def __init__(self, spool: Spool, num_bytes: int, submit: Submit) -> None:
        self.num_bytes = num_bytes
        self._submit = submit
        self._file = tempfile.TemporaryFile(dir=spool.folder, buffering=0)  # noqa: SIM115  closed by release
        self._map: mmap.mmap | None = None
        try:
            if num_bytes and hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._file.fileno(), 0, num_bytes)
            else:
                os.ftruncate(self._file.fileno(), num_bytes)
        except OSError:
            self._file.close()
            raise
        self._spool: Spool | None = spool
        self._at = 0
        self._batch = bytearray()
        self._writing: Future[None] | None = None
        spool.disk_used += num_bytes

    def write(self, data: memoryview) -> "Future[None] | None":
        self._batch += data
        return self.finish() if len(self._batch) >= _BATCH_BYTES else None

    def finish(self) -> "Future[None] | None":
        if not self._batch:
            return None
        batch, at = self._batch, self._at
        self._batch, self._at = bytearray(), at + len(batch)
        self._writing = self._submit(lambda: _pwrite(self._file.fileno(), memoryview(batch), at))
        return self._writing

    def view(self, start: int, length: int) -> Tensor:
        if not length:
            return _nothing()
        if self._map is None:
            self._map = mmap.mmap(self._file.fileno(), self.num_bytes)
        return torch.frombuffer(self._map, dtype=torch.uint8, count=length, offset=start)

    def forget(self, start: int, length: int) -> None:
        if self._map is not None and hasattr(mmap, "MADV_DONTNEED"):
            first = start // mmap.PAGESIZE * mmap.PAGESIZE
            self._map.madvise(mmap.MADV_DONTNEED, first, start + length - first)

    def release(self) -> None:
        if self._spool is not None:
            self._spool.disk_used -= self.num_bytes
            self._spool = None
            self._map = None
            # Whoever waited for a write may be gone: closed under it, it would write into whatever is opened next.
            if self._writing is None:
                self._file.close()
            else:
                self._writing.add_done_callback(lambda _: self._file.close())


def digest_of(blocks: Iterable[memoryview]) -> str:
    """xxh3-64 of all bytes, in hex."""
    digest = xxhash.xxh3_64()
    for block in blocks:
        digest.update(block)
    return digest.hexdigest()


def _pwrite(descriptor: int, data: memoryview, at: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, at)
        data, at = data[written:], at + written


def _nothing() -> Tensor:
    return torch.empty(0, dtype=torch.uint8)
