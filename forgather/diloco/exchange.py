"""The exchange of one fragment on one rank: bring what was learned, wait for the new values, take them in.

It runs in a thread of its own and calls no collective. Ranks of a worker may hear different things (a round can be
closed between their parts), so the training thread lets them agree, and `move_to` says what was agreed.

    bringing    PUT, until it is accepted for the round; where that is closed, for the open one, as differences
    waiting     POST values, until there is a version of at least round + 1
    there       the new values are in `values`, verified, and are those of `version`

After a lost connection to a server that may have forgotten it, it is brought again: it counts once.
"""

import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from forgather.diloco.client import CONNECT_S, Answer, UnknownWorkerError, UnreachableError
from forgather.diloco.codec import codec
from forgather.diloco.incoming import read_change, read_values
from forgather.diloco.learned import Learned
from forgather.diloco.local_fragment import LocalFragment, Numbers, Part
from forgather.diloco.membership import Backoff, Membership
from forgather.diloco.messages import Closed, Identity, Version, WantValues
from forgather.errors import DistributedError, TrainingError

WAIT_S = 20.0  # that one request for values waits at the server
_ATTEMPTS = 3  # to get values that are what their digests say

Kind = TypeVar("Kind")


class Exchange:
    """One exchange of `fragment`, in its round `round`; its thread begins with it.

    `parts` is what this rank brings, where that was encoded before a restart; else its part is made of what it has
    `learned`, and sent while it is encoded. Without both, values of at least version `at_least` are fetched, and with
    nothing to fetch either the rank is an onlooker.
    """

    def __init__(
        self,
        fragment: LocalFragment,
        membership: Membership,
        round: int,
        *,
        at_least: int | None = None,
        parts: Sequence[Part] = (),
        learned: Learned | None = None,
        is_async: bool = False,
    ) -> None:
        self.fragment = fragment
        self.round = round
        self.agreed_round = round  # as all ranks of the worker know it
        self.parts = list(parts)
        self.values: Numbers = fragment.room()
        self.version: Version | None = None  # of `values`, once they are there
        self.durable = 0
        self.failure: Exception | None = None
        self.trouble: str | None = None  # why the server does not answer now, or takes nothing
        self.has_parts = bool(parts) or learned is None
        self.is_onlooker = not fragment.owned and not parts
        self._membership = membership
        self._at_least = round + 1 if at_least is None else at_least
        self._learned = None if self.is_onlooker else learned
        self._encoding: threading.Thread | None = None
        self._is_async = is_async
        self._accepted: tuple[int, str] | None = None  # for which round, and by which process of the server
        self._offered: dict[Identity, bool] = {}  # what was kept and brought to a server that came back: was it taken?
        self._offered_to = ""
        self._changed = threading.Condition()
        self._is_closed = False
        self._is_asking = False
        self._lost_at: float | None = None
        self._refused_at: float | None = None
        self._backoff = Backoff()
        self._takes_change = fragment.version is not None
        self._num_unsound = 0
        self._client = membership.borrow()
        self._thread = threading.Thread(target=self._run, name=f"diloco exchange {fragment.number}", daemon=True)
        if not self.is_onlooker:
            self._thread.start()

    @property
    def number(self) -> int | None:
        """The number of the version whose values are there; None as long as none are. Onlookers have number 0."""
        with self._changed:
            if self.is_onlooker:
                return 0
            return None if self.version is None else self.version.number

    @property
    def is_delivered(self) -> bool:
        """Whether the server has this rank's parts of the round that the exchange is in."""
        with self._changed:
            return self.has_parts and (not self.parts or self._is_accepted)

    @property
    def away_s(self) -> float:
        """For how long the server has not been reached."""
        lost_at = self._lost_at
        return 0.0 if lost_at is None else time.monotonic() - lost_at

    @property
    def refused_s(self) -> float:
        """For how long the server has answered that it cannot take or give anything now."""
        refused_at = self._refused_at
        return 0.0 if refused_at is None else time.monotonic() - refused_at

    def move_to(self, round: int, at_least: int) -> None:
        """The worker is in round `round` and takes a version of `at_least`, as another of its ranks has heard."""
        with self._changed:
            has_moved = round > self.round
            self.round = max(round, self.round)
            self._at_least = max(self._at_least, at_least, self.round + 1 if has_moved else 0)
            is_short = self.version is not None and self.version.number < self._at_least
            if has_moved or is_short:
                self.version = None
                if self._is_asking:
                    self._client.interrupt()
                self._changed.notify_all()

    def wait(self, timeout_s: float) -> None:
        """Return when the values are there or something went wrong, or after a while."""
        with self._changed:
            if self.version is None and self.failure is None:
                self._changed.wait(timeout_s)

    def encoded(self) -> Sequence[Part]:
        """The parts, for the round that all ranks know, when anchor and residual fit together with them.

        Raises what kept them from being made: without them nobody could send the contribution again.
        """
        with self._changed:
            while not self.has_parts and self.failure is None:
                self._changed.wait()
            if not self.has_parts and self.failure is not None:
                raise self.failure
            parts = [part.moved_to(self.agreed_round) for part in self.parts]
        for part in parts:
            part.payload.wait()
        return parts

    def close(self) -> None:
        """End it, whatever it is doing."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
            is_done = self.version is not None or self.is_onlooker
        if not is_done:
            self._client.abort()
        if self._thread.ident is not None:
            self._thread.join(CONNECT_S + 1)  # one that is just connecting is left to itself
        if self._encoding is not None:
            self._encoding.join()
        self._membership.give_back(self._client)

    def _run(self) -> None:
        try:
            with torch.no_grad():
                self._make_part()
                while self._has_work():
                    if self.parts and not self._is_accepted:
                        self._bring()
                    elif self.fragment.owned:
                        self._fetch()
                    else:
                        self._see_nothing()
        except Exception as error:  # noqa: BLE001  raised by the training thread, on all ranks
            with self._changed:
                self.failure = None if self._is_closed else error
                self._changed.notify_all()

    def _make_part(self) -> None:
        if self._learned is not None and not self.has_parts:
            part = self._learned.part(self.round, as_differences=self._is_async)
            # Beside the network: it is sent as it is made, and a checkpoint waits for the making alone.
            self._encoding = threading.Thread(target=self._write, args=(self._learned, part), daemon=True)
            self._encoding.start()
            with self._changed:
                self.parts = [part]
                self.has_parts = True
                self._changed.notify_all()

    def _write(self, learned: Learned, part: Part) -> None:
        learned.write(part)
        try:
            part.payload.wait()
        except Exception as error:  # noqa: BLE001  raised by the training thread, on all ranks
            with self._changed:
                self.failure = self.failure or error
                self._changed.notify_all()

    def _has_work(self) -> bool:
        """Wait while the values are there; False when it is over."""
        with self._changed:
            while self.version is not None and not self._is_closed:
                self._changed.wait()
            return not self._is_closed

    @property
    def _is_accepted(self) -> bool:
        # Another process at the server's address may have forgotten all that was brought before.
        return self._accepted == (self.round, self._membership.server)

    def _bring(self) -> None:
        """Bring the parts for the round that it is in; whoever calls looks whether that was enough."""
        server = self._membership.server
        with self._changed:
            round = self.round
        for part in [each.moved_to(round) for each in self.parts]:
            answer = self._persist(lambda part=part: self._send(part), round)  # type: ignore[misc]
            if answer is None:
                return
            if isinstance(answer, Closed):
                self._readdress(answer.open, round)
                return
            # It may be counted already, and not be wanted whole; but it is kept, and made of an anchor that then goes.
            part.payload.wait()
        with self._changed:
            self._accepted = (round, server)
            self._changed.notify_all()

    def _send(self, part: Part) -> object:
        return self._client.send(part.identity, part.header, part.payload)

    def _readdress(self, open: Version, round: int) -> None:
        """Its round was closed without it, or is not open yet: the server came back from an older state."""
        if open.number < round or self._is_async:
            wanted = self._kept_for(open, round)
            for part in wanted:
                if part.identity not in self._offered:
                    answer = self._persist(lambda part=part: self._send(part), round)  # type: ignore[misc]
                    if answer is None:
                        return
                    self._offered[part.identity] = not isinstance(answer, Closed)
                    self._pause()
                    return
            if not self._is_async and any(self._offered[part.identity] for part in wanted):
                self._pause()  # the round is made again with it
                return
        if any(part.header.content == "values" for part in self.parts):
            assert self._learned is not None, "values are fp32, which is encoded anew on any mesh"
            self.parts = [part := self._learned.part(open.number, as_differences=True)]
            self._learned.write(part)
        elif open.number == round:
            self._pause()
        with self._changed:
            self.round = open.number
            self._at_least = open.number + 1

    def _kept_for(self, open: Version, round: int) -> list[Part]:
        """What was counted before, and the server that has come back may make version `open` + 1 of again.

        An asynchronous one has contributions of earlier rounds too.
        """
        if self._offered_to != self._membership.server:
            self._offered, self._offered_to = {}, self._membership.server
        older = [part for part in self.fragment.kept if part.identity.round < round]
        return older if self._is_async else [part for part in older if part.identity.round == open.number]

    def _fetch(self) -> None:
        """Ask for the values once."""
        with self._changed:
            at_least, round = self._at_least, self.round
            self._is_asking = True
        have = self.fragment.version if self._takes_change else None
        # An asynchronous server may make versions of others' contributions before this one's turn.
        counted = round if self._is_async and self.parts else None
        want = WantValues(self.fragment.slices, at_least, have, WAIT_S, counted)
        try:
            with self._client.values(self.fragment.number, want) as answer:
                self._found()
                if answer is None:
                    return
                is_sound = self._read(answer)
                version, durable = answer.header.version, answer.header.durable
        except UnknownWorkerError:
            self._persist(lambda: self._membership.register(self._client, self._membership.times), round)
            return
        except UnreachableError as error:
            self._lose(error, round)
            return
        finally:
            with self._changed:
                self._is_asking = False
        if not is_sound:
            self._takes_change = False  # the values themselves will tell which of us is wrong
            self._num_unsound += 1
            if self._num_unsound >= _ATTEMPTS:
                raise TrainingError(
                    f"the values of fragment {self.fragment.number} were not what the server's digests say, "
                    f"{_ATTEMPTS} times in a row",
                    fix="look for failing memory on this machine, on the server, or on what is between them",
                )
            return
        with self._changed:
            if version.number >= self._at_least:
                self.version, self.durable = version, durable
                self._changed.notify_all()

    def _lose(self, error: UnreachableError, round: int) -> None:
        """The connection is gone, and with it perhaps the server that was brought something."""
        with self._changed:
            if self._is_closed or self.round != round:
                return  # it was given up on purpose
        self._missed(error)
        self._pause()
        self._persist(lambda: self._membership.register(self._client), round)

    def _see_nothing(self) -> None:
        """Parts of another mesh were brought by a rank that owns nothing of the fragment on this one."""
        with self._changed:
            self.version = Version(0, "")
            self._changed.notify_all()

    def _read(self, answer: Answer) -> bool:
        """Fill `values`; whether they are what the digests say."""
        header = answer.header
        if header.content == "change" and not self._takes_change:
            raise DistributedError(
                "the server's answer is not what was asked for",
                fix="install the same version of forgather on all machines",
            )
        decoder = codec(header.codec)
        found: list[bytes] = []
        scratch: list[Tensor] = []
        for holding in self.fragment.owned:
            name = holding.slice.name
            if header.content == "change":
                anchor = self.fragment.anchor[name]
                values = self.values[name]
                found.append(read_change(answer, decoder, holding.shape, holding.slice, anchor, values, scratch))
            else:
                found.append(read_values(answer, self.values[name]))
        return found == answer.digests(len(found))

    def _persist(self, call: Callable[[], Kind], round: int) -> Kind | None:
        """What `call` gives, however often the network fails; None when it is over, or the round another."""
        num_unknown = 0
        while True:
            with self._changed:
                if self._is_closed or self.round != round:
                    return None
            try:
                given = call()
            except UnreachableError as error:
                self._missed(error)
            except UnknownWorkerError:
                num_unknown += 1
                if num_unknown > _ATTEMPTS:
                    raise
                self._register_again()
            else:
                self._found()
                return given
            self._pause()

    def _register_again(self) -> None:
        try:
            self._membership.register(self._client, self._membership.times)
        except UnreachableError as error:
            self._missed(error)

    def _found(self) -> None:
        self.trouble = None
        self._lost_at = self._refused_at = None
        self._backoff.reset()

    def _missed(self, error: UnreachableError) -> None:
        self.trouble = error.message
        self._membership.note(error)
        if error.is_there:
            self._lost_at, self._refused_at = None, self._refused_at or time.monotonic()
        else:
            self._lost_at, self._refused_at = self._lost_at or time.monotonic(), None

    def _pause(self) -> None:
        with self._changed:
            if not self._is_closed:
                self._changed.wait(self._backoff.next_s())
