"""Measures the network between this machine and a server: what `POST /v1/probe` takes and gives.

    link = measure(ServerAddress("10.0.0.1"), seconds=6)
    link.latency_s, link.up_bytes_per_s, link.down_bytes_per_s

The server counts the bytes that come and sends as many as `?send=` asks for. Sizes grow until a transfer takes long
enough, so a slow network is measured with little and a fast one with much.
"""

import http.client
import json
import os
import statistics
import time
from collections.abc import Callable

from forgather.diloco.address import ServerAddress
from forgather.diloco.forecast import Link
from forgather.errors import DistributedError

FIRST_BYTES = 64 << 10
MOST_BYTES = 512 << 20  # the server takes twice as many at once
_GROWTH = 8  # a network's first bytes may come faster than the rest: a rate is not believed for much more than was seen
_CHUNK_BYTES = 256 << 10
_ROUND_TRIPS = 20


def measure(address: ServerAddress, *, seconds: float = 6.0) -> Link:
    """Latency and rates to `address` and back, in about `seconds`, at most twice as long.

    DistributedError for a server that is not there, refuses, or cannot be given the least in that time.
    """
    probe = _Probe(address)
    try:
        latency_s = probe.latency_s(seconds / 10)
        up = probe.rate(probe.send, seconds * 0.45, latency_s)
        down = probe.rate(probe.receive, seconds * 0.45, latency_s)
    finally:
        probe.close()
    return Link(up, down, latency_s)


class _Probe:
    """One connection, and a time at which whatever happens on it ends."""

    def __init__(self, address: ServerAddress) -> None:
        self._address = address
        self._connection: http.client.HTTPConnection | None = None
        self._ends_at = 0.0
        # Drawn by chance: a tunnel may compress, and parameters do not let themselves be compressed.
        self._block = memoryview(os.urandom(_CHUNK_BYTES))

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def latency_s(self, seconds: float) -> float:
        """The median time of an empty request and its answer, on an open connection."""
        self._ends_at = time.monotonic() + 4 * seconds
        times: list[float] = []
        try:
            self._timed(self.send, 0)  # opens the connection
            until = time.monotonic() + seconds
            while len(times) < 3 or (len(times) < _ROUND_TRIPS and time.monotonic() < until):
                times.append(self._timed(self.send, 0))
        except TimeoutError as error:
            raise self._address.unreachable(error) from error
        return statistics.median(times)

    def rate(self, transfer: Callable[[int], None], seconds: float, latency_s: float) -> float:
        """Bytes a second that `transfer` moves, once it takes a good part of `seconds`."""
        until = time.monotonic() + seconds
        self._ends_at = until + seconds / 2
        size, rate = FIRST_BYTES, 0.0
        while True:
            start = time.monotonic()
            try:
                took_s = self._timed(transfer, size)
            except TimeoutError as error:
                self.close()
                if not rate:
                    raise DistributedError(
                        f"between here and {self._address} less than {size >> 10} KiB pass in {1.5 * seconds:.1f} s",
                        fix="measure for longer (60 s, say), or look for what is wrong with the network",
                    ) from error
                # It was fast for a little, and is slower than this for more.
                return min(rate, size / (time.monotonic() - start))
            rate = size / max(took_s - latency_s, took_s / 10)  # less the latency, which varies and may seem longer
            left_s = until - time.monotonic()
            next_size = int(min(MOST_BYTES, size * _GROWTH, rate * left_s / 2))
            if next_size <= size:
                return rate
            size = next_size

    def send(self, size: int) -> None:
        """Bring `size` bytes, and wait until the server has them all."""
        connection = self._begin("/v1/probe", size)
        for start in range(0, size, _CHUNK_BYTES):
            self._limit(connection)
            connection.send(self._block[: size - start])
        received = json.loads(self._answer(connection).read()).get("received")
        if received != size:
            raise DistributedError(
                f"{self._address} counts {received} bytes of {size}: it is no server of this version"
            )

    def receive(self, size: int) -> None:
        """Get `size` bytes."""
        connection = self._begin(f"/v1/probe?send={size}", 0)
        answer = self._answer(connection)
        room, done = bytearray(_CHUNK_BYTES), 0
        while count := answer.readinto(room):
            done += count
            self._limit(connection)
        if done != size:
            raise DistributedError(f"{self._address} sends {done} bytes of {size}: it is no server of this version")

    def _timed(self, transfer: Callable[[int], None], size: int) -> float:
        """Seconds it takes. TimeoutError at the end of time; DistributedError if the server cannot be reached."""
        start = time.perf_counter()
        try:
            transfer(size)
        except TimeoutError:
            raise
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise self._address.unreachable(error) from error
        return time.perf_counter() - start

    def _begin(self, path: str, size: int) -> http.client.HTTPConnection:
        if self._connection is None:
            self._connection = self._address.connection(self._left_s())
        connection = self._connection
        connection.putrequest("POST", path)
        for name, text in self._address.headers.items():
            connection.putheader(name, text)
        connection.putheader("Content-Type", "application/octet-stream")
        connection.putheader("Content-Length", str(size))
        if connection.sock is not None:
            self._limit(connection)
        connection.endheaders()
        return connection

    def _answer(self, connection: http.client.HTTPConnection) -> http.client.HTTPResponse:
        self._limit(connection)
        answer = connection.getresponse()
        if answer.status >= 400:
            raise self._address.refused(answer.status, answer.read(_CHUNK_BYTES))
        return answer

    def _limit(self, connection: http.client.HTTPConnection) -> None:
        """Let no call on the socket last longer than there is time."""
        connection.sock.settimeout(self._left_s())

    def _left_s(self) -> float:
        left_s = self._ends_at - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        return left_s
