"""The bytes of a contribution's part on their way: sent as soon as they are there, while the rest is still encoded.

    payload = Payload(torch.empty(num_bytes, dtype=torch.uint8))
    with payload.written(): ...; payload.grow(num_bytes)      in one thread
    for block in payload.blocks(): send(block)                in another, or in several
    send(payload.digest)                                      the xxh3-64 of all, behind them

On the wire the digest comes last, as it is known last.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

import xxhash
from torch import Tensor

from forgather.checkpoint.storage import raw_bytes

DIGEST_BYTES = 8
_BLOCK_BYTES = 1 << 20  # handed to the system at once; between two, an early answer is noticed


class Payload:
    """So many bytes as `data` has, of which none are there at first."""

    def __init__(self, data: Tensor) -> None:
        self.data = data
        self.num_bytes = data.nbytes
        self._bytes = raw_bytes(data)
        self._there = 0
        self._digest = xxhash.xxh3_64()
        self._failure: Exception | None = None
        self._changed = threading.Condition()

    @classmethod
    def whole(cls, data: Tensor) -> Self:
        """One that is there."""
        made = cls(data)
        made.grow(made.num_bytes)
        return made

    @property
    def is_whole(self) -> bool:
        with self._changed:
            return self._there == self.num_bytes

    @property
    def digest(self) -> bytes:
        """Of all bytes, which are there."""
        assert self.is_whole, "its last bytes are still to come"
        return self._digest.digest()

    def grow(self, num_bytes: int) -> None:
        """The next so many bytes of `data` are written."""
        # Seen by the digest here, where they are near the processor.
        self._digest.update(self._bytes[self._there : self._there + num_bytes])
        with self._changed:
            self._there += num_bytes
            self._changed.notify_all()

    @contextmanager
    def written(self) -> Iterator[None]:
        """While it is written. What goes wrong is raised not here, but to whoever waits for its bytes."""
        try:
            yield
        except Exception as error:  # noqa: BLE001
            with self._changed:
                self._failure = error
                self._changed.notify_all()

    def blocks(self) -> Iterator[memoryview]:
        """All bytes, as soon as they are there. Raises what kept them from being written."""
        at = 0
        while at < self.num_bytes:
            stop = min(self._await(at + 1), at + _BLOCK_BYTES)
            yield self._bytes[at:stop]
            at = stop

    def wait(self) -> None:
        """Return when it is whole. Raises what kept it from being written."""
        self._await(self.num_bytes)

    def _await(self, num_bytes: int) -> int:
        """How many bytes are there, once there are so many."""
        with self._changed:
            self._changed.wait_for(lambda: self._there >= num_bytes or self._failure is not None)
            if self._there < num_bytes and self._failure is not None:
                raise self._failure
            return self._there
