"""Where a worker asks its server for rows, beside the training: from when it has joined until it leaves.

A config makes it before the run knows its server; `diloco.worker` lets it join and leave. Rank 0 asks for all.
"""

import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from forgather.diloco.client import Client, UnknownWorkerError, UnreachableError
from forgather.diloco.membership import Backoff, Membership
from forgather.diloco.work_units import Lease, Question
from forgather.errors import DistributedError, ForgatherError

_SAY_AFTER_S = 10.0  # of waiting for rows that are needed


class News(NamedTuple):
    """What the server has answered."""

    sequence: int  # that was asked for
    leases: Sequence[Lease] = ()
    lost: Sequence[tuple[int, int]] = ()  # ranges of rows that are others' now
    failure: tuple[str, str | None] | None = None  # message and fix: no rows will come


class LeaseDesk:
    """Asks the server for work units, if `is_open`. One question at a time, from one thread."""

    def __init__(self, is_open: bool = False) -> None:
        self.is_open = is_open
        self._membership: Membership | None = None
        self._say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True)
        self._changed = threading.Condition()
        self._has_left = threading.Event()
        self._asking: threading.Thread | None = None
        self._client: Client | None = None
        self._news: News | None = None  # that nobody has heard yet
        self._why: str | None = None  # it was not reached
        self._waiting_since: float | None = None

    @property
    def has_joined(self) -> bool:
        return self._membership is not None

    def join(self, membership: Membership, say: Callable[[str], None] | None = None) -> None:
        """The worker is known to its server from now on."""
        self._membership = membership
        self._say = say or self._say
        self._has_left = threading.Event()

    def leave(self) -> None:
        """Ask nothing any more, and let what is being asked end."""
        self._has_left.set()
        with self._changed:
            thread, client = self._asking, self._client
        if client is not None:
            client.abort()
        if thread is not None:
            thread.join(1.0)  # one that is still connecting will find that it was aborted

    @property
    def sync_every(self) -> int:
        """The server's H, by which a worker asks ahead."""
        assert self._membership is not None, "it has joined"
        assert self._membership.settings is not None, "a worker that has joined knows what holds"
        return self._membership.settings.sync_every

    @property
    def worker(self) -> str:
        """The name that this worker has at its server."""
        assert self._membership is not None, "it has joined"
        return self._membership.request.worker

    def ask(self, question: Question) -> None:
        """Ask for leases, unless something is being asked."""
        with self._changed:
            if self._asking is not None or self._news is not None or self._has_left.is_set():
                return
            # A daemon: a process that ends does not wait for a server that is away.
            self._asking = threading.Thread(target=self._ask, args=(question,), name="diloco leases", daemon=True)
            self._asking.start()

    def hear(self, wait_s: float) -> News | None:
        """What has been answered since this was called last; waits so long for it, where it is needed now."""
        with self._changed:
            self._changed.wait_for(lambda: self._news is not None, wait_s)
            news, self._news = self._news, None
        self._say_whether_waiting(wait_s > 0 and news is None)
        return news

    def _say_whether_waiting(self, is_waiting: bool) -> None:
        if not is_waiting:
            self._waiting_since = None
        elif self._waiting_since is None:
            self._waiting_since = time.monotonic()
        elif time.monotonic() - self._waiting_since > _SAY_AFTER_S:
            why = self._why or "it has not answered yet"
            self._say(
                f"warning: there are no rows to train on until the server leases some ({why}); "
                "this run waits, and can be stopped"
            )
            self._waiting_since = float("inf")  # once is enough

    def _ask(self, question: Question) -> None:
        membership, has_left = self._membership, self._has_left
        assert membership is not None, "nobody asks before"
        client = membership.borrow()
        with self._changed:
            self._client = client
        news: News | None = None
        backoff = Backoff()
        while news is None and not has_left.is_set():
            try:
                news = News(question.sequence, *client.leases(question))
                self._why = None
            except (UnreachableError, UnknownWorkerError) as error:
                if isinstance(error, UnreachableError):
                    membership.note(error)
                self._why = error.message  # both pass: the heartbeats register again
                has_left.wait(backoff.next_s())
            except ForgatherError as error:
                news = News(question.sequence, failure=(error.message, error.fix))
        membership.give_back(client)
        with self._changed:
            self._asking = self._client = None
            self._news = None if has_left.is_set() else news
            self._changed.notify_all()


def not_joined() -> DistributedError:
    """Somebody wants to train on leased rows, and has no server to lease them."""
    return DistributedError(
        "the rows of this run are leased by a DiLoCo server, which it has not joined",
        fix="keep `diloco` among main.hooks; or --no-diloco-leased, and it takes its rows in the order of its seed",
    )
