"""A TCP proxy that is a bad network: latency, loss, narrow lines, cuts, and replies that never arrive.

    with Proxy(("127.0.0.1", server_port)) as proxy:
        worker_uses(proxy.address)
        proxy.lose_replies("PUT", 1)      # the server hears the next PUT, its answer is lost with the connection
        proxy.cut(); ...; proxy.mend()    # nothing comes through, and nobody is told

`target` may change: a server that is started again on another port is reached at the same address as before. It runs in
a thread; `python -m tests.proxy LISTEN TARGET` runs one on a host of tests/lan.py.
"""

import argparse
import asyncio
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from types import TracebackType
from typing import Self

_BLOCK = 1 << 16
_TICK_S = 0.005
RESEND_S = 0.2  # what a lost packet costs TCP, at least: the shortest time after which it sends again


class Proxy:
    """Forwards connections to `target`. All attributes may be changed while it runs.

    `latency_s` is one way. `loss` is the chance that a block of 64 KiB waits for a resend. `bytes_per_s` is of each
    connection and direction.
    """

    def __init__(
        self,
        target: tuple[str, int],
        *,
        listen: tuple[str, int] = ("127.0.0.1", 0),
        latency_s: float = 0.0,
        loss: float = 0.0,
        bytes_per_s: float | None = None,
        seed: int = 0,
    ) -> None:
        self.target = target
        self.latency_s = latency_s
        self.loss = loss
        self.bytes_per_s = bytes_per_s
        self.up_bytes = 0
        self.down_bytes = 0
        self.requests: list[str] = []  # the first line of each
        self._listen = listen
        self._random = random.Random(seed)
        self._is_cut = False
        self._lost: list[str] = []  # methods whose next replies are lost
        self._torn: list[int] = []  # bytes of the next PUTs after which the connection breaks
        self._connections: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._started: Future[tuple[str, int]] = Future()
        self._thread = threading.Thread(target=self._run, name="proxy", daemon=True)

    @property
    def address(self) -> str:
        host, port = self._started.result(10)
        return f"{host}:{port}"

    def cut(self) -> None:
        """Let nothing through from now on. Connections stay, and new ones are taken: nobody is told."""
        self._is_cut = True

    def mend(self) -> None:
        """End a cut; what was under way then is lost with its connection, as after a timeout."""
        self._is_cut = False
        self.reset()

    def reset(self) -> None:
        """Break all connections."""
        self._call(lambda: [task.cancel() for task in self._connections])

    def lose_replies(self, method: str, count: int) -> None:
        """Lose the replies to the next requests with this method, each with its connection."""
        self._lost += [method] * count

    def tear(self, after_bytes: int) -> None:
        """Break the connection of the next PUT when so many bytes of it have passed."""
        self._torn.append(after_bytes)

    def wait_for(self, condition: Callable[["Proxy"], bool], timeout_s: float = 20.0) -> None:
        """Return when it has seen what is waited for."""
        deadline = time.monotonic() + timeout_s
        while not condition(self):
            assert time.monotonic() < deadline, "the proxy has not seen what was waited for"
            time.sleep(_TICK_S)

    def __enter__(self) -> Self:
        self._thread.start()
        self._started.result(10)
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self._call(self._stopping.set)
        self._thread.join(10)

    def _call(self, function: Callable[[], object]) -> None:
        self._loop.call_soon_threadsafe(function)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self) -> None:
        self._stopping = asyncio.Event()
        server = await asyncio.start_server(self._connected, *self._listen, limit=4 * _BLOCK)
        self._started.set_result(server.sockets[0].getsockname()[:2])
        await self._stopping.wait()
        server.close()
        for task in list(self._connections):
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        streams = [writer]
        try:
            while self._is_cut:
                await asyncio.sleep(_TICK_S)
            there_reader, there_writer = await asyncio.open_connection(*self.target, limit=4 * _BLOCK)
            streams.append(there_writer)
            connection = _Connection(self)
            up = asyncio.create_task(connection.carry_up(reader, there_writer))
            down = asyncio.create_task(connection.carry_down(there_reader, writer))
            try:
                await asyncio.wait([up, down], return_when=asyncio.FIRST_COMPLETED)
            finally:
                up.cancel()
                down.cancel()
                await asyncio.gather(up, down, return_exceptions=True)
        except (OSError, asyncio.CancelledError):
            pass  # a server that is away, or a connection that is broken on purpose
        finally:
            self._connections.discard(task)
            for stream in streams:
                stream.transport.abort()


class _Connection:
    """One connection: requests follow one another on it."""

    def __init__(self, proxy: Proxy) -> None:
        self.proxy = proxy
        self.method = ""
        self.of_request = 0  # bytes of it that have passed
        self.is_answered = True

    async def carry_up(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        proxy = self.proxy
        while block := await reader.read(_BLOCK):
            line = block.partition(b"\r\n")[0]
            if self.is_answered and line.endswith(b"HTTP/1.1"):
                self.method = line.partition(b" ")[0].decode("latin-1")
                self.of_request, self.is_answered = 0, False
                proxy.requests.append(line.decode("latin-1"))
            await self._travel(len(block))
            self.of_request += len(block)
            if proxy._torn and self.method == "PUT" and self.of_request >= proxy._torn[0]:
                # The server gets no more than that many bytes of it.
                writer.write(block[: len(block) - (self.of_request - proxy._torn.pop(0))])
                await writer.drain()
                return
            proxy.up_bytes += len(block)
            writer.write(block)
            await writer.drain()

    async def carry_down(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        proxy = self.proxy
        while block := await reader.read(_BLOCK):
            if not self.is_answered and self.method in proxy._lost:
                proxy._lost.remove(self.method)
                return
            self.is_answered = True
            await self._travel(len(block))
            proxy.down_bytes += len(block)
            writer.write(block)
            await writer.drain()

    async def _travel(self, num_bytes: int) -> None:
        proxy = self.proxy
        seconds = proxy.latency_s
        if proxy.loss and proxy._random.random() < proxy.loss:
            seconds += RESEND_S
        if proxy.bytes_per_s is not None:
            seconds += num_bytes / proxy.bytes_per_s
        if seconds:
            await asyncio.sleep(seconds)
        while proxy._is_cut:
            await asyncio.sleep(_TICK_S)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("listen", help="HOST:PORT")
    parser.add_argument("target", help="HOST:PORT")
    parser.add_argument("--latency-s", type=float, default=0.0)
    parser.add_argument("--loss", type=float, default=0.0)
    parser.add_argument("--bytes-per-s", type=float)
    given = parser.parse_args()

    def pair(text: str) -> tuple[str, int]:
        host, _, port = text.rpartition(":")
        return host, int(port)

    with Proxy(
        pair(given.target),
        listen=pair(given.listen),
        latency_s=given.latency_s,
        loss=given.loss,
        bytes_per_s=given.bytes_per_s,
    ) as proxy:
        print(proxy.address, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
