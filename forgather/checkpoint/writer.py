"""The process that writes checkpoints while the run goes on: `python -m forgather.checkpoint.writer SOCKET MEMORY`.

It belongs to one rank, shares a piece of memory with it, and knows no torch, so that it is small and starts at once.
The rank copies its tensors into the memory and sends a `WritePart`; this writes them, with digests, in low priority.
Rank 0's then commits the checkpoint of all ranks. It answers with `Written`, then `Committed`, or `Failed`.

It ends with its rank, also when that is killed: what it was writing is then a leftover, as after any interrupted save.
"""

import contextlib
import mmap
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

from forgather.checkpoint.commit import AbandonedError, commit, discard
from forgather.checkpoint.folder import draft_of, refused
from forgather.checkpoint.messages import Abandon, Answer, Committed, Failed, Layout, WritePart, Written
from forgather.checkpoint.part import Item, write_part
from forgather.distributed.failure import die_with_parent
from forgather.errors import CheckpointError, ForgatherError

NICENESS = 19


def main() -> None:
    """Serve the rank that has started this process, until it ends."""
    # A terminal and Slurm signal every process of a job; whether this one is to end, its rank decides.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    die_with_parent()  # at once, where the listener of the inbox may have to wait for its turn
    with contextlib.suppress(OSError):
        os.nice(NICENESS)
    inbox = Inbox(Connection(int(sys.argv[1])))
    memory = Memory(int(sys.argv[2]))
    while True:
        match inbox.take():
            case Layout() as layout:
                memory.arrange(layout)
            case WritePart() as job:
                _serve(job, inbox, memory)
            case Abandon():
                pass  # it comes too late: there is nothing that is waited for
            case other:
                raise TypeError(f"a rank has sent a {type(other).__name__}")


def _serve(job: WritePart, inbox: "Inbox", memory: "Memory") -> None:
    try:
        write_part(draft_of(job.final), job.rank, memory.contents(), job.document, job.copies)
    except OSError as error:
        if job.commit is not None:
            discard(draft_of(job.final))
        inbox.answer(Failed(job.number, refused(job.final, error)))
        return
    inbox.answer(Written(job.number))
    if job.commit is None:
        # Another rank's process commits. It is whole when it has its name; whoever hears nothing is told by its rank.
        while not inbox.wait(0.02):
            if job.final.exists():
                inbox.answer(Committed(job.number))
                return
        return
    try:
        inbox.answer(Committed(job.number, commit(job.commit, inbox.wait)))
    except AbandonedError:
        inbox.answer(Failed(job.number, CheckpointError(f"{job.final} was given up")))
    except ForgatherError as error:
        inbox.answer(Failed(job.number, error))


class Inbox:
    """What the rank sends, in order. When the rank is gone, the process ends at once, whatever it is doing."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._messages: deque[Any] = deque()
        self._arrived = threading.Condition()
        threading.Thread(target=self._listen, daemon=True).start()

    def take(self) -> Any:
        """The next message."""
        with self._arrived:
            self._arrived.wait_for(lambda: self._messages)
            return self._messages.popleft()

    def wait(self, seconds: float) -> bool:
        """Wait so long, or until there is a message; whether there is one."""
        with self._arrived:
            return bool(self._arrived.wait_for(lambda: self._messages, seconds))

    def answer(self, message: Answer) -> None:
        """Tell the rank."""
        with contextlib.suppress(BrokenPipeError):  # the listener notices, and ends the process
            self._connection.send(message)

    def _listen(self) -> None:
        while True:
            try:
                message = self._connection.recv()
            except (EOFError, OSError):
                os._exit(0)
            with self._arrived:
                self._messages.append(message)
                self._arrived.notify()


class Memory:
    """The memory that the rank has filled, seen as its tensors."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._map: mmap.mmap | None = None
        self._items: Sequence[Item] = ()

    def arrange(self, layout: Layout) -> None:
        """Look at it as `layout` says from now on."""
        self._map = mmap.mmap(self._descriptor, layout.num_bytes, prot=mmap.PROT_READ)
        self._items = layout.items

    def contents(self) -> Iterator[tuple[Item, memoryview]]:
        assert self._map is not None, "a layout comes before the first save"
        whole = memoryview(self._map)
        return ((item, whole[item.at : item.at + item.length]) for item in self._items)


if __name__ == "__main__":
    main()
