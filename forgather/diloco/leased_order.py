"""The order of a worker's samples: the rows that the server leases to it, one lease after the other.

The worker counts its own samples 0, 1, 2 ...; they run through the rows of its 0th lease, its 1st, and so on, and a
step may reach over several. Which block a row is says the order that all workers have.

All ranks have the same leases at each step: rank 0 asks the server, beside the training, and tells the others between
two steps. So no rank begins a step for which another has no rows, and who waits for rows can be stopped. Two rounds are
leased ahead, so that training goes on while the server is away for as long.
"""

import threading
from bisect import bisect_right
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from forgather.data.order import Permutation
from forgather.diloco.lease_desk import News, not_joined
from forgather.diloco.spans import Spans
from forgather.diloco.work_units import Lease, Question
from forgather.distributed.collectives import broadcast_object, rank
from forgather.errors import DataError

_ROUNDS_AHEAD = 2  # that are leased at any time; the next question is for one more
_WAIT_S = 0.5  # for rows that are needed now; in between, the run looks whether it is to end


class Desk(Protocol):
    """Who asks the server: `lease_desk.LeaseDesk` is one."""

    @property
    def has_joined(self) -> bool: ...

    @property
    def sync_every(self) -> int: ...

    @property
    def worker(self) -> str: ...

    def ask(self, question: Question) -> None: ...

    def hear(self, wait_s: float) -> News | None: ...


class LeasedOrder:
    """The samples of one worker, out of `order`, as the server leases them to it through `desk`."""

    def __init__(self, order: Permutation, desk: Desk, *, rows_per_step: int) -> None:
        self.order = order
        self._desk = desk
        self._rows_per_step = rows_per_step
        self._rows_per_round: int | None = None  # the same on all ranks, as rank 0 has told it
        self._num_fixed = 0  # samples that may be read by now on any rank, so that they stay what they are
        self._num_leased = 0  # leases of this worker so far: the number of its next one
        # Those that are not forgotten, ones that follow one another merged. The loader reads them from its thread.
        self._leases: list[Lease] = []
        self._begins = [0]  # of each of them, in the worker's own numbers; the last is where the next one begins
        self._changing = threading.Lock()

    def sample(self, n: int) -> int:
        """The block that is the worker's n-th sample."""
        return int(self.samples(n, 1)[0])

    def samples(self, first: int, count: int) -> NDArray[np.int64]:
        """The blocks of the worker's samples first .. first + count - 1, which `reserve` has got.

        For a run that has not joined a server, as a dry run, they are those that it would have alone.
        """
        if not self._desk.has_joined and first + count > self._begins[-1]:
            return self.order.samples(first, count)
        pieces = [self.order.samples(start, length) for start, length in self._rows(first, first + count)]
        return np.concatenate(pieces) if pieces else np.empty(0, np.int64)

    def reserve(self, first: int, stop: int, end: int) -> bool:
        """Whether samples first .. stop - 1 are leased; waits half a second for them. Collective.

        `end` is where the run ends: what is beyond is not leased ahead. DataError when the server refuses.
        """
        self._num_fixed = max(self._num_fixed, first)
        if self._rows_per_round is None or self._begins[-1] < self._wanted(stop, end, _ROUNDS_AHEAD):
            is_news = self._look(stop, end)
            while is_news and self._begins[-1] < stop:
                is_news = self._look(stop, end)
        if self._begins[-1] < stop:
            return False
        self._num_fixed = max(self._num_fixed, stop)
        return True

    def consumed(self, first: int, stop: int) -> dict[str, int]:
        """Which rows samples first .. stop - 1 are, as a contribution says it: {first row of the run: rows}.

        Samples before `first` are not asked for again.
        """
        rows: dict[str, int] = {}
        for start, length in self._rows(first, stop):
            rows[str(start)] = max(length, rows.get(str(start), 0))
        self._forget(first)
        return rows

    def describe(self) -> str:
        """One line that is equal exactly when the order is."""
        return f"leases of a {self.order.describe()}"

    def state_dict(self) -> dict[str, Any]:
        """What the leases are, from before the last exchange on; the position is the loader's one integer."""
        return {
            "order": self.describe(),
            "num_leased": self._num_leased,
            "begin": self._begins[0],
            "leases": [[lease.first, lease.length] for lease in self._leases],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on with the leases of a saved run; DataError where it had another order."""
        if state["order"] != self.describe():
            is_own = state["order"] == self.order.describe()
            raise DataError(
                f"the run was started with another order of data: {state['order']}; this one is {self.describe()}",
                fix="--no-diloco-leased: it goes on in the order that it has begun"
                if is_own
                else "set seed and dataset back to what they were, or start a new run with --fresh",
            )
        with self._changing:
            self._leases, self._begins = [], [int(state["begin"])]
            for first, length in state["leases"]:
                self._append(Lease(first, length))
            self._num_leased = int(state["num_leased"])
        self._num_fixed = 0
        self._rows_per_round = None

    def _wanted(self, stop: int, end: int, num_rounds: int) -> int:
        """Up to which sample rows are to be leased: so many rounds beyond `stop`, as far as the run goes."""
        assert self._rows_per_round is not None, "rank 0 has told it"
        return max(stop, min(stop + num_rounds * self._rows_per_round, end))

    def _look(self, stop: int, end: int) -> bool:
        """Let rank 0 ask for what is missing; whether there was an answer of the server, which all ranks take in."""
        if not self._desk.has_joined:
            raise not_joined()
        news = None
        if rank() == 0:
            # One that comes back, from a saved state say, hears first what others have had meanwhile.
            comes_back = self._rows_per_round is None
            self._rows_per_round = self._desk.sync_every * self._rows_per_step  # a server may change its H
            missing = max(0, self._wanted(stop, end, _ROUNDS_AHEAD + 1) - self._begins[-1])
            if missing or comes_back:
                self._desk.ask(self._question(missing))
            news = self._desk.hear(_WAIT_S if self._begins[-1] < stop or comes_back else 0.0)
        self._rows_per_round, news = broadcast_object((self._rows_per_round, news))
        if news is None or news.sequence != self._num_leased:
            return False  # nothing yet, or what was asked before a state was loaded
        if news.failure is not None:
            message, fix = news.failure
            raise DataError(f"the server leases no rows: {message}", fix=fix)
        with self._changing:
            self._lose(Spans(news.lost))
            for lease in news.leases:
                self._append(lease)
        self._num_leased += len(news.leases)
        return True

    def _question(self, at_least: int) -> Question:
        held = [(first, first + length) for first, length in self._rows(self._num_fixed, self._begins[-1])]
        return Question(self._desk.worker, self._num_leased, self.order.size, self.order.describe(), at_least, held)

    def _rows(self, first: int, stop: int) -> list[tuple[int, int]]:
        """Rows of the run that samples first .. stop - 1 are: (first row, rows), in order."""
        with self._changing:
            return self._pieces(first, stop)

    def _pieces(self, first: int, stop: int) -> list[tuple[int, int]]:
        pieces = []
        assert self._begins[0] <= first, "samples that are forgotten"
        assert stop <= self._begins[-1], "samples that are not leased yet"
        index = bisect_right(self._begins, first) - 1
        while first < stop:
            taken = min(stop, self._begins[index + 1]) - first
            pieces.append((self._leases[index].first + first - self._begins[index], taken))
            first, index = first + taken, index + 1
        return pieces

    def _lose(self, lost: Spans) -> None:
        """Take rows out that others have, as far as they are not fixed: the samples behind them move up."""
        if not lost:
            return
        begin = self._num_fixed
        held = self._pieces(begin, self._begins[-1])
        while self._begins[-1] > begin:
            self._begins.pop()
            last = self._leases.pop()
            kept = begin - self._begins[-1]
            if kept > 0:
                self._append(Lease(last.first, kept))
        for first, length in held:
            while (own := lost.first_outside(first, first + length)) is not None:
                self._append(Lease(own[0], own[1] - own[0]))
                length -= own[1] - first
                first = own[1]

    def _append(self, lease: Lease) -> None:
        end = self._begins[-1] + lease.length
        if self._leases and self._leases[-1].stop == lease.first:
            self._leases[-1] = Lease(self._leases[-1].first, self._leases[-1].length + lease.length)
            self._begins[-1] = end
        else:
            self._leases.append(lease)
            self._begins.append(end)

    def _forget(self, before: int) -> None:
        """Let go of the leases that end before this sample."""
        with self._changing:
            num_past = bisect_right(self._begins, before) - 1
            del self._leases[:num_past]
            del self._begins[:num_past]
