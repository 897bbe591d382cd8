"""Makes versions: journal, outer step, publish, save. One after the other, and nobody takes in what is half done.

    journal       a line that says whose contributions make it: with them, and they are kept, it can be made again
    combine       master values and change, in the outer thread; the published values are still the old ones, and the
                  change of a parameter can be sent as soon as it is there
    move          the published values become the new ones; whoever was reading those is to ask again. Their digests
                  are the last that a worker gets, and without them it takes in nothing
    save          every so many versions, while workers fetch the values and train on; the next outer step waits until
                  the state was read, and the next save until it is on the disk

So nobody waits for a model's worth of bytes to reach a disk. A version is *durable* when it is saved, and until then
the workers keep what made it; where one of them has gone, and cannot bring it again, it is saved at once. A disk that
refuses is asked again until it takes the line, or the state, or the server is to end: that round is then made again by
the next, from the contributions that the workers have kept.
"""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any, Literal, TypeVar

from torch import Tensor

from forgather.checkpoint.folder import cause_of
from forgather.checkpoint.keep import Keep
from forgather.checkpoint.run_folder import RunFolder
from forgather.diloco.combine import Guard, Share, combine, lineage, shares
from forgather.diloco.contribution import Held
from forgather.diloco.fragment_values import FragmentValues
from forgather.diloco.frame import ProtocolError
from forgather.diloco.intake import Intake
from forgather.diloco.journal import Journal, Made
from forgather.diloco.ledger import Ledger
from forgather.diloco.messages import Version
from forgather.diloco.outer import Outer
from forgather.diloco.rates import Rates
from forgather.diloco.rounds import Rounds
from forgather.diloco.saver import Refusal, Saver
from forgather.diloco.server_state import ServerState
from forgather.errors import CheckpointError, ConfigError

Result = TypeVar("Result")

HISTORY = 200
RETRY_S = 2.0  # after a disk has refused to save


class StoppingError(Exception):
    """The server ends while something was still to be done, which then was not."""


class Publisher:
    """Closes rounds, and keeps what they have made in the run folder `run`.

    `document` gives the state that is no tensor; `tell` wakes whoever waits for a version, and `until` waits for what
    happens on the server.
    """

    def __init__(
        self,
        run: RunFolder,
        fragments: Sequence[FragmentValues],
        rounds: Rounds,
        intake: Intake,
        outer: Outer,
        guard: Guard,
        staleness: Callable[[int], float],
        ledger: Ledger | None,
        clock: Callable[[], float],
        *,
        save_every: int,
        keep: Keep | None,
        constants: Mapping[str, Tensor],
        document: Callable[[], dict[str, Any]],
        require_document: Callable[[Mapping[str, Any]], None],
        accept_document: Callable[[Mapping[str, Any]], None],
        tell: Callable[[], Coroutine[Any, Any, None]],
        until: Callable[[Callable[[], bool], float], Awaitable[bool]],
        stopped: asyncio.Event,
    ) -> None:
        if save_every < 1:
            raise ConfigError(f"save_every is {save_every}", fix="--save-every 1, or another whole number from 1")
        self.run = run
        self._troubles: dict[str, str] = {}  # why it cannot go on at the moment, by what it cannot do
        self.num_refused = 0
        self.history: deque[dict[str, Any]] = deque(maxlen=HISTORY)
        self._fragments = fragments
        self._rounds = rounds
        self._intake = intake
        self._outer = outer
        self._guard = guard
        self._staleness = staleness
        self._ledger = ledger
        self._clock = clock
        self._save_every = save_every
        self._document = document
        self._tell = tell
        self._until = until
        self._stopped = stopped
        self._is_half = False  # the state is no longer that of one version, and not yet that of the next
        self.rates = Rates(outer)
        self._again: dict[tuple[int, int], Made] = {}  # by fragment and number: versions that are to be made again
        self._lock = asyncio.Lock()  # over outer steps and saving
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="outer")
        state = ServerState(
            fragments,
            outer,
            constants,
            require_document,
            accept_document,
            {} if ledger is None else {"work_units": ledger},
        )
        self._journal = Journal(run.dir / "journal.jsonl")
        self._saver = Saver(run, keep, state, fragments, self._journal, self._in_thread, tell, self._save_has_ended)
        self._retry: asyncio.Task[None] | None = None  # of a save that was lost

    @property
    def step(self) -> int:
        """How many versions were made, over all fragments."""
        return self._saver.step

    @property
    def trouble(self) -> str | None:
        """Why it cannot save, or make versions, at the moment."""
        return next(iter(self._troubles.values()), None)

    def has_failed(self, cause: str) -> None:
        """What is in memory may be half of something: nothing of it is to be saved."""
        self._troubles["server"] = cause

    def load(self) -> None:
        """Go on from the newest checkpoint, and let the rounds since then be made again; or save a beginning."""
        newest = self._saver.load(self._document())
        if newest is None:
            return
        again = self._journal.after([each.version for each in self._fragments])
        for fragment, made in enumerate(again):
            self._rounds.replay(fragment, [each.contributors for each in made])
            first = self._fragments[fragment].version.number + 1
            self._again |= {(fragment, number): each for number, each in enumerate(made, start=first)}
        if self._journal.rates is not None:
            for words in self.rates.load_state_dict(self._journal.rates):
                self.run.say(words)
        number = sum(map(len, again))
        self.run.say(
            f"going on from {newest.path}"
            + (f"; {number} round{'s' * (number > 1)} since then to be made again" if number else "")
        )

    async def close_round(self, fragment: int) -> bool:
        """Make the next version of a fragment, if its round is to be closed now; says whether it was.

        StoppingError when the server ends before.
        """
        async with self._lock:
            # Nobody may take a contribution away, as an operator does with a worker's, between this and its use.
            contributors = self._rounds.due(fragment)
            if not contributors:
                return False
            await self._close_round(fragment, contributors)
            await self._tell()
            is_last = not all(self._rounds.members.is_live(worker) for worker, _ in contributors)
            if self._saver.num_unsaved >= self._save_every or is_last:
                await self._retried("save", self._save)
        return True

    async def _close_round(self, fragment: int, contributors: Sequence[tuple[str, int]]) -> None:
        began, loop = time.perf_counter(), asyncio.get_running_loop()
        helds = [self._intake.held(fragment, *each) for each in contributors]
        self._rounds.close(fragment, contributors)
        there, before = self._fragments[fragment], self._fragments[fragment].version
        opened_at = self._rounds.rounds[fragment].opened_at
        await self._slow_ones(fragment)
        contributors = [(held.worker, held.round) for held in helds]  # one may have another name by now
        taken = shares(helds, self._guard)
        version = Version(before.number + 1, lineage(before.lineage, taken))
        damping = 1.0
        if self._rounds.mode == "async":
            damping = self._staleness(max(0, before.number - helds[0].header.base.number))
        again = self._again.pop((fragment, version.number), None)
        is_again = again is not None and sorted(again.contributors) == sorted(contributors)
        if again is not None and not is_again:  # the rest was to be made of what this should have become
            self._again = {key: each for key, each in self._again.items() if key[0] != fragment}
        self.rates.apply()
        made = Made(contributors, again.rates if again is not None and is_again else self.rates.in_force)
        await self._retried("journal", lambda: self._in_thread(lambda: self._journal.add(fragment, version, made)))
        step_began = time.perf_counter()
        self._is_half = True
        there.begin()
        there.is_certain(version)
        await self._tell()
        with self._at(made.rates):
            await self._in_thread(
                lambda: combine(
                    taken,
                    there.master,
                    there.published,
                    self._outer,
                    there.change,
                    damping=damping,
                    made=lambda: asyncio.run_coroutine_threadsafe(self._tell(), loop),
                )
            )
        there.move_begins()
        await self._in_thread(there.move)
        there.moved(version, before)
        there.step_s = time.perf_counter() - step_began
        seconds = self._clock() - opened_at
        self._saver.num_unsaved += 1
        self._rounds.published(fragment, version, [held.header.base for held in helds])
        self._note(fragment, version, helds, taken, seconds, time.perf_counter() - began)
        for held in helds:
            self._intake.drop(fragment, held.worker, held.round)
        self._intake.drop_past(fragment)
        self._is_half = False

    async def _slow_ones(self, fragment: int) -> None:
        """Wait for answers that were broken off before by a new version, and would be by this one, too.

        Before anything of it is told: who has its beginning hears nothing while it waits for the rest.
        """
        downloads = self._fragments[fragment].downloads
        waited = downloads.waited_for()
        if waited:
            self.run.say(
                f"fragment {fragment}: version {self._fragments[fragment].version.number + 1} waits for up to "
                f"{max(waited.values()):g} s, until {', '.join(sorted(waited))} has the one before: versions come "
                "faster than it can get them"
            )
            await self._until(lambda: not downloads.waited_for(), max(waited.values()))

    @contextmanager
    def _at(self, rates: Mapping[str, float]) -> Iterator[None]:
        """While a step is made at these rates: one that is made again may have had others than are in force."""
        before = self.rates.put(rates)
        try:
            yield
        finally:
            self.rates.put(before)

    def _note(
        self,
        fragment: int,
        version: Version,
        helds: Sequence[Held],
        taken: Sequence[Share],
        seconds: float,
        outer_s: float,
    ) -> None:
        """What the history and the ledger know of a version that is published."""
        names = {share.held.worker for share in taken}
        members = self._rounds.members
        losses = []
        for held in helds:
            if self._ledger is not None:
                tell = self._ledger.count if held.worker in names else self._ledger.refuse
                tell(held.worker, held.consumed)
            if held.worker not in names:
                self.num_refused += 1
                self.run.say(f"{held.worker}'s contribution to round {held.round} is left out: norm {held.norm:.3g}")
            member = members.get(held.worker)
            if member is not None and member.loss is not None:
                losses.append((held.header.tokens, member.loss))
        tokens = sum(weight for weight, _ in losses)
        self.history.append(
            {
                "fragment": fragment,
                "version": version.number,
                "workers": [held.worker for held in helds],
                "refused": [held.worker for held in helds if held.worker not in names],
                "clipped": [share.held.worker for share in taken if share.scale < 1],
                "tokens": sum(held.header.tokens for held in helds),
                "norm": max(share.held.norm for share in taken),
                "seconds": round(seconds, 4),
                "outer_s": round(outer_s, 4),
                "loss": sum(weight * loss for weight, loss in losses) / tokens if losses else None,
                "time": time.time(),
            }
        )

    async def save(self) -> int:
        """Save now, and return the step that is on the disk then; nothing is written where nothing is new.

        ProtocolError (507) when the disk refuses.
        """
        if self.trouble is not None:
            raise ProtocolError(f"it cannot save: {self.trouble}", status=507)
        await self._saver.finish()  # here, and not where outer steps would wait for it too
        try:
            return await self._save_whole()
        except (CheckpointError, OSError) as refusal:
            fix = refusal.fix if isinstance(refusal, CheckpointError) else None
            raise ProtocolError(cause_of(refusal), status=507, fix=fix) from refusal

    async def _save_whole(self) -> int:
        """Save, and return the step when it is on the disk. CheckpointError or OSError when the disk refuses."""
        async with self._lock:
            step = await self._save()
        if (refusal := await self._saver.finish()) is not None:
            raise refusal
        return step

    async def _save(self) -> int:
        """Begin to, and return which step it is; the state may change on return."""
        if self._is_half:
            raise CheckpointError(
                "an outer step has failed, and what it has left is half of a version: only what is on the disk is good",
                fix="start the server again: it goes on from its newest checkpoint",
            )
        # The journal says what is still to be made again; what is older is passed over.
        return await self._saver.begin(self._document, may_clear=not self._rounds.is_made_again)

    def _save_has_ended(self, error: Exception | None) -> None:
        """One that had begun is on the disk, or will not be."""
        if error is None:
            self._troubles.pop("save", None)
        elif isinstance(error, Refusal):
            self._note_trouble("save", error)
            if self._retry is None or self._retry.done():
                self._retry = asyncio.create_task(self._save_again())
        else:
            self._ends_with(error)

    async def _save_again(self) -> None:
        try:
            await self._pause()
            async with self._lock:
                if self._saver.num_unsaved:  # or another was begun meanwhile
                    await self._retried("save", self._save)
        except StoppingError:
            return
        except Exception as error:  # noqa: BLE001  nobody waits for this task
            self._ends_with(error)

    def _ends_with(self, error: Exception) -> None:
        self.has_failed(f"saving failed: {error}")
        self._stopped.set()

    async def _retried(self, what: Literal["journal", "save"], write: Callable[[], Awaitable[object]]) -> None:
        while True:
            try:
                await write()
            except (CheckpointError, OSError) as error:
                self._note_trouble(what, error)
            else:
                if what == "journal":  # a save has only begun
                    self._troubles.pop(what, None)
                return
            await self._pause()

    def _note_trouble(self, what: Literal["journal", "save"], error: Exception) -> None:
        cause = cause_of(error)
        if cause != self._troubles.get(what):
            self._troubles[what] = cause
            self.run.say(f"warning: {cause}; trying again every {RETRY_S:g} s")

    async def _pause(self) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._stopped.wait(), RETRY_S)
        if self._stopped.is_set():
            raise StoppingError

    async def _in_thread(self, call: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)

    def set_outer(self, **rates: float) -> None:
        """Change `lr` or `momentum` of the outer optimizer, when its step has ended."""
        if not rates:
            return
        self.rates.change(**rates)
        self._thread.submit(self._keep_rates, self.rates.state_dict())  # before what is made with them, in that thread
        if not self._lock.locked():
            self.rates.apply()

    def _keep_rates(self, state: Mapping[str, Any]) -> None:
        try:
            self._journal.add_rates(state)
        except OSError as error:
            self.run.say(f"warning: the rates of the outer optimizer are not written down: {error.strerror}")

    async def close(self) -> None:
        """Save what is not saved, and let go of everything.

        A disk that has refused is asked once more; that it refuses again was told already, and is no error here.
        """
        was_told = self.trouble is not None
        try:
            await self._saver.finish()
            if self._retry is not None:
                await self._retry
            if not set(self._troubles) - {"save"} and not self._is_half:
                await self._save_whole()
        except (CheckpointError, OSError):
            if not was_told:
                raise
        finally:
            self._thread.shutdown()
            self._saver.close()
