"""What a worker has from when it has joined a server to when it leaves: heartbeats, exchanges, and its orders.

The end of it is bounded: whatever state the server is in, `close` returns.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from forgather.diloco.farewell import let_server_save, take_leave
from forgather.diloco.flights import Flights, Waiting
from forgather.diloco.local_fragment import LocalFragment
from forgather.diloco.membership import Heartbeats, Membership
from forgather.diloco.presence import Beat, Command
from forgather.diloco.pulse import Pulse
from forgather.diloco.schedule import Schedule
from forgather.diloco.settings import Settings
from forgather.diloco.turns import Turns
from forgather.distributed.collectives import max_ranks, rank
from forgather.errors import DistributedError, ForgatherError

_ORDERS: Mapping[Command, str] = {
    "save": "save",
    "stop": "save and stop: an operator has removed it, or has commanded that",
    "drain": "send what it has made, save and stop",
    "abort": "end at once",
}


class Session:
    """One worker at one server, under its `settings`. `turns` are its exchanges, made with `others`; see `Turns`."""

    def __init__(
        self,
        membership: Membership,
        settings: Settings,
        fragments: Sequence[LocalFragment],
        schedule: Schedule,
        pulse: Pulse,
        *,
        patience_s: float,
        is_stopping: Callable[[], bool],
        waiting: Waiting,
        say: Callable[[str], None],
        **others: Any,
    ) -> None:
        membership.settings = settings
        self.membership = membership
        self.pulse = pulse
        self._is_stopping = is_stopping
        self._say = say
        self._heartbeats: Heartbeats | None = None
        self._was_told = False
        self.flights = Flights(
            membership,
            settings,
            patience_s=patience_s,
            is_stopping=self.is_told_to_end,
            failure=self._failure,
            waiting=waiting,
            say=say,
        )
        self.turns = Turns(fragments, schedule, self.flights, membership, settings, **others)
        if rank() == 0 and settings.heartbeat_s > 0:
            self._heartbeats = Heartbeats(membership, settings.heartbeat_s, pulse.tell, self._hear)

    def is_told_to_end(self) -> bool:
        """Whether nothing is to be waited for: a signal, or the server, wants the run to end."""
        return self._is_stopping() or self.pulse.is_called_off or self.membership.is_removed

    def require_place(self) -> None:
        """DistributedError where this worker was told to end, and has made another step since. Collective."""
        was_told, self._was_told = self._was_told, bool(max_ranks(int(self.is_told_to_end())))
        if was_told:
            raise DistributedError(
                f"the worker {self.membership.request.worker} is to end: it was removed, or told to stop",
                fix="save what is to be kept, and end; a loop hears it in time by `if diloco.wants_stop(): break`",
            )

    def deliver(self, *, is_finished: bool) -> None:
        """See that the server has what it was sent, and keeps it, as far as that can be had. Collective.

        One that `is_finished` will not be there to send it again; one that is told to end has it in its checkpoint.
        """
        is_delivered = self.flights.deliver()
        is_kept = not max_ranks(int(any(fragment.kept for fragment in self.turns.fragments)))
        if rank() > 0 or (self.is_told_to_end() and not is_finished):
            return
        if not is_delivered:
            self._say(
                "warning: the server has not got all that this run has made; its checkpoint has it, and the same "
                "command, with more steps where all are made, brings it"
            )
        elif is_finished and not is_kept:
            let_server_save(self.membership, self.is_told_to_end, self._say)

    def close(self) -> None:
        """End all exchanges and heartbeats, whatever they are doing."""
        self.flights.close()
        if self._heartbeats is not None:
            self._heartbeats.close()

    def _failure(self) -> ForgatherError | None:
        return None if self._heartbeats is None else self._heartbeats.failure

    def _hear(self, beat: Beat) -> None:
        if self.pulse.hear(beat) and beat.command is not None:
            self._say(f"{self.membership.address} tells this worker to {_ORDERS[beat.command]}")
        self.flights.wanted_sync_every = beat.sync_every
        if beat.command == "drain":
            self.flights.hurry()


def leave(membership: Membership, say: Callable[[str], None]) -> None:
    """Be no worker of the server any more, as far as one has become one."""
    if rank() == 0 and membership.registered is not None:
        take_leave(membership, say)
    membership.close()
