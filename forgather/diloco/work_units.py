"""Which worker trains which rows: the global order of samples, leased in units, and the ledger of what became of them.

Row g of a run is row g % L of epoch g // L, L the rows of an epoch; a worker turns it into a block by the order that
all workers have. An epoch is cut into K units: unit u begins at row u * L // K. A worker asks for its 0th, 1st, 2nd ...
lease, and is told the same each time that it asks for the same one, so each rank of it may ask for itself, and a
restarted one goes on with the rows that it had.

Each row is in one place: trained (a contribution that counted holds it), leased to one worker, taken back from one that
is gone, or not leased yet. What was taken back is leased again before anything new. An evicted worker that comes back
may have trained rows that another has as well; both count, and the ledger says `repeated`.

Nothing here waits, writes or knows a network; `lease_journal` keeps the leases.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from forgather.diloco.messages import WORKER_NAME, ProtocolError
from forgather.diloco.spans import Spans
from forgather.errors import ConfigError


@dataclass(frozen=True)
class Lease:
    """Rows first .. first + length - 1 of the run, all of one unit."""

    first: int
    length: int

    @property
    def stop(self) -> int:
        return self.first + self.length


class WorkUnits:
    """Leases the rows of epoch after epoch, each row once as long as no worker is lost."""

    def __init__(self, num_units: int) -> None:
        if num_units < 1:
            raise ConfigError(f"an epoch cannot be cut into {num_units} units", fix="use 1 or more, 1024 say")
        self.num_units = num_units
        self.rows: int | None = None  # of an epoch; what the first worker that asks says
        self.order: str | None = None  # which order the rows are of: the same on all workers
        self.num_repeated = 0
        self._next_unit = 0  # over the epochs
        self._leases: dict[str, dict[int, Lease]] = {}
        self._open: dict[str, Spans] = {}  # leased to this worker, and not counted
        self._trained = Spans()
        self._returned = Spans()  # taken back, to be leased again
        self._vain: dict[str, Spans] = {}  # this worker had them, and its work on them has not counted
        self._num_vain = 0  # the same, of runs whose name another has now
        self._runs: dict[str, list[str]] = {}  # of each worker, oldest first

    def requested(self, request: Any) -> tuple[str, int]:
        """Whose lease is asked for, and which; ProtocolError where this is no request for one."""
        match request:
            case {"worker": str(worker), "sequence": int(sequence), "rows": int(rows), "order": str()} if (
                WORKER_NAME.fullmatch(worker) and 0 <= sequence < 2**62 and 1 <= rows < 2**62
            ):
                return worker, sequence
        raise ProtocolError("a request for a unit says worker, sequence, rows (of an epoch) and order")

    def answer(self, request: Any) -> dict[str, int]:
        """The answer to a worker's request for a lease: the body of POST /v1/units."""
        worker, sequence = self.requested(request)
        return self.describe_lease(self.lease(worker, sequence, request["rows"], request["order"]))

    def describe_lease(self, lease: Lease) -> dict[str, int]:
        """A lease as a worker is told it: `start` is a row of the epoch, `unit` goes on over the epochs."""
        assert self.rows is not None, "there is a lease"
        epoch, start = divmod(lease.first, self.rows)
        # The last unit that begins at this row or before: u * L // K <= start is u < (start + 1) * K / L.
        unit = ((start + 1) * self.num_units - 1) // self.rows
        return {"unit": epoch * self.num_units + unit, "start": start, "length": lease.length, "epoch": epoch}

    def lease(self, worker: str, sequence: int, rows: int, order: str) -> Lease:
        """The sequence-th lease of a worker. `rows` and `order` must be those of the first worker that asked."""
        self._require_same(rows, order)
        if self.has_leased(worker, sequence):
            self._reclaim(worker, self.leased(worker, sequence))
        else:
            self._give(worker, sequence, self._next_lease())
        return self.leased(worker, sequence)

    def leased(self, worker: str, sequence: int) -> Lease:
        """A lease that was given."""
        return self._leases[worker][sequence]

    def has_leased(self, worker: str, sequence: int) -> bool:
        return sequence in self._leases.get(worker, {})

    def run_of(self, worker: str) -> str:
        """What `begin` was told last of this worker."""
        return self._runs.get(worker, [""])[-1]

    def begin(self, worker: str, run: str) -> None:
        """The worker has come: for the first time, back, or as another run (a name of its own) that has its name now.

        What was taken from one that is back, and has not been leased again, is its own as before. Another run begins
        with its 0th lease, and what the old one had open is taken back.
        """
        if self.run_of(worker) == run:
            for lease in self._leases.get(worker, {}).values():
                self._reclaim(worker, lease)
            return
        self.release(worker)
        self._leases.pop(worker, None)
        self._num_vain += len(self._vain.pop(worker, Spans()))
        self._runs.setdefault(worker, []).append(run)

    def restore(self, worker: str, run: str, sequence: int, lease: Lease, rows: int, order: str) -> None:
        """Take up a lease that was given after this state was saved; one that is known already stays as it is."""
        self._require_same(rows, order)
        if run != self.run_of(worker):
            if run in self._runs.get(worker, []):
                return  # that run is over
            self.begin(worker, run)
        if not self.has_leased(worker, sequence):
            self._give(worker, sequence, lease)

    def check(self, consumed: Mapping[str, int]) -> None:
        """ProtocolError unless a contribution's `consumed` can be counted: {first row of the run: rows}."""
        for first, length in consumed.items():
            if not (first.isascii() and first.isdigit() and len(first) < 20 and 1 <= length < 2**62):
                raise ProtocolError("`consumed` of a contribution is not {first row: number of rows}", status=422)

    def count(self, worker: str, consumed: Mapping[str, int]) -> None:
        """A contribution of this worker counted, and holds these rows."""
        for first, stop in _ranges(consumed):
            self.num_repeated += self._trained.add(first, stop)
            self._returned.remove(first, stop)
            for spans in (self._open.get(worker), self._vain.get(worker)):
                if spans is not None:
                    spans.remove(first, stop)

    def refuse(self, worker: str, consumed: Mapping[str, int]) -> None:
        """A contribution with these rows will never count, as one with NaN: others are to train them."""
        for first, stop in _ranges(consumed):
            self._take_back(worker, first, stop)

    def release(self, worker: str) -> None:
        """The worker has left or is dead: what it has not brought in is leased again. Known leases stay its own."""
        for first, stop in self._open.get(worker, Spans()):
            self._take_back(worker, first, stop)

    def status(self) -> dict[str, Any]:
        """The ledger in numbers of rows.

        `lost` were leased to workers that left, died or were refused before their work on them counted: at most so many
        were trained in vain. They are trained all the same, by others.
        """
        return {
            "units": self.num_units,
            "rows": self.rows,
            "epoch": len(self._trained) / self.rows if self.rows else 0.0,
            "leased": sum(map(len, self._open.values())),
            "taken_back": len(self._returned),
            "trained": len(self._trained),
            "repeated": self.num_repeated,
            "lost": sum(map(len, self._vain.values())) + self._num_vain,
        }

    def state_dict(self) -> dict[str, Any]:
        """The ledger as JSON."""
        return {
            "num_units": self.num_units,
            "rows": self.rows,
            "order": self.order,
            "num_repeated": self.num_repeated,
            "next_unit": self._next_unit,
            "leases": {
                worker: [[sequence, lease.first, lease.length] for sequence, lease in leases.items()]
                for worker, leases in self._leases.items()
            },
            "open": {worker: spans.to_json() for worker, spans in self._open.items()},
            "trained": self._trained.to_json(),
            "returned": self._returned.to_json(),
            "vain": {worker: spans.to_json() for worker, spans in self._vain.items()},
            "num_vain": self._num_vain,
            "runs": {worker: list(runs) for worker, runs in self._runs.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where a ledger stood; ConfigError where an epoch was cut into another number of units."""
        if state["num_units"] != self.num_units:
            raise ConfigError(
                f"this server's state has {state['num_units']} work units an epoch, not {self.num_units}",
                fix=f"keep --work-units {state['num_units']}; it cannot change within a run",
            )
        self.rows, self.order = state["rows"], state["order"]
        self.num_repeated, self._next_unit = state["num_repeated"], state["next_unit"]
        self._leases = {
            worker: {sequence: Lease(first, length) for sequence, first, length in leases}
            for worker, leases in state["leases"].items()
        }
        self._open = {worker: Spans.from_json(spans) for worker, spans in state["open"].items()}
        self._trained = Spans.from_json(state["trained"])
        self._returned = Spans.from_json(state["returned"])
        self._vain = {worker: Spans.from_json(spans) for worker, spans in state["vain"].items()}
        self._num_vain = state["num_vain"]
        self._runs = {worker: list(runs) for worker, runs in state["runs"].items()}

    def _require_same(self, rows: int, order: str) -> None:
        if self.rows is None or self.order is None:
            self.rows, self.order = rows, order
        if (rows, order) != (self.rows, self.order):
            raise ProtocolError(
                f"the units are of {self.order} with {self.rows:,} rows an epoch; "
                f"this worker has {order} with {rows:,} rows",
                status=422,
                fix="give all workers the same dataset, block_length and seed, or start the server with --work-units 0",
            )

    def _next_lease(self) -> Lease:
        """What is leased next: the lowest rows that were taken back, otherwise the next unit's."""
        for first, stop in self._returned:
            return self._within_unit(first, stop)
        while True:
            first, stop = self._bounds(self._next_unit)
            # A server that came back from an older state may have counted rows of units that it has not leased since.
            free = self._taken(first, stop).first_outside(first, stop)
            if free is not None:
                return Lease(free[0], free[1] - free[0])
            self._next_unit += 1

    def _taken(self, first: int, stop: int) -> Spans:
        """Which of these rows are trained, leased, or lie ready to be leased again."""
        taken = Spans()
        for spans in (self._trained, self._returned, *self._open.values()):
            for left, right in spans.within(first, stop):
                taken.add(left, right)
        return taken

    def _within_unit(self, first: int, stop: int) -> Lease:
        """The part of these rows that is in the unit of the first."""
        assert self.rows is not None, "rows were leased"
        epoch, start = divmod(first, self.rows)
        unit = ((start + 1) * self.num_units - 1) // self.rows
        return Lease(first, min(stop, self._bounds(epoch * self.num_units + unit)[1]) - first)

    def _bounds(self, unit: int) -> tuple[int, int]:
        assert self.rows is not None, "a worker has said how many rows there are"
        epoch, number = divmod(unit, self.num_units)
        begin = epoch * self.rows
        return (
            begin + number * self.rows // self.num_units,
            begin + (number + 1) * self.rows // self.num_units,
        )

    def _give(self, worker: str, sequence: int, lease: Lease) -> None:
        self._leases.setdefault(worker, {})[sequence] = lease
        self._returned.remove(lease.first, lease.stop)
        self._open.setdefault(worker, Spans()).add(lease.first, lease.stop)

    def _take_back(self, worker: str, first: int, stop: int) -> None:
        """Of these rows, those that the worker has open are to be leased again."""
        for left, right in list(self._open.get(worker, Spans()).within(first, stop)):
            self._open[worker].remove(left, right)
            self._vain.setdefault(worker, Spans()).add(left, right)
            while (free := self._trained.first_outside(left, right)) is not None:
                self._returned.add(*free)
                left = free[1]

    def _reclaim(self, worker: str, lease: Lease) -> None:
        for left, right in list(self._returned.within(lease.first, lease.stop)):
            # Not what another has had since, and given back: `vain` says what was this worker's.
            for first, stop in list(self._vain.get(worker, Spans()).within(left, right)):
                self._returned.remove(first, stop)
                self._vain[worker].remove(first, stop)
                self._open[worker].add(first, stop)


def _ranges(consumed: Mapping[str, int]) -> list[tuple[int, int]]:
    return [(int(first), int(first) + length) for first, length in consumed.items()]
