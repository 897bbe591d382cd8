"""Which worker trains which rows: the global order of samples, leased in units, and the ledger of what became of them.

Row g of a run is row g % L of epoch g // L, L the rows of an epoch; a worker turns it into a block by the order that
all workers have. An epoch is cut into K units: unit u begins at row u * L // K. A lease is one unit or several that
follow one another. A worker asks for its 0th, 1st, 2nd ... lease, and is told the same each time that it asks for the
same one, so a lost answer does no harm, and a restarted worker goes on with the rows that it had.

Each row is in one place: trained (a contribution that counted holds it), leased to one worker, taken back from one that
is gone, or not leased yet. What was taken back is leased again before anything new. A worker that comes back is told
which of the rows that it holds are others' by now; what it has trained of them counts too, and the ledger says
`repeated`.

Nothing here waits, writes or knows a network; `lease_journal` keeps the leases.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Self

from forgather.diloco.frame import ProtocolError
from forgather.diloco.presence import WORKER_NAME
from forgather.diloco.spans import Spans
from forgather.errors import ConfigError

# Leases of one worker that are remembered, and the most in one answer. A worker asks about once a round, so one that is
# restarted from a checkpoint that is hundreds of rounds old gets new rows; those of these rounds have long counted.
KEPT_LEASES = 256
_MOST_HELD = 1 << 16  # ranges in a question


@dataclass(frozen=True)
class Lease:
    """Rows first .. first + length - 1 of the run."""

    first: int
    length: int

    @property
    def stop(self) -> int:
        return self.first + self.length


@dataclass(frozen=True)
class Question:
    """A worker asks for its leases from the `sequence`-th on, of so many rows together, or a few more.

    `held` are ranges of rows that it has leased and not begun: it hears which of them are not its own any more.
    """

    worker: str
    sequence: int
    rows: int  # of an epoch
    order: str  # which order they are rows of
    at_least: int
    held: Sequence[tuple[int, int]] = ()  # first row, and the one after the last

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """ProtocolError where this is no such question."""
        match value:
            case {
                "worker": str(worker),
                "sequence": int(sequence),
                "rows": int(rows),
                "order": str(order),
                "at_least": int(at_least),
                "held": list(held),
            } if WORKER_NAME.fullmatch(worker) and 0 <= sequence < 2**62 and 1 <= rows < 2**62:
                if 0 <= at_least < 2**40 and len(held) <= _MOST_HELD and all(map(_is_range, held)):
                    return cls(worker, sequence, rows, order, at_least, [(first, stop) for first, stop in held])
        raise ProtocolError(
            "a request for units says worker, sequence, rows (of an epoch), order, at_least (rows) and held (ranges)"
        )


class Answer(NamedTuple):
    leases: list[Lease]
    num_known: int  # of them, those at the beginning were given before
    lost: list[tuple[int, int]]  # ranges of what the worker holds that are not its own

    def to_json(self) -> dict[str, list[list[int]]]:
        leases = [[lease.first, lease.stop] for lease in self.leases]
        return {"leases": leases, "lost": [list(each) for each in self.lost]}


class WorkUnits:
    """Leases the rows of epoch after epoch, each row once as long as no worker is lost."""

    def __init__(self, num_units: int) -> None:
        if num_units < 1:
            raise ConfigError(f"an epoch cannot be cut into {num_units} units", fix="use 1 or more, 1024 say")
        self.num_units = num_units
        self.rows: int | None = None  # of an epoch; what the first worker that asks says
        self.order: str | None = None  # which order the rows are of: the same on all workers
        self.num_given = 0  # leases of all workers
        self.num_repeated = 0
        self._next_row = 0  # all before it are trained, leased or taken back
        self._leases: dict[str, dict[int, Lease]] = {}  # the last of each worker
        self._open: dict[str, Spans] = {}  # leased to this worker, and not counted
        self._trained = Spans()
        self._returned = Spans()  # taken back, to be leased again
        self._vain: dict[str, Spans] = {}  # this worker had them, and its work on them has not counted
        self._num_vain = 0  # the same, of runs whose name another has now
        self._runs: dict[str, str] = {}  # what `begin` was told last of each worker

    def lease(self, question: Question) -> Answer:
        """What a worker asks for. `rows` and `order` must be those of the first worker that asked."""
        self._require_same(question.rows, question.order)
        worker, sequence = question.worker, question.sequence
        lost = self._lost(worker, question.held)
        leases: list[Lease] = []
        missing = question.at_least
        while missing > 0 and (known := self._leases.get(worker, {}).get(sequence + len(leases))) is not None:
            self._reclaim(worker, known)
            leases.append(known)
            missing -= known.length
        num_known = len(leases)
        if missing > 0:
            self._abandon_from(worker, sequence + num_known)
        while missing > 0 and len(leases) < KEPT_LEASES:
            lease = self._next_lease(missing)
            self._give(worker, sequence + len(leases), lease)
            leases.append(lease)
            missing -= lease.length
        return Answer(leases, num_known, lost)

    def has_leased(self, worker: str, sequence: int) -> bool:
        """Whether this lease was given, and is remembered."""
        return sequence in self._leases.get(worker, {})

    def run_of(self, worker: str) -> str:
        """What `begin` was told last of this worker."""
        return self._runs.get(worker, "")

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
        self._runs[worker] = run

    def restore(self, number: int, run: str, question: Question, lease: Lease) -> None:
        """Take up the `number`-th lease of all, unless this state, which was saved once, has it already."""
        if number <= self.num_given:
            return
        worker, sequence = question.worker, question.sequence
        self._require_same(question.rows, question.order)
        if run != self.run_of(worker):
            self.begin(worker, run)
        for other in list(self._open):
            # Whoever had these rows when the state was saved had lost them when they were leased again.
            self._take_back(other, lease.first, lease.stop)
        self._abandon_from(worker, sequence)
        self._give(worker, sequence, lease)
        self.num_given = number

    @property
    def stop(self) -> int:
        """No row from here on was ever leased."""
        ends = [spans.stop for spans in (self._trained, self._returned, *self._open.values())]
        return max(self._next_row, *ends)

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

    def release(self, worker: str, held: Sequence[Mapping[str, int]] = ()) -> None:
        """The worker has left or is dead: what it has not brought in is leased again. Known leases stay its own.

        `held` are the rows of its contributions that wait for their rounds: they are to be counted, or refused.
        """
        missing = Spans(self._open.get(worker, Spans()))
        for consumed in held:
            for first, stop in _ranges(consumed):
                missing.remove(first, stop)
        for first, stop in missing:
            self._take_back(worker, first, stop)

    def release_all_but(self, workers: Collection[str]) -> None:
        """Of others nobody knows any more: what they have not brought in is leased again."""
        for worker in [name for name in self._open if name not in workers]:
            self.release(worker)

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
            "num_given": self.num_given,
            "num_repeated": self.num_repeated,
            "next_row": self._next_row,
            "leases": {
                worker: [[sequence, lease.first, lease.length] for sequence, lease in leases.items()]
                for worker, leases in self._leases.items()
            },
            "open": {worker: spans.to_json() for worker, spans in self._open.items()},
            "trained": self._trained.to_json(),
            "returned": self._returned.to_json(),
            "vain": {worker: spans.to_json() for worker, spans in self._vain.items()},
            "num_vain": self._num_vain,
            "runs": dict(self._runs),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where a ledger stood; ConfigError where an epoch was cut into another number of units."""
        if state["num_units"] != self.num_units:
            raise ConfigError(
                f"this server's state has {state['num_units']} work units an epoch, not {self.num_units}",
                fix=f"keep --work-units {state['num_units']}; it cannot change within a run",
            )
        self.rows, self.order = state["rows"], state["order"]
        self.num_given, self.num_repeated = state["num_given"], state["num_repeated"]
        self._next_row = state["next_row"]
        self._leases = {
            worker: {sequence: Lease(first, length) for sequence, first, length in leases}
            for worker, leases in state["leases"].items()
        }
        self._open = {worker: Spans.from_json(spans) for worker, spans in state["open"].items()}
        self._trained = Spans.from_json(state["trained"])
        self._returned = Spans.from_json(state["returned"])
        self._vain = {worker: Spans.from_json(spans) for worker, spans in state["vain"].items()}
        self._num_vain = state["num_vain"]
        self._runs = dict(state["runs"])

    def _require_same(self, rows: int, order: str) -> None:
        if self.rows is None or self.order is None:
            self.rows, self.order = rows, order
        if (rows, order) != (self.rows, self.order):
            raise ProtocolError(
                f"the units are of {self.order} with {self.rows:,} rows an epoch; "
                f"this worker has {order} with {rows:,} rows",
                status=422,
                fix="give all workers the same dataset, block_length and --seed; or this one --no-diloco-leased, "
                "and it takes its rows in an order of its own",
            )

    def _lost(self, worker: str, held: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        lost = Spans(held)
        for first, stop in held:
            self._reclaim(worker, Lease(first, stop - first))
            for left, right in list(self._open.get(worker, Spans()).within(first, stop)):
                lost.remove(left, right)
        return list(lost)

    def _abandon_from(self, worker: str, sequence: int) -> None:
        """A worker that asks for this lease anew, as from an old checkpoint, has left the future of later ones."""
        leases = self._leases.get(worker, {})
        for later in [number for number in leases if number >= sequence]:
            lease = leases.pop(later)
            self._take_back(worker, lease.first, lease.stop)

    def _next_lease(self, at_least: int) -> Lease:
        """What is leased next: the lowest rows that were taken back, otherwise units that nobody had.

        It has `at_least` rows, to the end of a unit, or as many as follow one another.
        """
        for first, stop in self._returned:
            return Lease(first, min(stop, self._end_of_unit(first + at_least - 1)) - first)
        while True:
            first, stop = self._next_row, self._end_of_unit(self._next_row + at_least - 1)
            # A server that came back from an older state may have counted rows of units that it has not leased since.
            free = self._taken(first, stop).first_outside(first, stop)
            self._next_row = stop if free is None else free[1]
            if free is not None:
                return Lease(free[0], free[1] - free[0])

    def _taken(self, first: int, stop: int) -> Spans:
        """Which of these rows are trained, leased, or lie ready to be leased again."""
        taken = Spans()
        for spans in (self._trained, self._returned, *self._open.values()):
            for left, right in spans.within(first, stop):
                taken.add(left, right)
        return taken

    def _end_of_unit(self, row: int) -> int:
        """Where the unit of this row ends."""
        assert self.rows is not None, "a worker has said how many rows there are"
        epoch, start = divmod(row, self.rows)
        # The last unit that begins at this row or before: u * L // K <= start is u < (start + 1) * K / L.
        unit = ((start + 1) * self.num_units - 1) // self.rows
        return epoch * self.rows + (unit + 1) * self.rows // self.num_units

    def _give(self, worker: str, sequence: int, lease: Lease) -> None:
        leases = self._leases.setdefault(worker, {})
        leases[sequence] = lease
        while len(leases) > KEPT_LEASES:
            del leases[min(leases)]
        self.num_given += 1
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


def _is_range(value: Any) -> bool:
    match value:
        case [int(first), int(stop)]:
            return 0 <= first < stop < 2**62
    return False


def _ranges(consumed: Mapping[str, int]) -> list[tuple[int, int]]:
    return [(int(first), int(first) + length) for first, length in consumed.items()]
