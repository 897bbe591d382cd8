"""The network to a server is measured in bounded time, both ways, and what is not a server is named."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from forgather.diloco.address import ServerAddress
from forgather.diloco.probe import measure
from forgather.diloco.security import SecurityError
from forgather.errors import DistributedError
from tests.diloco.running_server import running_server

STEP_BYTES = 16 << 10


class SlowHandler(BaseHTTPRequestHandler):
    """Takes and gives bytes no faster than `rates`, up and down."""

    protocol_version = "HTTP/1.1"
    rates = (1e9, 1e9)
    free_bytes = 0  # that are given at once, as by a link that has saved up its rate
    wait_s = 0.0
    lie = 0

    def do_POST(self) -> None:
        wanted = int(self.path.partition("send=")[2] or 0)
        left = received = int(self.headers["Content-Length"])
        while left:
            left -= len(self.rfile.read(min(left, STEP_BYTES)))
            time.sleep(STEP_BYTES / self.rates[0])
        time.sleep(self.wait_s)
        answer = b"x" * wanted if wanted else b'{"received": %d}' % (received + self.lie)
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        try:
            for start in range(0, len(answer), STEP_BYTES):
                self.wfile.write(answer[start : start + STEP_BYTES])
                if start + STEP_BYTES > self.free_bytes and wanted:
                    time.sleep(STEP_BYTES / self.rates[1])
        except OSError:
            pass  # the probe's time was over
        self.wfile.flush()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@contextmanager
def slow_server(**traits: object) -> Iterator[ServerAddress]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (SlowHandler,), traits))
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield ServerAddress("127.0.0.1", server.server_address[1])
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_running_server_is_measured_both_ways(tmp_path):
    with running_server(tmp_path, {"w": torch.zeros(8)}) as server:
        start = time.monotonic()
        link = measure(ServerAddress(server.host, server.port, token=server.token), seconds=0.5)
        assert time.monotonic() - start < 1.5
        assert 0 < link.latency_s < 0.5
        assert link.up_bytes_per_s > 1e6
        assert link.down_bytes_per_s > 1e6
        assert server.status()["bytes_up"] == 0, "it is no exchange"
        with pytest.raises(SecurityError, match="another token"):
            measure(ServerAddress(server.host, server.port, token="another"), seconds=0.5)


def test_each_direction_has_its_own_rate():
    with slow_server(rates=(4e6, 1e6), wait_s=0.02) as address:
        link = measure(address, seconds=1.0)
    # A server that sleeps is on a busy machine slower than it says; faster only by what is taken for latency.
    assert 4e6 / 4 < link.up_bytes_per_s < 4e6 * 1.5
    assert 1e6 / 4 < link.down_bytes_per_s < 1e6 * 1.5
    assert link.up_bytes_per_s > 1.5 * link.down_bytes_per_s
    assert 0.02 < link.latency_s < 0.2


def test_a_network_that_slows_down_ends_the_measurement_in_time():
    with slow_server(rates=(1e9, 2e5), free_bytes=64 << 10) as address:
        start = time.monotonic()
        link = measure(address, seconds=1.0)
        assert time.monotonic() - start < 2.0
    assert link.down_bytes_per_s < 2e6, "no more than what was under way in that time, and by far not the first rate"


def test_a_network_that_passes_next_to_nothing_is_said_to():
    with slow_server(rates=(1e5, 1e5)) as address:
        start = time.monotonic()
        with pytest.raises(DistributedError, match="less than 64 KiB pass") as caught:
            measure(address, seconds=0.5)
        assert time.monotonic() - start < 1.0
    assert caught.value.fix is not None


def test_a_listener_that_never_answers_is_given_up():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        start = time.monotonic()
        with pytest.raises(DistributedError, match="does not answer"):
            measure(ServerAddress("127.0.0.1", listener.getsockname()[1]), seconds=0.5)
        assert time.monotonic() - start < 1.0


def test_nobody_there_is_said():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(DistributedError, match="no DiLoCo server at"):
        measure(ServerAddress("127.0.0.1", port), seconds=0.5)


def test_who_counts_wrong_is_no_server():
    with slow_server(lie=1) as address, pytest.raises(DistributedError, match="counts 1 bytes of 0"):
        measure(address, seconds=0.5)
