"""Which exchanges a worker's steps bring about: the first, those that a restart cut short, those due, and the last.

All of it is collective and on the training thread.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from forgather.diloco.exchange import Exchange
from forgather.diloco.flight import Flight, take_off
from forgather.diloco.flights import Flights
from forgather.diloco.local_fragment import LocalFragment
from forgather.diloco.membership import Membership
from forgather.diloco.schedule import Schedule
from forgather.diloco.settings import Settings
from forgather.diloco.worker_state import Restored
from forgather.distributed import collectives

Consumed = Callable[[int, int], Mapping[str, int]]


class Turns:
    """The exchanges of `fragments`, by the `schedule`; `flights` sees to those that are under way.

    `num_rows` and `consumed` say which rows of the data have been trained on; `rows` is how many when each was sent.
    """

    def __init__(
        self,
        fragments: Sequence[LocalFragment],
        schedule: Schedule,
        flights: Flights,
        membership: Membership,
        settings: Settings,
        *,
        tokens_per_step: int,
        rows: Mapping[int, int],
        num_rows: Callable[[], int],
        consumed: Consumed | None,
    ) -> None:
        self.fragments = fragments
        self.schedule = schedule
        self.flights = flights
        self.rows = dict(rows)
        self._membership = membership
        self._settings = settings
        self._tokens_per_step = tokens_per_step
        self._num_rows = num_rows
        self._consumed = consumed

    def begin_anew(self, step: int) -> None:
        """Begin with the values that the server has now."""
        assert self._membership.registered is not None, "without a checkpoint the server has answered"
        for fragment, version in zip(self.fragments, self._membership.registered.versions, strict=True):
            exchange = Exchange(fragment, self._membership, version.number, at_least=version.number)
            self.flights.add(Flight(fragment, exchange, step))
        self.flights.attend(step, 0, is_needed=True)

    def go_on(self, restored: Restored) -> None:
        """Take up the exchanges that were under way when the checkpoint was saved."""
        for key, saved in restored.flights.items():
            number = int(key)
            is_same = collectives.agree(restored.is_of_this_mesh(number))
            # fp32 is encoded again, from the same numbers; what a codec has made, its losses noted, is sent as it is.
            is_exact = self.fragments[number].upload == "fp32"
            self._take_off(
                number,
                saved,
                sent=restored.sent[number],
                parts=() if is_exact else restored.parts.get(number, ()),
                is_encoded_elsewhere=not is_same and not is_exact,
            )

    def after_step(self, step: int) -> None:
        """Begin what is due after `step`, and see to what is under way."""
        due = self.schedule.due(step)
        waited_s = self.flights.waited_s
        delay = self._settings.delay
        if due in self.flights.under_way:
            self.flights.attend(step, delay)
        if due is not None and due not in self.flights.under_way:
            self._begin(due, step)  # what is under way even now keeps its turn; what was made since goes with the next
        self.flights.attend(step, delay)
        self.schedule.waited(self.flights.waited_s - waited_s)
        wanted = self.flights.agreed
        self.schedule.next_sync_every = wanted.sync_every or self.schedule.next_sync_every
        if wanted.round_ms:
            self.schedule.next_round_seconds = wanted.round_seconds

    def settle(self, step: int) -> None:
        """Wait for all that is under way, also what was given up, and take it in."""
        self.flights.wait_again()
        self.flights.attend(step, 0)

    def send_rest(self, step: int) -> None:
        """Send what was learned since each fragment was last sent. One that is still under way keeps its own."""
        for fragment in self.fragments:
            if step > fragment.since and fragment.number not in self.flights.under_way:
                self._begin(fragment.number, step)

    def num_unsent(self, step: int) -> int:
        """Of how many steps something was not sent yet."""
        return max(step - fragment.since for fragment in self.fragments)

    def _begin(self, number: int, step: int) -> None:
        """Send what was learned since the fragment was last sent."""
        fragment = self.fragments[number]
        steps = step - fragment.since
        rows, before = self._num_rows(), self.rows.get(number, 0)
        saved = {
            "round": fragment.number_of_version,
            "begun": step,
            "tokens": max(1, steps * self._tokens_per_step),
            "steps": steps,
            # Each row is told of once: with the first of the fragments.
            "consumed": {} if self._consumed is None or number > 0 else self._consumed(before, rows),
        }
        self._take_off(number, saved, sent=fragment.snapshot())
        fragment.since, self.rows[number] = step, rows

    def _take_off(self, number: int, saved: Mapping[str, Any], **others: Any) -> None:
        self.flights.add(take_off(self.fragments[number], self._membership, self._settings, **saved, **others))
