"""All exchanges of a worker that are under way: the ranks see to them together, wait for them, and take them in."""

import time
from collections.abc import Callable

import torch

from forgather.diloco.agreement import Standing, agree
from forgather.diloco.flight import Flight
from forgather.diloco.membership import Membership
from forgather.diloco.messages import Settings
from forgather.distributed.collectives import rank, sum_ranks, world_size
from forgather.errors import DistributedError, ForgatherError

_POLL_S = 0.01  # between two agreements while the ranks wait together
_ALONE_S = 0.5  # a single rank is woken, and looks only for a wish to stop


class Flights:
    """The exchanges of a worker by fragment. What waits is collective, and called on the training thread.

    One wait for a server that is out of reach is no longer than `patience_s`, and there is none when `is_stopping`.
    `failure` is asked for what went wrong elsewhere, to be raised on all ranks.
    """

    def __init__(
        self,
        membership: Membership,
        settings: Settings,
        *,
        patience_s: float,
        is_stopping: Callable[[], bool],
        failure: Callable[[], ForgatherError | None],
        say: Callable[[str], None],
    ) -> None:
        self.under_way: dict[int, Flight] = {}
        self.wanted_sync_every = 0  # as rank 0 has heard it from the server; 0 for nothing heard
        self.agreed_sync_every = 0  # as all ranks know it
        self.waited_s = 0.0
        self.bytes_up = 0  # of all ranks, as of the last exchange
        self.bytes_down = 0
        self._membership = membership
        self._settings = settings
        self._patience_ms = 1000 * patience_s
        self._is_stopping = is_stopping
        self._failure = failure
        self._say = say

    def add(self, flight: Flight) -> None:
        """See to this one too."""
        self.under_way[flight.fragment.number] = flight

    def wait_again(self) -> None:
        """Wait also for those that were given up."""
        for flight in self.under_way.values():
            flight.is_overdue = False

    def attend(self, step: int, delay: int, *, is_needed: bool = False) -> None:
        """See to what is under way after `step`, and wait for what is due, `delay` steps after it began.

        What has once been waited for in vain is taken in whenever it comes. DistributedError when it `is_needed`.
        """
        begun = time.monotonic()
        while self.under_way:
            standing = self._agree(begun)
            for flight, version in zip(list(self.under_way.values()), standing.versions, strict=True):
                if version is not None and flight.is_due(step, delay):
                    self._land(flight, step, version)
            awaited = [
                flight for flight in self.under_way.values() if flight.is_due(step, delay) and not flight.is_overdue
            ]
            if not awaited or (standing.is_stopping and not is_needed):
                break
            if standing.away_ms > self._patience_ms:
                self._give_up(awaited, is_needed=is_needed)
                break
            awaited[0].exchange.wait(_POLL_S if world_size() > 1 else _ALONE_S)
        self.waited_s += time.monotonic() - begun

    def deliver(self) -> None:
        """Return when the server has all that is under way, or has been out of reach for too long."""
        begun = time.monotonic()
        while self.under_way:
            is_undelivered = not all(flight.exchange.is_delivered for flight in self.under_way.values())
            standing = self._agree(begun, is_undelivered=is_undelivered)
            if not standing.is_undelivered or standing.away_ms > self._patience_ms:
                return
            time.sleep(_POLL_S)

    def close(self) -> None:
        """End all of them, whatever they are doing."""
        for flight in self.under_way.values():
            flight.exchange.close()

    def _agree(self, begun: float, *, is_undelivered: bool = False) -> Standing:
        exchanges = [flight.exchange for flight in self.under_way.values()]
        away_s = min(max(exchange.away_s for exchange in exchanges), time.monotonic() - begun)
        wanted = self.wanted_sync_every if rank() == 0 else 0
        mine = Standing(int(1000 * away_s), self._is_stopping(), is_undelivered, wanted)
        standing = agree(mine, exchanges, self._failure())
        self.agreed_sync_every = standing.sync_every or self.agreed_sync_every
        return standing

    def _land(self, flight: Flight, step: int, version: int) -> None:
        flight.land(step, version, self._settings.alpha)
        del self.under_way[flight.fragment.number]
        traffic = sum_ranks(torch.tensor(self._membership.traffic())).tolist()
        self.bytes_up, self.bytes_down = traffic

    def _give_up(self, awaited: list[Flight], *, is_needed: bool) -> None:
        if is_needed:
            raise DistributedError(
                f"the server {self._membership.address} has gone before it gave its values",
                fix="see that it runs; the same command begins again",
            )
        for flight in awaited:
            flight.is_overdue = True
        if rank() == 0:
            self._say(
                f"warning: {self._membership.address} is out of reach; training goes on, and what it makes is kept"
            )
