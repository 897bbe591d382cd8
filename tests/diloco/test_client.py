"""What a client makes of answers: what passes by itself, what needs registering, and what only the user can mend."""

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
import torch

from forgather.diloco.address import ServerAddress
from forgather.diloco.client import Client, RemovedError, UnknownWorkerError, UnreachableError
from forgather.diloco.frame import pack_header
from forgather.diloco.messages import Accepted, Closed, Contribution, Identity, Slice, Values, Version, WantValues
from forgather.diloco.payload import Payload
from forgather.diloco.presence import Heartbeat
from forgather.errors import DistributedError, ForgatherError

TOKEN = "a-token-that-is-not-to-be-seen"
KEY = "a-key-that-is-not-to-be-seen"


@contextmanager
def answering(*answers: bytes, reads_all: bool = True) -> Iterator[tuple[ServerAddress, list[bytes]]]:
    """A server that gives these answers, one a connection, after the request or as soon as it begins."""
    listener = socket.create_server(("127.0.0.1", 0))
    requests: list[bytes] = []

    def serve() -> None:
        for answer in answers:
            connection, _ = listener.accept()
            with connection, suppress(OSError):
                connection.settimeout(5)
                head = b""
                while b"\r\n\r\n" not in head:
                    head += connection.recv(4096)
                text, _, body = head.partition(b"\r\n\r\n")
                lengths = [
                    line.split(b":")[1] for line in text.split(b"\r\n") if line.lower().startswith(b"content-le")
                ]
                left = (int(lengths[0]) if lengths else 0) - len(body)
                requests.append(text)
                if reads_all:
                    while left > 0:
                        left -= len(connection.recv(min(left, 1 << 16)))
                connection.sendall(answer)
                if not reads_all:  # as a server does that has answered early: takes what is still on its way
                    while connection.recv(1 << 16):
                        pass

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        host, port = listener.getsockname()[:2]
        yield ServerAddress(host, port, token=TOKEN), requests
    finally:
        listener.close()
        thread.join(10)


def answer(status: int, content: object = None, body: bytes | None = None) -> bytes:
    data = json.dumps(content).encode() if body is None else body
    return f"HTTP/1.1 {status} Said\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data


def client(address: ServerAddress, **others) -> Client:
    return Client(address, "alpha", KEY, **others)


def contribution(payload: bytes) -> tuple[Identity, Contribution, Payload]:
    header = Contribution(Version(0, "a"), "values", "fp32", [Slice("w", (0,), (2,))])
    whole = Payload.whole(torch.frombuffer(bytearray(payload), dtype=torch.uint8))
    return Identity("alpha", 3, 1, 2), header, whole


def test_a_contribution_is_put_under_its_identity_with_token_and_key():
    with answering(answer(200, {"state": "held", "missing_parts": 1})) as (address, requests):
        speaker = client(address)
        assert speaker.send(*contribution(bytes(8))) == Accepted("held", 1)
        speaker.close()
    assert requests[0].startswith(b"PUT /v1/contributions/alpha/3/1/2 HTTP/1.1")
    assert f"Authorization: Bearer {TOKEN}".encode() in requests[0]
    assert f"X-Worker-Key: {KEY}".encode() in requests[0]


def test_a_closed_round_names_the_open_one():
    with answering(answer(409, {"open": [7, "line"], "error": "closed"})) as (address, _):
        speaker = client(address)
        assert speaker.send(*contribution(bytes(8))) == Closed(Version(7, "line"))
        speaker.close()


def test_an_answer_that_comes_early_is_heard_and_the_rest_is_not_sent():
    payload = bytes(64 << 20)
    with answering(answer(409, {"open": [7, "line"]}), reads_all=False) as (address, _):
        speaker = client(address)
        assert speaker.send(*contribution(payload)) == Closed(Version(7, "line"))
        assert speaker.bytes_up < len(payload)
        speaker.close()


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (404, UnknownWorkerError),
        (503, UnreachableError),
        (507, UnreachableError),  # its disk is full, until somebody makes room
        (408, UnreachableError),
        (410, RemovedError),
        (401, ForgatherError),
        (409, DistributedError),
        (422, DistributedError),
    ],
)
def test_refusals_are_of_their_kind_and_say_nothing_secret(status, kind):
    refusal = answer(status, {"error": "it is so", "fix": "do this"})
    with answering(refusal) as (address, _), pytest.raises(kind) as raised:
        client(address).heartbeat(Heartbeat(1))
    assert isinstance(raised.value, (UnknownWorkerError, UnreachableError)) == (status in (404, 408, 410, 503, 507))
    assert TOKEN not in str(raised.value)
    assert KEY not in str(raised.value)
    assert status in (404, 401) or "it is so" in str(raised.value)
    assert status not in (409, 410, 422) or raised.value.fix == "do this"


def test_a_server_that_is_not_there_may_come():
    with pytest.raises(UnreachableError) as raised:
        client(ServerAddress("127.0.0.1", 9)).heartbeat(Heartbeat(1))
    assert not raised.value.is_there


def test_a_server_that_says_nothing_is_not_waited_for_for_ever():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        speaker = client(ServerAddress(*silent.getsockname()[:2]), timeout_s=0.1)
        with pytest.raises(UnreachableError, match="no answer in time"):
            speaker.heartbeat(Heartbeat(1))


WANT = WantValues([Slice("w", (0,), (2,))], 1, wait_s=0.1)


def values(payload: bytes) -> bytes:
    header = Values(Version(1, "b"), "values", "fp32", 1)
    return pack_header(header.to_json()) + payload


def test_values_are_read_into_where_they_stay_and_the_connection_goes_on():
    room = bytearray(8)
    with answering(answer(200, body=values(b"12345678"))) as (address, _):
        speaker = client(address)
        with speaker.values(0, WANT) as found:
            assert found is not None
            assert found.header.version == Version(1, "b")
            found.read_into(memoryview(room))
        assert bytes(room) == b"12345678"
        assert speaker.bytes_down == 8
        speaker.close()


def test_no_values_yet_is_none():
    with answering(b"HTTP/1.1 204 No Content\r\n\r\n") as (address, _):
        speaker = client(address)
        with speaker.values(0, WANT) as found:
            assert found is None
        speaker.close()


@pytest.mark.parametrize("length", [4, 20])
def test_an_answer_that_breaks_off_is_to_be_asked_for_again(length):
    whole = answer(200, body=values(b"12345678"))
    with answering(whole[: len(whole) - length]) as (address, _):
        speaker = client(address)
        with pytest.raises(UnreachableError), speaker.values(0, WANT) as found:  # noqa: PT012  all of it may raise
            assert found is not None
            found.read_into(memoryview(bytearray(8)))


def test_what_is_aborted_ends_with_an_error_and_is_not_asked_again():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        speaker = client(ServerAddress(*silent.getsockname()[:2]))
        errors: list[BaseException] = []

        def ask() -> None:
            try:
                speaker.heartbeat(Heartbeat(1))
            except UnreachableError as error:
                errors.append(error)

        thread = threading.Thread(target=ask)
        thread.start()
        connection, _ = silent.accept()
        speaker.abort()
        thread.join(5)
        connection.close()
        assert len(errors) == 1
        with pytest.raises(UnreachableError, match="has ended"):
            speaker.heartbeat(Heartbeat(1))
