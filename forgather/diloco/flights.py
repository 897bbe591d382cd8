"""All exchanges of a worker that are under way: the ranks see to them together, wait for them, and take them in."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext

import torch

from forgather.diloco.agreement import Standing, agree
from forgather.diloco.flight import Flight
from forgather.diloco.membership import Membership
from forgather.diloco.settings import Settings
from forgather.distributed.collectives import rank, sum_ranks, world_size
from forgather.errors import ForgatherError, StoppedError, UnavailableError

_POLL_S = 0.01  # between two agreements while the ranks wait together
_REFUSED_TIMES = 10  # as long as for a server that is away, one that cannot take something now is waited for
_SILENT_S = 10.0  # what is waited for longer is said
_ALONE_S = 0.5  # a single rank is woken, and looks only for a wish to stop


Waiting = Callable[[], AbstractContextManager[None]]  # what the training thread is in while it waits


class Flights:
    """The exchanges of a worker by fragment. What waits is collective, and called on the training thread.

    One wait for a server that is out of reach is no longer than `patience_s`, and there is none when `is_stopping`, nor
    for values later than `hurry` allows. `failure` is asked for what went wrong elsewhere, to be raised on all ranks.
    While it waits for values it is within a `waiting()`.
    """

    def __init__(
        self,
        membership: Membership,
        settings: Settings,
        *,
        patience_s: float,
        is_stopping: Callable[[], bool],
        failure: Callable[[], ForgatherError | None],
        waiting: Waiting = nullcontext,
        say: Callable[[str], None],
    ) -> None:
        self.under_way: dict[int, Flight] = {}
        self.wanted_sync_every = 0  # as rank 0 has heard it from the server; 0 for nothing heard
        self.agreed = Standing()  # the last that all ranks know
        self.waited_s = 0.0
        self.bytes_up = 0  # of all ranks, as of the last exchange
        self.bytes_down = 0
        self._membership = membership
        self._settings = settings
        self._patience_ms = 1000 * patience_s
        self._until: float | None = None  # when values are not waited for any more
        self._is_stopping = is_stopping
        self._failure = failure
        self._waiting = waiting
        self._say = say

    def add(self, flight: Flight) -> None:
        """See to this one too."""
        self.under_way[flight.fragment.number] = flight

    def wait_again(self) -> None:
        """Wait also for those that were given up."""
        for flight in self.under_way.values():
            flight.is_overdue = False

    def hurry(self) -> None:
        """Wait for values no longer than for a server: it is to end, and others may have gone and not sent theirs."""
        self._until = time.monotonic() + self._patience_ms / 1000

    def attend(self, step: int, delay: int, *, is_needed: bool = False) -> None:
        """See to what is under way after `step`, and wait for what is due, `delay` steps after it began.

        What has once been waited for in vain is taken in whenever it comes. When it `is_needed`,
        UnavailableError for that, and StoppedError where the run is to stop before.
        """
        with ExitStack() as waiting:
            self._attend(step, delay, waiting, is_needed=is_needed)

    def _attend(self, step: int, delay: int, waiting: ExitStack, *, is_needed: bool) -> None:
        begun, is_waiting, has_said = time.monotonic(), False, False
        while self.under_way:
            standing = self._agree(begun, is_late=self._is_late())
            for flight, version in zip(list(self.under_way.values()), standing.versions, strict=True):
                if version is not None and flight.is_due(step, delay):
                    self._land(flight, step, version)
            awaited = [
                flight for flight in self.under_way.values() if flight.is_due(step, delay) and not flight.is_overdue
            ]
            if not awaited:
                break
            if standing.is_stopping:
                if is_needed:
                    raise StoppedError("the run was told to stop before it had the server's values")
                break
            if standing.away_ms > self._patience_ms:
                self._give_up(awaited, is_needed=is_needed)
                break
            if not is_waiting:  # to the end: the rank whose values came first waits for the others in the agreement
                waiting.enter_context(self._waiting())
                is_waiting = True
            if not has_said and rank() == 0 and time.monotonic() - begun > _SILENT_S:
                self._say(self._what_it_waits_for(awaited[0]))
                has_said = True
            awaited[0].exchange.wait(_POLL_S if world_size() > 1 else _ALONE_S)
        self.waited_s += time.monotonic() - begun

    def _what_it_waits_for(self, flight: Flight) -> str:
        trouble = flight.exchange.trouble
        if trouble is not None:
            return f"waiting: {trouble}"
        if flight.sent is None:
            return f"waiting for the values of {self._membership.address}"
        return (
            f"waiting: round {flight.exchange.round} is not closed yet; `forgather diloco status` says which workers "
            "it waits for"
        )

    def deliver(self) -> bool:
        """Return when the server has all that is under way; says whether it has.

        It has not when the run is to end now, as its checkpoint has it, nor when the server has been out of reach, or
        there and not taken it (its disk is full, say), for too long.
        """
        with self._waiting():
            return self._deliver()

    def _deliver(self) -> bool:
        begun = time.monotonic()
        while self.under_way:
            is_undelivered = not all(flight.exchange.is_delivered for flight in self.under_way.values())
            standing = self._agree(begun, is_undelivered=is_undelivered)
            if not standing.is_undelivered:
                break
            is_refused = standing.refused_ms > _REFUSED_TIMES * self._patience_ms
            if standing.is_stopping or standing.away_ms > self._patience_ms or is_refused:
                return False
            time.sleep(_POLL_S)
        return True

    def close(self) -> None:
        """End all of them, whatever they are doing."""
        for flight in self.under_way.values():
            flight.exchange.close()

    def _agree(self, begun: float, *, is_undelivered: bool = False, is_late: bool = False) -> Standing:
        exchanges = [flight.exchange for flight in self.under_way.values()]
        waited_s = time.monotonic() - begun
        mine = Standing(
            away_ms=int(1000 * min(waited_s, max(exchange.away_s for exchange in exchanges))),
            is_stopping=is_late or self._is_stopping(),
            is_undelivered=is_undelivered,
            refused_ms=int(1000 * min(waited_s, max(exchange.refused_s for exchange in exchanges))),
            sync_every=self.wanted_sync_every if rank() == 0 else 0,
            round_ms=self._round_ms() if rank() == 0 else 0,
        )
        self.agreed = agree(mine, exchanges, self._failure())
        return self.agreed

    def _round_ms(self) -> int:
        """What the server has said of rounds of fixed time; see `Standing`."""
        registered = self._membership.registered
        return 0 if registered is None else 1 + int(1000 * (registered.settings.round_seconds or 0))

    def _is_late(self) -> bool:
        return self._until is not None and time.monotonic() > self._until

    def _land(self, flight: Flight, step: int, version: int) -> None:
        if flight.is_overdue and rank() == 0:
            self._say(f"{self._membership.address} is there again: version {version} is taken in")
        flight.land(step, version, self._settings.alpha)
        del self.under_way[flight.fragment.number]
        traffic = sum_ranks(torch.tensor(self._membership.traffic())).tolist()
        self.bytes_up, self.bytes_down = traffic

    def _give_up(self, awaited: list[Flight], *, is_needed: bool) -> None:
        if is_needed:
            raise UnavailableError(
                f"the server {self._membership.address} has gone before it gave its values",
                fix="see that it runs; the same command begins again",
            )
        for flight in awaited:
            flight.is_overdue = True
        if rank() == 0:
            self._say(
                f"warning: {self._membership.address} is out of reach; training goes on, and what it makes is kept"
            )
