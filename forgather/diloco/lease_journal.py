"""Every lease is on the disk before a worker hears of it, so a server that was killed says the same again.

The server's state is saved with its rounds, and leases are given in between. A worker's ranks ask one by one, so a
lease that is forgotten would be given anew, to one rank other rows than to the next. The journal is a line for each
lease; those that the state has already are passed over, so nothing needs to be cut off.
"""

import json
import os
from pathlib import Path
from typing import Any

from forgather.diloco.messages import parse_json
from forgather.diloco.work_units import Lease, WorkUnits
from forgather.durable import sync


class LeaseJournal:
    """Leases the units of `units` and writes each lease down. One thread at a time."""

    def __init__(self, path: Path, units: WorkUnits) -> None:
        """Takes up what the file at `path` has and `units`, as it was saved, has not."""
        self.path = path
        self.units = units
        if path.exists():
            self._take_up()

    def answer(self, request: Any) -> dict[str, int]:
        """The answer to POST /v1/units; ProtocolError where the request is none, or of another order of data."""
        worker, sequence = self.units.requested(request)
        known = self.units.has_leased(worker, sequence)
        answer = self.units.answer(request)
        if not known:
            self._write(worker, sequence)
        return answer

    def _write(self, worker: str, sequence: int) -> None:
        units = self.units
        lease = units.leased(worker, sequence)
        line = json.dumps(
            [worker, units.run_of(worker), sequence, lease.first, lease.length, units.rows, units.order],
            separators=(",", ":"),
        )
        is_new = not self.path.exists()
        with self.path.open("ab") as file:  # leases are rare: no file is kept open for them
            file.write(f"{line}\n".encode())
            file.flush()
            os.fsync(file.fileno())
        if is_new:
            sync(self.path.parent)

    def _take_up(self) -> None:
        data = self.path.read_bytes()
        whole, _, torn = data.rpartition(b"\n")
        if torn:
            # Nobody has heard of the lease in a line that was not finished.
            os.truncate(self.path, len(data) - len(torn))
        for line in whole.splitlines():
            worker, run, sequence, first, length, rows, order = parse_json(line)
            self.units.restore(worker, run, sequence, Lease(first, length), rows, order)
