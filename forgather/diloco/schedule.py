"""When which fragment has its turn: in each cycle, of so many steps or so many seconds, every fragment once.

Seconds are those of training. The clock begins with the first step and stands still while a worker waits for values: so
workers that have just been given the same values are due together, whenever each of them has come. A clock that ran on
would leave one that came late out of phase for ever, each waiting for the other in turn.
"""

import time
from collections.abc import Mapping
from typing import Any

from forgather.diloco.fragments import due, require_schedule
from forgather.diloco.settings import Settings
from forgather.distributed.collectives import max_ranks, rank


class Schedule:
    """The turns of the fragments under `settings`; the same on every rank of a worker.

    `next_sync_every` and `next_round_seconds` may be set at any time on all ranks: they hold from the next cycle on, or
    by the clock as long as it has had no turn, as a cycle with two lengths would leave a fragment out.
    """

    def __init__(self, settings: Settings) -> None:
        self.num_fragments = len(settings.fragments)
        self.round_seconds = self.next_round_seconds = settings.round_seconds
        require_schedule(settings.sync_every, self.num_fragments)
        self.sync_every = self.next_sync_every = settings.sync_every
        self._begun = 0  # the step after which the cycle began
        self._begun_at: float | None = None  # by a clock that stands still while it waits; None before the first step
        self._num_turns = 0  # of this cycle, by the clock

    def due(self, step: int) -> int | None:
        """The fragment that is exchanged after step `step`. Collective where rounds have a fixed time."""
        if self._begun_at is None:
            self._begun_at = time.monotonic()
        if self.round_seconds is not None:
            if self._num_turns == 0 and self.next_round_seconds is not None:
                self.round_seconds = self.next_round_seconds  # nobody has had a turn yet
            return self._due_by_clock(step, self._begun_at, self.round_seconds)
        fragment = due(step - self._begun, self.sync_every, self.num_fragments)
        if (step - self._begun) % self.sync_every == 0:
            self._begin(step)
        return fragment

    def waited(self, seconds: float) -> None:
        """For so long since `due` was last asked nobody trained."""
        if self._begun_at is not None:
            self._begun_at += seconds

    def _due_by_clock(self, step: int, begun_at: float, seconds: float) -> int | None:
        passed = int((time.monotonic() - begun_at) / seconds * self.num_fragments)
        # Clocks of ranks differ by a little, and rank 0's is the one that counts.
        if max_ranks(passed if rank() == 0 else 0) <= self._num_turns:
            return None
        fragment = self._num_turns
        self._num_turns += 1
        if self._num_turns == self.num_fragments:
            self._begin(step)
        return fragment

    def _begin(self, step: int) -> None:
        self._begun, self._begun_at, self._num_turns = step, time.monotonic(), 0
        self.sync_every = max(self.num_fragments, self.next_sync_every)
        self.round_seconds = self.next_round_seconds

    def state_dict(self) -> dict[str, Any]:
        """Where in its cycle it is; a clock begins anew."""
        return {"begun": self._begun, "sync_every": self.sync_every, "next_sync_every": self.next_sync_every}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._begun = int(state["begun"])
        self.sync_every, self.next_sync_every = int(state["sync_every"]), int(state["next_sync_every"])
