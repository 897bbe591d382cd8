"""Writes a server's state to the disk, while the next outer steps are made of what was read already.

    begin     under the lock of outer steps: the state is read and written, to where the system puts it
    then      without the lock: it is brought to the disk, which on a slow one takes longest, and becomes durable

One save at a time: the next waits until the one before is on the disk. Where that one was refused, the next has all
that it had, and is waited for to its end: a disk that is full lets no version be made for which it has no room.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Protocol, TypeVar, cast

from forgather.checkpoint.keep import Keep
from forgather.checkpoint.loading import Checkpoint
from forgather.checkpoint.run_folder import RunFolder
from forgather.checkpoint.state import TrainState
from forgather.checkpoint.store import CheckpointStore
from forgather.diloco.fragment_values import FragmentValues
from forgather.diloco.journal import Journal
from forgather.diloco.server_state import ServerState
from forgather.errors import CheckpointError

Refusal = CheckpointError | OSError  # of a disk
Result = TypeVar("Result")


class InThread(Protocol):
    def __call__(self, call: Callable[[], Result], /) -> Awaitable[Result]: ...


class Saver:
    """Saves `state`, which has `fragments`, in the run folder `run`, and shortens `journal` by what is saved then.

    The journal is touched `in_journal_thread` alone. `tell` wakes whoever waits for a version to be durable. `ended` is
    called when a save is on the disk; with the error when the disk refuses what was read already, which is then to be
    begun again; and with any other error, after which nothing is to be saved any more.
    """

    def __init__(
        self,
        run: RunFolder,
        keep: Keep | None,
        state: ServerState,
        fragments: Sequence[FragmentValues],
        journal: Journal,
        in_journal_thread: InThread,
        tell: Callable[[], Coroutine[Any, Any, None]],
        ended: Callable[[Exception | None], None],
    ) -> None:
        self.num_unsaved = 0  # versions since the last save
        self._state = state
        self._fragments = fragments
        self._journal = journal
        self._in_journal_thread = in_journal_thread
        self._tell = tell
        self._ended = ended
        self._store = CheckpointStore(run, keep, asynchronous=False)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="save")
        self._finishing: asyncio.Task[Refusal | None] | None = None

    @property
    def step(self) -> int:
        """How many versions were made, over all fragments: the step of a checkpoint."""
        return sum(each.version.number for each in self._fragments)

    def load(self, document: Mapping[str, Any]) -> Checkpoint | None:
        """Take the newest checkpoint; where there is none, save what the server begins with, and return None.

        A start is saved too: a server that is started again begins with the same values, whatever has become of the
        model's folder.
        """
        newest = self._store.resume(cast(TrainState, self._state))  # it has what a store needs of one
        if newest is None:
            self._state.document = dict(document)
            self._store.save(cast(TrainState, self._state), self.step)
            self._journal.clear(self._journal.size())  # it is of another server
        self._are_durable([each.version.number for each in self._fragments])
        return newest

    async def begin(self, document: Callable[[], Mapping[str, Any]], *, may_clear: bool) -> int:
        """Return when the state, and the `document` of what is no tensor, were read, and may change; with their step.

        CheckpointError or OSError when the disk refuses before, or still refuses after it has refused the save before.
        A step that is saved already is not written again: what was set since is in the journal alone.
        """
        is_awaited = await self.finish() is not None
        size = await self._in_journal_thread(self._journal.size)
        self._state.document = dict(document())  # here, where nobody changes it meanwhile
        loop, taken, step = asyncio.get_running_loop(), asyncio.Event(), self.step

        def is_taken() -> None:
            loop.call_soon_threadsafe(taken.set)

        def write() -> None:
            self._store.save(cast(TrainState, self._state), step, taken=is_taken)

        writing = loop.run_in_executor(self._thread, write)
        num_versions, self.num_unsaved = self.num_unsaved, 0
        numbers = [each.version.number for each in self._fragments]
        cleared = size if may_clear and num_versions else None
        self._finishing = asyncio.create_task(self._finish(writing, taken, numbers, num_versions, cleared))
        if not is_awaited:
            reading = asyncio.create_task(taken.wait())
            await asyncio.wait([reading, self._finishing], return_when=asyncio.FIRST_COMPLETED)
            reading.cancel()
        if (is_awaited or self._finishing.done()) and (refusal := await self.finish()) is not None:
            raise refusal
        return step

    async def finish(self) -> Refusal | None:
        """Return when the last save is on the disk; what the disk had against it."""
        return None if self._finishing is None else await asyncio.shield(self._finishing)

    async def _finish(
        self,
        writing: Awaitable[None],
        taken: asyncio.Event,
        numbers: Sequence[int],
        num_versions: int,
        cleared: int | None,
    ) -> Refusal | None:
        try:
            await writing
        except Exception as error:
            self.num_unsaved += num_versions
            if taken.is_set() or not isinstance(error, Refusal):
                self._ended(error)
            if isinstance(error, Refusal):
                return error
            raise
        if cleared is not None:
            with suppress(OSError):
                await self._in_journal_thread(lambda: self._journal.clear(cleared))
        self._are_durable(numbers)
        self._ended(None)
        await self._tell()
        return None

    def _are_durable(self, numbers: Sequence[int]) -> None:
        for fragment, number in zip(self._fragments, numbers, strict=True):
            fragment.durable = number

    def close(self) -> None:
        """Let go of everything."""
        self._thread.shutdown()
        self._store.close()
