"""Which block is the n-th of a run: a function of n, so that any rank can ask for any sample at any time."""

from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from forgather.errors import DataError

_ROUNDS = 8
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = 2**64 - 1


class SampleOrder(Protocol):
    """Maps sample numbers, which go on over the epochs, to blocks."""

    def sample(self, n: int) -> int:
        """The block that is the n-th sample of the run."""

    def samples(self, first: int, count: int) -> NDArray[np.int64]:
        """The blocks of samples first .. first + count - 1."""

    def describe(self) -> str:
        """One line that is equal exactly when the order is."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@runtime_checkable
class ReservedOrder(SampleOrder, Protocol):
    """An order whose samples others decide on: they have to be got before they are asked for."""

    def reserve(self, first: int, stop: int, end: int) -> bool:
        """Whether samples first .. stop - 1 are there, in a run that ends at `end`. Collective; waits half a second."""


class Permutation:
    """Every block once an epoch, in an order that depends on (seed, epoch) alone.

    A keyed permutation computed for one number at a time: no list is shuffled or stored, so memory and the time to
    reach sample 10^12 are those of sample 0. It is the generalised Feistel network of Black and Rogaway (2002, method
    2) over a grid of a x b >= size cells with a ~ b: each round adds a hash of one coordinate to the other. The cells
    beyond `size`, fewer than a of them, are walked through until the walk comes back inside.
    """

    def __init__(self, size: int, seed: int) -> None:
        if size < 1:
            raise DataError(f"an order needs at least one block, not {size}", fix="prepare a larger corpus")
        self.size = size
        self.seed = seed
        self._width = max(1, int(np.ceil(np.sqrt(size))))
        self._height = -(-size // self._width)
        self._keys: dict[int, list[int]] = {}

    def sample(self, n: int) -> int:
        """The block that is the n-th sample of the run."""
        epoch, cell = divmod(n, self.size)
        while True:
            row, column = divmod(cell, self._width)
            for number, key in enumerate(self._round_keys(epoch)):
                if number % 2:
                    row = (row + _mix((column + key) & _MASK)) % self._height
                else:
                    column = (column + _mix((row + key) & _MASK)) % self._width
            cell = row * self._width + column
            if cell < self.size:
                return cell

    def samples(self, first: int, count: int) -> NDArray[np.int64]:
        """The blocks of samples first .. first + count - 1; a range may reach over several epochs."""
        pieces = []
        while count:
            epoch, start = divmod(first, self.size)
            taken = min(count, self.size - start)
            pieces.append(self._permute(np.arange(start, start + taken, dtype=np.uint64), epoch))
            first, count = first + taken, count - taken
        return np.concatenate(pieces) if pieces else np.empty(0, np.int64)

    def describe(self) -> str:
        """One line that is equal exactly when the order is."""
        return f"permutation of {self.size} blocks, seed {self.seed}"

    def state_dict(self) -> dict[str, Any]:
        """Nothing but what the order was made of: its position is the loader's one integer."""
        return {"order": self.describe()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Refuses the state of another order."""
        if state["order"] != self.describe():
            raise DataError(
                f"the run was started with another order of data: {state['order']}; this one is {self.describe()}",
                fix="go on with the --diloco-server that leases its rows, or begin a new run with what the server has "
                "saved: --init-from and the server's folder, another --run-name"
                if "leases" in state
                else "set the seed and dataset back to what they were, or start a new run with --fresh",
            )

    def _permute(self, cells: NDArray[np.uint64], epoch: int) -> NDArray[np.int64]:
        keys = self._round_keys(epoch)
        width, height = np.uint64(self._width), np.uint64(self._height)
        result = np.empty(len(cells), np.int64)
        places = np.arange(len(cells))
        while len(places):
            row, column = np.divmod(cells, width)
            for number, key in enumerate(keys):
                # uint64 arrays wrap silently, which is the arithmetic that _mix spells out for Python's integers.
                if number % 2:
                    row = (row + _mix_array(column + np.uint64(key)) % height) % height
                else:
                    column = (column + _mix_array(row + np.uint64(key)) % width) % width
            cells = row * width + column
            inside = cells < np.uint64(self.size)
            result[places[inside]] = cells[inside]
            places, cells = places[~inside], cells[~inside]
        return result

    def _round_keys(self, epoch: int) -> list[int]:
        keys = self._keys.get(epoch)
        if keys is None:
            start = _mix((_mix(self.seed & _MASK) + epoch * _GOLDEN) & _MASK)
            keys = [_mix((start + (i + 1) * _GOLDEN) & _MASK) for i in range(_ROUNDS)]
            # One epoch is kept: a range touches the end of one and the start of the next, unless the corpus is tiny.
            # Returned from here, not from what is kept: the loader's thread may be an epoch ahead and keep its own.
            self._keys = {epoch: keys}
        return keys


def _mix(z: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014): each input bit flips each output bit half the time."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def _mix_array(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
