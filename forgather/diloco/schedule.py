"""When which fragment has its turn: in each cycle, of so many steps or so many seconds, every fragment once."""

import time
from collections.abc import Mapping
from typing import Any

from forgather.diloco.fragments import due, require_schedule
from forgather.diloco.messages import Settings
from forgather.distributed.collectives import max_ranks, rank


class Schedule:
    """The turns of the fragments under `settings`; the same on every rank of a worker.

    `next_sync_every` may be set at any time on all ranks: it holds from the next cycle on, as a cycle with two lengths
    would leave a fragment out.
    """

    def __init__(self, settings: Settings) -> None:
        self.num_fragments = len(settings.fragments)
        self.round_seconds = settings.round_seconds
        require_schedule(settings.sync_every, self.num_fragments)
        self.sync_every = self.next_sync_every = settings.sync_every
        self._begun = 0  # the step after which the cycle began
        self._begun_at = time.monotonic()
        self._num_turns = 0  # of this cycle, by the clock

    def due(self, step: int) -> int | None:
        """The fragment that is exchanged after step `step`. Collective where rounds have a fixed time."""
        if self.round_seconds is not None:
            return self._due_by_clock(step, self.round_seconds)
        fragment = due(step - self._begun, self.sync_every, self.num_fragments)
        if step - self._begun == self.sync_every:
            self._begin(step)
        return fragment

    def _due_by_clock(self, step: int, seconds: float) -> int | None:
        passed = int((time.monotonic() - self._begun_at) / seconds * self.num_fragments)
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

    def state_dict(self) -> dict[str, Any]:
        """Where in its cycle it is; a clock begins anew."""
        return {"begun": self._begun, "sync_every": self.sync_every, "next_sync_every": self.next_sync_every}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._begun = int(state["begun"])
        self.sync_every, self.next_sync_every = int(state["sync_every"]), int(state["next_sync_every"])
