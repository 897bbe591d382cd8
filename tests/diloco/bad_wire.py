"""What stands between a worker and a server in tests: forwards everything, until it is told to fail."""

import socket
import threading
from contextlib import suppress
from types import TracebackType
from typing import Self

from forgather.diloco.address import ServerAddress
from tests.diloco.running_server import TOKEN, RunningServer


class BadWire:
    """Forwards connections to a server at `address`. `cut` ends all and refuses new ones, until `mend`.

    `lose_reply(prefix)` lets the next request that begins so arrive, and the connection end when its reply comes.
    `requests` counts what was asked for, by method and path.
    """

    def __init__(self, server: RunningServer | None = None) -> None:
        self._server = server
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._is_cut = False
        self._losing: bytes | None = None
        self.lost = threading.Event()
        self.requests: list[str] = []
        self._threads: list[threading.Thread] = []
        self._closed = False

    @property
    def address(self) -> ServerAddress:
        host, port = self._listener.getsockname()[:2]
        return ServerAddress(host, port, token=TOKEN)

    @classmethod
    def between(cls) -> Self:
        """One whose server is told by `mend`."""
        return cls(None)

    def cut(self) -> None:
        with self._lock:
            self._is_cut = True
            for each in self._open:
                with suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)

    def mend(self, server: RunningServer | None = None) -> None:
        with self._lock:
            self._server = server or self._server
            self._is_cut = False

    def lose_reply(self, prefix: str) -> None:
        self.lost.clear()
        self._losing = prefix.encode()

    def __enter__(self) -> Self:
        self._start(self._accept)
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self._closed = True
        self.cut()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in list(self._threads):
            thread.join(10)

    def _start(self, body, *args) -> None:
        thread = threading.Thread(target=body, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._closed:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                if self._is_cut or self._server is None:
                    client.close()
                    continue
                try:
                    server = socket.create_connection((self._server.host, self._server.port))
                except OSError:
                    client.close()
                    continue
                self._open |= {client, server}
            is_losing = threading.Event()
            self._start(self._forward, client, server, is_losing, True)
            self._start(self._forward, server, client, is_losing, False)

    def _forward(self, source: socket.socket, target: socket.socket, is_losing: threading.Event, is_up: bool) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                if is_up and data[:4] in (b"PUT ", b"POST", b"DELE", b"GET "):
                    self.requests.append(data.split(b" HTTP/", 1)[0].decode())
                    if self._losing is not None and data.startswith(self._losing):
                        self._losing = None
                        is_losing.set()
                if not is_up and is_losing.is_set():
                    self.lost.set()
                    break
                target.sendall(data)
        for each in (source, target):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        if not is_up:
            with self._lock:
                self._open -= {source, target}
            source.close()
            target.close()
