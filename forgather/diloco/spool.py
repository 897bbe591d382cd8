"""Where contributions lie until their round closes: in memory up to a budget, beyond it in files.

Room for a part is taken whole before its first byte is read, so that a full disk is told at once, and is given back
when the part is torn, replaced or used. A file has no name: what a killed server leaves takes no space. It is made, and
written a MiB at a time, by a thread, because a disk may keep whoever asks it waiting. What is there can be looked at
while the rest still comes.
"""

import errno
import mmap
import os
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import IO, Protocol

import torch
from torch import Tensor

from forgather.diloco.frame import ProtocolError

_BATCH_BYTES = 1 << 20
_WORTH_BYTES = 4 << 20  # less memory than this is not worth to divide a part for
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

Submit = Callable[[Callable[[], None]], "Future[None]"]


class Room(Protocol):
    """Place for so many bytes."""

    num_bytes: int

    @property
    def num_readable(self) -> int:
        """So many bytes from the first on can be looked at."""

    def take(self) -> "Future[None] | None":
        """Take the room, before anything is written; a future is to be waited for. OSError where there is none."""

    def write(self, data: memoryview) -> "Future[None] | None":
        """Take the next bytes. A future is to be waited for before the next call; what it waits for may be older."""

    def finish(self) -> "Future[None] | None":
        """All bytes were given; they are written when the future is done."""

    def view(self, start: int, length: int) -> Tensor:
        """Bytes that were written, as uint8, not copied."""

    def forget(self, start: int, length: int) -> None:
        """Bytes that need not stay in memory, as they are not looked at soon."""

    def release(self) -> None:
        """Give it back. Views that are still there stay good."""


class Spool:
    """Gives room for contributions: `memory_bytes` of it in memory, the rest in `folder`."""

    def __init__(self, folder: Path, memory_bytes: int, submit: Submit) -> None:
        self.folder = folder
        self.memory_bytes = memory_bytes
        self.memory_used = 0
        self.disk_used = 0
        self._spare: list[mmap.mmap] = []  # memory that was given back
        self._submit = submit

    def room(self, num_bytes: int) -> Room:
        """Room for so many bytes, which is still to be taken."""
        free = self.memory_bytes - self.memory_used
        if num_bytes <= free:
            return _Memory(self, num_bytes)
        if free < _WORTH_BYTES:
            return _File(self, num_bytes, self._submit)
        return _Both(_Memory(self, free), _File(self, num_bytes - free, self._submit))

    def take_pages(self, num_bytes: int) -> mmap.mmap:
        """Memory of this size: some that was given back, as the first touch of a page costs several copies of it."""
        self.memory_used += num_bytes
        for number, spare in enumerate(self._spare):
            if len(spare) == max(1, num_bytes):
                return self._spare.pop(number)
        self._spare.clear()  # so that with what is spare there is never more than the budget
        # Private, as only such pages can be huge ones.
        fresh = mmap.mmap(-1, max(1, num_bytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE") and num_bytes >= 2 << 20:
            fresh.madvise(mmap.MADV_HUGEPAGE)
        return fresh

    def give_back_pages(self, pages: mmap.mmap, num_bytes: int, *, are_free: bool) -> None:
        """Memory that is not used any more; with views of it that still are it is left to them."""
        self.memory_used -= num_bytes
        if are_free:
            self._spare.append(pages)


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
        self._map = spool.take_pages(num_bytes)
        self._data = memoryview(self._map)
        self._at = 0

    def take(self) -> None:
        """The system gives a page when it is written to."""

    @property
    def num_readable(self) -> int:
        return self._at

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
            # A view has a reference to what it was made from: here there is the attribute, and the argument itself.
            are_free = sys.getrefcount(self._data) == 2
            self._spool.give_back_pages(self._map, self.num_bytes, are_free=are_free)
            self._spool = None
            self._data = memoryview(b"")
            del self._map  # unmapped with its last view, where it does not serve again


class _File:
    """A file without a name in the server's folder."""

    def __init__(self, spool: Spool, num_bytes: int, submit: Submit) -> None:
        self.num_bytes = num_bytes
        self._submit = submit
        self._folder = spool.folder
        self._file: IO[bytes] | None = None  # once it was taken
        self._map: mmap.mmap | None = None
        self._spool: Spool | None = spool
        self._at = 0
        self._batch = bytearray()
        self._writing: Future[None] | None = None
        self.num_readable = 0
        spool.disk_used += num_bytes

    def take(self) -> "Future[None]":
        def take() -> None:
            file = tempfile.TemporaryFile(dir=self._folder, buffering=0)  # noqa: SIM115  closed by release
            try:
                if self.num_bytes and hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, self.num_bytes)
                else:
                    os.ftruncate(file.fileno(), self.num_bytes)
            except OSError:
                file.close()
                raise
            self._file = file

        self._writing = self._submit(take)
        return self._writing

    @property
    def _descriptor(self) -> int:
        assert self._file is not None, "its room was taken"
        return self._file.fileno()

    def write(self, data: memoryview) -> "Future[None] | None":
        self._batch += data
        if len(self._batch) < _BATCH_BYTES:
            return None
        before = self._writing
        self._put(before)
        return before  # one batch is written while the next is filled

    def finish(self) -> "Future[None] | None":
        if self._batch:
            self._put(self._writing)
        return self._writing

    def _put(self, before: "Future[None] | None") -> None:
        batch, at = self._batch, self._at
        self._batch, self._at = bytearray(), at + len(batch)

        def write() -> None:
            _pwrite(self._descriptor, memoryview(batch), at)
            if before is not None:
                before.result()
            self.num_readable = at + len(batch)

        self._writing = self._submit(write)

    def view(self, start: int, length: int) -> Tensor:
        if not length:
            return _nothing()
        if self._map is None:
            self._map = mmap.mmap(self._descriptor, self.num_bytes)
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
            # Whoever waited for a thread may be gone: closed under it, it would write into whatever is opened next.
            if self._writing is not None:
                self._writing.add_done_callback(lambda _: self._close())

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()


class _Both:
    """The first bytes in memory, the others in a file."""

    def __init__(self, memory: _Memory, file: _File) -> None:
        self.num_bytes = memory.num_bytes + file.num_bytes
        self._memory = memory
        self._file = file
        self._split = memory.num_bytes

    @property
    def num_readable(self) -> int:
        return self._memory.num_readable + self._file.num_readable

    def take(self) -> "Future[None]":
        return self._file.take()

    def write(self, data: memoryview) -> "Future[None] | None":
        first = data[: self._split - self._memory.num_readable]
        if first:
            self._memory.write(first)
        return self._file.write(data[len(first) :]) if len(first) < len(data) else None

    def finish(self) -> "Future[None] | None":
        return self._file.finish()

    def view(self, start: int, length: int) -> Tensor:
        if start + length <= self._split:
            return self._memory.view(start, length)
        if start >= self._split:
            return self._file.view(start - self._split, length)
        # One slice lies in both: it alone is copied.
        before = self._split - start
        return torch.cat([self._memory.view(start, before), self._file.view(0, length - before)])

    def forget(self, start: int, length: int) -> None:
        if start + length > self._split:
            first = max(0, start - self._split)
            self._file.forget(first, start + length - self._split - first)

    def release(self) -> None:
        self._memory.release()
        self._file.release()


def _pwrite(descriptor: int, data: memoryview, at: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, at)
        data, at = data[written:], at + written


def _nothing() -> Tensor:
    return torch.empty(0, dtype=torch.uint8)
