"""The bad network of tests/proxy.py is as bad as it says."""

import http.client
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.proxy import Proxy


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.heard: list[int] = []


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.heard.append(len(body))
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"ok")

    def log_message(self, *arguments: object) -> None: ...


@pytest.fixture
def server():
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def put(proxy: Proxy, size: int, timeout: float = 5.0) -> float:
    """Seconds until the answer is there."""
    host, _, port = proxy.address.rpartition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=timeout)
    begun = time.monotonic()
    try:
        connection.request("PUT", "/there", bytes(size))
        assert connection.getresponse().read() == b"ok"
    finally:
        connection.close()
    return time.monotonic() - begun


def test_it_forwards_and_counts(server):
    with Proxy(server.server_address) as proxy:
        put(proxy, 300_000)
        assert server.heard == [300_000]
        assert 300_000 < proxy.up_bytes < 301_000
        assert proxy.requests == ["PUT /there HTTP/1.1"]


def test_latency_is_waited_for_both_ways(server):
    with Proxy(server.server_address, latency_s=0.1) as proxy:
        assert 0.2 <= put(proxy, 10) < 1


def test_a_narrow_line_takes_its_time(server):
    with Proxy(server.server_address, bytes_per_s=1_000_000) as proxy:
        assert 0.3 <= put(proxy, 300_000) < 1


def test_every_lost_block_costs_a_resend(server):
    with Proxy(server.server_address, loss=1.0) as proxy:
        assert put(proxy, 10) >= 0.4


def test_a_lost_reply_was_heard(server):
    with Proxy(server.server_address) as proxy:
        proxy.lose_replies("PUT", 1)
        with pytest.raises((http.client.HTTPException, OSError)):
            put(proxy, 10)
        assert server.heard == [10]
        put(proxy, 20)
        assert server.heard == [10, 20]


def test_a_torn_request_was_not_heard(server):
    with Proxy(server.server_address) as proxy:
        proxy.tear(100_000)
        with pytest.raises((http.client.HTTPException, OSError)):
            put(proxy, 300_000)
        put(proxy, 20)
        assert 300_000 not in server.heard


def test_a_cut_tells_nobody_and_is_mended(server):
    with Proxy(server.server_address) as proxy:
        proxy.cut()
        with pytest.raises(TimeoutError):
            put(proxy, 10, timeout=0.3)
        proxy.mend()
        put(proxy, 10)
