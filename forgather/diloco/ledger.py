"""The work units of a running server: one thread does all that concerns them, in order, and writes leases down.

A lease is on the disk before a worker hears of it, and a disk takes its time: neither the loop that serves everybody
nor the outer step waits for that.
"""

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from forgather.diloco.consumed import require_leased
from forgather.diloco.lease_journal import LeaseJournal
from forgather.diloco.work_units import WorkUnits


class Ledger:
    """Leases units, and hears what becomes of them. `open` comes after a saved state was loaded."""

    def __init__(self, num_units: int) -> None:
        self._units = WorkUnits(num_units)
        self._journal: LeaseJournal | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ledger")
        self.status: dict[str, Any] = self._units.status()  # as it was after the last event

    def open(self, path: Path) -> None:
        """Take up the leases that were given since the state was saved, and write new ones there."""
        self._journal = self._thread.submit(LeaseJournal, path, self._units).result()
        self.status = self._thread.submit(self._units.status).result()

    def begin(self, worker: str, run: str) -> None:
        self._tell(lambda: self._units.begin(worker, run))

    def release(self, worker: str, held: Sequence[Mapping[str, int]] = ()) -> None:
        self._tell(lambda: self._units.release(worker, held))

    def release_all_but(self, workers: Collection[str]) -> None:
        self._tell(lambda: self._units.release_all_but(workers))

    def count(self, worker: str, consumed: Mapping[str, int]) -> None:
        self._tell(lambda: self._units.count(worker, consumed))

    def refuse(self, worker: str, consumed: Mapping[str, int]) -> None:
        self._tell(lambda: self._units.refuse(worker, consumed))

    async def check(self, consumed: Mapping[str, int]) -> None:
        """ProtocolError unless these rows can be counted."""

        def check() -> None:
            require_leased(consumed, self._units.stop)

        await asyncio.get_running_loop().run_in_executor(self._thread, check)

    async def answer(self, request: Any) -> dict[str, list[list[int]]]:
        """The leases that a worker asks for."""
        journal = self._journal
        assert journal is not None, "a server opens its ledger before it serves"
        return await asyncio.get_running_loop().run_in_executor(self._thread, journal.answer, request)

    def state_dict(self) -> dict[str, Any]:
        return self._thread.submit(self._units.state_dict).result()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._thread.submit(self._units.load_state_dict, state).result()

    def close(self) -> None:
        self._thread.shutdown()

    def _tell(self, event: Callable[[], None]) -> None:
        def happen() -> None:
            event()
            self.status = self._units.status()

        self._thread.submit(happen)
