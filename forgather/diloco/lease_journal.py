"""Every lease is on the disk before a worker hears of it, so a server that was killed says the same again.

The server's state is saved with its rounds, and leases are given in between. A lease that is forgotten would be given
anew, to another worker perhaps, while the one that had it trains its rows. The journal is a line for each lease, about
one a round of a worker; those that the state has already are passed over, so nothing needs to be cut off.
"""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from forgather.diloco.frame import parse_json
from forgather.diloco.work_units import Lease, Question, WorkUnits
from forgather.durable import sync


class LeaseJournal:
    """Leases the units of `units` and writes each lease down. One thread at a time."""

    def __init__(self, path: Path, units: WorkUnits) -> None:
        """Takes up what the file at `path` has and `units`, as it was saved, has not."""
        self.path = path
        self.units = units
        self._unwritten = b""  # leases of which nobody has heard, as the disk was full
        if path.exists():
            self._take_up()

    def answer(self, request: Any) -> dict[str, list[list[int]]]:
        """The answer to POST /v1/units; ProtocolError where the request is none, or of another order of data."""
        question = Question.from_json(request)
        answer = self.units.lease(question)
        for number in range(answer.num_known, len(answer.leases)):
            self._unwritten += self._line(question, number, answer.leases)
        if self._unwritten:
            self._write()
        return answer.to_json()

    def _line(self, question: Question, number: int, leases: list[Lease]) -> bytes:
        units, lease = self.units, leases[number]
        entry = [
            units.num_given - len(leases) + number + 1,
            question.worker,
            units.run_of(question.worker),
            question.sequence + number,
            lease.first,
            lease.length,
            question.rows,
            question.order,
        ]
        return json.dumps(entry, separators=(",", ":")).encode() + b"\n"

    def _write(self) -> None:
        """Write what is not written, all in one; a line is there whole or, where the disk has no room, not at all."""
        is_new = not self.path.exists()
        before = 0 if is_new else self.path.stat().st_size
        try:
            with self.path.open("ab") as file:  # leases are rare: no file is kept open for them
                file.write(self._unwritten)
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            with suppress(OSError):
                os.truncate(self.path, before)
            raise
        self._unwritten = b""
        if is_new:
            sync(self.path.parent)

    def _take_up(self) -> None:
        data = self.path.read_bytes()
        whole, _, torn = data.rpartition(b"\n")
        if torn:
            # Nobody has heard of the lease in a line that was not finished.
            os.truncate(self.path, len(data) - len(torn))
        for line in whole.splitlines():
            number, worker, run, sequence, first, length, rows, order = parse_json(line)
            question = Question(worker, sequence, rows, order, at_least=length)
            self.units.restore(number, run, question, Lease(first, length))
