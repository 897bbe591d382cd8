"""The rank's side of writing checkpoints: copy the tensors aside and let a process write them, or write them here."""

import contextlib
import mmap
import os
import socket
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from forgather.checkpoint.commit import commit, discard
from forgather.checkpoint.folder import draft_of, refused
from forgather.checkpoint.messages import Abandon, Answer, Committed, Failed, Layout, WritePart, Written
from forgather.checkpoint.part import Item, leave_failure, write_part
from forgather.checkpoint.storage import raw_bytes
from forgather.errors import CheckpointError, ForgatherError

# How long the writer may take to end when it is told to. It ends at once, but for a call into a disk that does not
# answer; and whoever waited for that could not even say what went wrong.
ENDING_S = 5.0
_SOURCES = str(Path(__file__).parents[2])  # where this very Forgather is, installed or not


class Writer(Protocol):
    """Takes one part at a time; the next may be begun after an answer to `written`."""

    def begin(
        self, job: WritePart, items: Sequence[Item], tensors: Sequence[Tensor], taken: Callable[[], None]
    ) -> None:
        """Take what `tensors` hold now, as `items` say; from when `taken` is called, they may change.

        That is at the latest on return, and not at all when the part cannot be written so far. It may still fail then.
        """

    def written(self) -> ForgatherError | None:
        """Wait until this rank's part is on the disk; the error when it will not be."""

    def committed(self, seconds: float | None) -> Committed | Failed | None:
        """What became of the checkpoint, waited for so long, or (None) as long as it takes; None when not known."""

    def abandon(self) -> None:
        """Another rank's part will not come."""

    def close(self) -> None:
        """End what was started; a part that is being written is lost."""


class HereWriter:
    """Writes from the tensors' own memory while the run waits: no memory beside the largest tensor on a device."""

    def __init__(self) -> None:
        self._job: WritePart | None = None
        self._failure: ForgatherError | None = None

    def begin(
        self, job: WritePart, items: Sequence[Item], tensors: Sequence[Tensor], taken: Callable[[], None]
    ) -> None:
        self._job, self._failure = job, None
        try:
            write_part(draft_of(job.final), job.rank, _contents(items, tensors), job.document, job.copies, taken)
        except OSError as error:
            self._failure = refused(job.final, error)

    def written(self) -> ForgatherError | None:
        return self._failure

    def committed(self, seconds: float | None) -> Committed | Failed | None:  # noqa: ARG002  it never takes long
        job, self._job = self._job, None
        if job is None:
            return None
        if job.commit is None:
            return Committed(job.number)
        try:
            return Committed(job.number, commit(job.commit))
        except ForgatherError as error:
            return Failed(job.number, error)

    def abandon(self) -> None:
        if self._job is not None and self._job.commit is not None:
            discard(draft_of(self._job.final))
        self._job = None

    def close(self) -> None:
        """There is nothing that runs."""


class BackgroundWriter:
    """Copies tensors into memory shared with a process of its own (`checkpoint.writer`), which writes from there.

    The memory is taken, and touched, once: the first touch of a page costs ten times what a copy does. Where tensors
    come from a CUDA device it is pinned too: the device then writes there itself, and all copies are under way at once.
    """

    def __init__(self) -> None:
        self._descriptor = _anonymous_memory()
        self._items: Sequence[Item] = ()
        self._views: list[Tensor] = []
        self._memory = torch.empty(0, dtype=torch.uint8)  # all that is taken of it, as it is mapped here
        self._pinned: Tensor | None = None
        self._answers: list[Answer] = []
        self._job: WritePart | None = None
        ours, theirs = socket.socketpair()
        self._process = subprocess.Popen(
            # -P: a random.py in the folder where the run was started is not the module of that name.
            [sys.executable, "-P", "-m", "forgather.checkpoint.writer", str(theirs.fileno()), str(self._descriptor)],
            pass_fds=(theirs.fileno(), self._descriptor),
            stdin=subprocess.DEVNULL,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join([_SOURCES, *filter(None, [os.environ.get("PYTHONPATH")])]),
            },
        )
        theirs.close()
        self._connection = Connection(ours.detach())
        _close_in_forks(self)

    def begin(
        self, job: WritePart, items: Sequence[Item], tensors: Sequence[Tensor], taken: Callable[[], None]
    ) -> None:
        self._answers.clear()
        self._job = job
        try:
            self._copy(items, tensors)
        except OSError as error:
            self._fail(job, refused(job.final, error))
        except CheckpointError as error:
            self._fail(job, error)
        else:
            taken()
            self._send(job)

    def written(self) -> ForgatherError | None:
        first = self._answer(0, None)
        return first.error if isinstance(first, Failed) else None

    def committed(self, seconds: float | None) -> Committed | Failed | None:
        if self._job is None:
            return None
        first = self._answer(0, seconds)
        answer = first if first is None or isinstance(first, Failed) else self._answer(1, seconds)
        if answer is None:
            return None
        assert not isinstance(answer, Written), "the second answer is of the whole checkpoint"
        self._job = None
        return answer

    def abandon(self) -> None:
        self._send(Abandon())
        if self._job is not None and self._job.commit is not None:
            self.committed(None)  # that the draft is gone is the last that is heard of it
        self._job = None

    def close(self) -> None:
        self._unpin()
        self._connection.close()
        self._end()
        os.close(self._descriptor)

    @property
    def _number(self) -> int:
        return -1 if self._job is None else self._job.number

    def _copy(self, items: Sequence[Item], tensors: Sequence[Tensor]) -> None:
        if items != self._items:
            self._arrange(items, pin=any(tensor.is_cuda for tensor in tensors))
        if tensors:
            torch._foreach_copy_(self._views, [tensor.detach() for tensor in tensors], non_blocking=True)
        if self._pinned is not None:
            torch.cuda.synchronize()  # before the writer looks, and before the tensors change

    def _fail(self, job: WritePart, error: CheckpointError) -> None:
        """Answer that this part cannot be written, as the process would, and tell the ranks that wait for it."""
        leave_failure(draft_of(job.final), job.rank, error.message)
        self._answers.append(Failed(job.number, error))

    def _arrange(self, items: Sequence[Item], *, pin: bool) -> None:
        """Let the memory have a place for each item.

        It is mapped and pinned anew only when it must grow, which costs a touch of each page; what hooks give may be
        other items at each save.
        """
        num_bytes = max(1, items[-1].at + items[-1].length) if items else 1
        known = dict(zip(self._items, self._views, strict=True))
        if num_bytes > self._memory.nbytes:
            self._grow(num_bytes)
            known = {}
        if pin and self._pinned is None:
            size = self._memory.nbytes
            _require_pinned(_cudart().cudaHostRegister(self._memory.data_ptr(), size, 0), size)
            self._pinned = self._memory
        self._views = [known[item] if item in known else self._view(item) for item in items]
        self._items = items
        self._send(Layout(items, num_bytes))

    def _grow(self, num_bytes: int) -> None:
        self._unpin()
        self._items, self._views = (), []
        os.ftruncate(self._descriptor, num_bytes)
        populate = getattr(mmap, "MAP_POPULATE", 0)
        memory = mmap.mmap(self._descriptor, num_bytes, flags=mmap.MAP_SHARED | populate)
        self._memory = torch.frombuffer(memory, dtype=torch.uint8)

    def _view(self, item: Item) -> Tensor:
        memory = self._memory[item.at : item.at + item.length]
        return memory.view(getattr(torch, item.dtype)).view(item.sizes)

    def _unpin(self) -> None:
        if self._pinned is not None:
            _cudart().cudaHostUnregister(self._pinned.data_ptr())
            self._pinned = None

    def _send(self, message: Layout | WritePart | Abandon) -> None:
        try:
            self._connection.send(message)
        except OSError:
            self._answers.append(Failed(self._number, self._died()))

    def _answer(self, number: int, seconds: float | None) -> Answer | None:
        while len(self._answers) <= number:
            try:
                if not self._connection.poll(seconds):
                    return None
                answer = self._connection.recv()
            except (EOFError, OSError):
                self._answers.append(Failed(self._number, self._died()))
                return self._answers[-1]
            if answer.number == self._number:  # not one to the job before, which came too late
                self._answers.append(answer)
        return self._answers[number]

    def _end(self) -> int | None:
        """Wait for the end of the process, which has been told or has hung up; None when not even a kill ends it."""
        for ask in (None, self._process.kill):
            if ask is not None:
                ask()
            with contextlib.suppress(subprocess.TimeoutExpired):
                return self._process.wait(ENDING_S)
        return None

    def _died(self) -> CheckpointError:
        code = self._end()
        how = "hangs, and cannot be ended" if code is None else f"ended with code {code}"
        if code is not None and code < 0:
            how = f"was ended by signal {-code}"
        if self._job is not None:
            leave_failure(draft_of(self._job.final), self._job.rank, f"its writing process {how}")
        return CheckpointError(
            f"the process {self._process.pid} that writes this rank's checkpoints {how}; what it wrote is not used",
            fix="see whether memory ran out (dmesg), or write without it: checkpoints.asynchronous=false",
        )


def _contents(items: Sequence[Item], tensors: Sequence[Tensor]) -> Iterator[tuple[Item, memoryview]]:
    for item, tensor in zip(items, tensors, strict=True):
        yield item, raw_bytes(tensor.detach().to("cpu").contiguous())


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _require_pinned(code: Any, num_bytes: int) -> None:
    if int(code) != 0:
        raise CheckpointError(
            f"the system pins no {num_bytes:,} bytes of memory, into which checkpoints are copied (CUDA: {code})",
            fix="let the process lock more memory (ulimit -l), or write without it: checkpoints.asynchronous=false",
        )


def _anonymous_memory() -> int:
    """A file that is only memory, and goes with the last process that has it open."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("forgather-checkpoint")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _close_in_forks(writer: BackgroundWriter) -> None:
    """A forked child (a loader's worker) would keep the connection open when this process is gone."""
    reference: Callable[[], BackgroundWriter | None] = weakref.ref(writer)

    def close() -> None:
        if (there := reference()) is not None:
            there._connection.close()

    os.register_at_fork(after_in_child=close)
