"""The order of a worker's samples: the rows that the server leases to it, one lease after the other.

The worker counts its own samples 0, 1, 2 ...; they run through the rows of its 0th lease, its 1st, and so on, and a
step may reach over several. Which block a row is says the order that all workers have. Each rank asks the server for
itself: the same question has the same answer, so nothing passes between the ranks. The next lease is asked for, beside
the training, when the last one is begun, so a server that is away for less than a unit is not missed.
"""

import threading
from bisect import bisect_right
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forgather.data.order import Permutation
from forgather.diloco.client import UnknownWorkerError, UnreachableError
from forgather.diloco.work_units import Lease
from forgather.errors import DataError, ForgatherError

# Asks the server: (sequence, rows of an epoch, description of the order) -> the answer of POST /v1/units; `Client.unit`
# is one. UnreachableError and UnknownWorkerError pass by themselves, as the worker registers again; others do not.
Ask = Callable[[int, int, str], Mapping[str, int]]

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 10.0


class LeasedOrder:
    """The samples of one worker, out of `order`, as the server leases them. Without `ask` it is `order` itself.

    A server that stays away for `patience_s` when rows are needed ends the run with an error; the same command goes on.
    """

    def __init__(self, order: Permutation, ask: Ask | None = None, *, patience_s: float = 3600.0) -> None:
        self.order = order
        self.ask = ask
        self.patience_s = patience_s
        self._leases: list[Lease] = []
        self._begins = [0]  # of each lease, in the worker's own numbers; the last is where the next one begins
        self._changed = threading.Condition()
        self._asking: threading.Thread | None = None
        self._failure: ForgatherError | None = None
        self._why: ForgatherError | None = None  # the last failure to reach the server
        self._closed = threading.Event()

    def sample(self, n: int) -> int:
        """The block that is the worker's n-th sample."""
        return int(self.samples(n, 1)[0])

    def samples(self, first: int, count: int) -> NDArray[np.int64]:
        """The blocks of the worker's samples first .. first + count - 1; waits for the server where it must.

        DataError when the server stays away, or refuses.
        """
        if self.ask is None:
            return self.order.samples(first, count)
        self._wait_for(first + count)
        pieces = [self.order.samples(start, length) for start, length in self._rows(first, first + count)]
        return np.concatenate(pieces) if pieces else np.empty(0, np.int64)

    def consumed(self, first: int, stop: int) -> dict[str, int]:
        """Which rows samples first .. stop - 1 are, as a contribution says it: {first row of the run: rows}."""
        if self.ask is None:
            return {}
        rows: dict[str, int] = {}
        for start, length in self._rows(first, stop):
            rows[str(start)] = max(length, rows.get(str(start), 0))
        return rows

    def describe(self) -> str:
        """One line that is equal exactly when the order is."""
        return self.order.describe() if self.ask is None else f"leases of a {self.order.describe()}"

    def state_dict(self) -> dict[str, Any]:
        """What the leases so far were; the position is the loader's one integer."""
        with self._changed:
            return {"order": self.describe(), "leases": [[lease.first, lease.length] for lease in self._leases]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on with the leases of a saved run; DataError where it had another order."""
        if state["order"] != self.describe():
            raise DataError(
                f"the run was started with another order of data: {state['order']}; this one is {self.describe()}",
                fix="set server, seed and dataset back to what they were, or start a new run with --fresh",
            )
        self.close()
        with self._changed:
            self._leases, self._begins = [], [0]
            for first, length in state.get("leases", []):
                self._append(Lease(first, length))
            self._asking = self._failure = None
            self._closed = threading.Event()

    def close(self) -> None:
        """Stop asking: whoever waits for rows ends with an error. The run is over, or begins from a saved state."""
        with self._changed:
            self._closed.set()
            self._changed.notify_all()

    def _rows(self, first: int, stop: int) -> list[tuple[int, int]]:
        """Rows of the run that samples first .. stop - 1 are: (first row, rows), in order."""
        with self._changed:
            leases, begins = list(self._leases), list(self._begins)
        assert stop <= begins[-1], "samples that are not leased yet"
        pieces = []
        index = bisect_right(begins, first) - 1
        while first < stop:
            taken = min(stop, begins[index + 1]) - first
            pieces.append((leases[index].first + first - begins[index], taken))
            first, index = first + taken, index + 1
        return pieces

    def _wait_for(self, stop: int) -> None:
        """Return when samples up to `stop` are leased, and the lease after the last one that is begun is asked for."""
        with self._changed:
            while True:
                if self._failure is not None:
                    raise DataError(f"the server leases no more rows: {self._failure.message}", fix=self._failure.fix)
                if self._closed.is_set():
                    raise DataError("the run is ending: no more rows are asked for")
                is_last_begun = len(self._begins) < 2 or stop > self._begins[-2]
                if is_last_begun and self._asking is None:
                    # A daemon: a process that ends does not wait for a server that is away.
                    arguments = (len(self._leases), self._closed)
                    self._asking = threading.Thread(
                        target=self._fetch, args=arguments, name="forgather-lease", daemon=True
                    )
                    self._asking.start()
                if stop <= self._begins[-1]:
                    return
                if not self._changed.wait(self.patience_s):
                    raise DataError(
                        f"the server gave no rows to train on for {self.patience_s:.0f} s: {self._why}",
                        fix="start it again, or see whether this machine reaches it; the same command goes on",
                    )

    def _fetch(self, sequence: int, closed: threading.Event) -> None:
        """Ask until there is an answer, or `closed`, which is of the time that the question belongs to, is set."""
        assert self.ask is not None, "started only then"
        lease: Lease | None = None
        failure: ForgatherError | None = None
        pause_s = _FIRST_PAUSE_S
        while lease is None and failure is None and not closed.is_set():
            try:
                answer = self.ask(sequence, self.order.size, self.order.describe())
                lease = Lease(answer["epoch"] * self.order.size + answer["start"], answer["length"])
            except (UnreachableError, UnknownWorkerError) as error:
                self._why = error
                closed.wait(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            except ForgatherError as error:
                failure = error
        with self._changed:
            if closed.is_set():
                return
            if lease is not None:
                self._append(lease)
            self._failure, self._asking = failure, None
            self._changed.notify_all()

    def _append(self, lease: Lease) -> None:
        self._leases.append(lease)
        self._begins.append(self._begins[-1] + lease.length)
