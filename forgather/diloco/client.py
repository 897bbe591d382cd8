"""A worker's side of the wire: what it asks of a server, over one connection that is opened again when it was lost.

A client belongs to one thread. Tensors go out from their memory and come in to where they stay. Errors are of three
kinds: an `UnreachableError` passes by itself, an `UnknownWorkerError` by registering again, any other needs the user.
"""

import http.client
import json
import select
import socket
import ssl
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from forgather.diloco.address import ENDED, ServerAddress
from forgather.diloco.frame import header_length, pack_header, parse_json
from forgather.diloco.messages import Accepted, Closed, Contribution, Identity, Values, WantValues
from forgather.diloco.payload import DIGEST_BYTES, Payload
from forgather.diloco.presence import Beat, Heartbeat, Register, Registered
from forgather.diloco.settings import Settings
from forgather.diloco.work_units import Lease, Question
from forgather.errors import DistributedError

CHUNK_BYTES = 1 << 20  # asked of the system at once
CONNECT_S = 10.0  # that a connection may take to be made
_MAX_JSON_BYTES = 64 << 20
_BUSY = (408, 425, 429, 500, 502, 503, 504, 507)  # the server lives, and cannot answer or keep anything now


class UnreachableError(DistributedError):
    """The server did not answer, or could not just now; the same request can be made again."""

    is_there = False  # it has answered, so the network is not what is wrong

    def __init__(self, message: str, *, fix: str | None = None, is_there: bool | None = None) -> None:
        super().__init__(message, fix=fix)
        if is_there is not None:
            self.is_there = is_there


class RemovedError(UnreachableError):
    """The operator has removed this worker: nothing that it asks for is answered, and it is to end."""

    is_there = True


class UnknownWorkerError(DistributedError):
    """The server does not know this worker, or not any more."""


class Answer:
    """The values that a server sends: the header, the payload, which is read piece by piece, and digests."""

    def __init__(self, header: Values, response: http.client.HTTPResponse, num_bytes: int, count: "Client") -> None:
        self.header = header
        self.num_bytes = num_bytes  # that are still to be read
        self._response = response
        self._count = count

    def read_into(self, room: memoryview) -> None:
        """Fill `room`; UnreachableError when the connection ends before."""
        done = 0
        if room.nbytes > self.num_bytes:
            raise DistributedError(
                f"the server sends {self.num_bytes:,} bytes where {room.nbytes:,} were expected",
                fix="install the same version of forgather on all machines",
            )
        while done < room.nbytes:
            count = self._response.readinto(room[done : done + CHUNK_BYTES])
            if not count:
                raise ConnectionResetError("the connection ended within an answer")
            done += count
            self._count.bytes_down += count
        self.num_bytes -= done

    def digests(self, count: int) -> list[bytes]:
        """So many digests, which come last."""
        data = bytearray(DIGEST_BYTES * count)
        self.read_into(memoryview(data))
        return [bytes(data[at : at + DIGEST_BYTES]) for at in range(0, len(data), DIGEST_BYTES)]


class Client:
    """Speaks to the server at `address` as one worker. `bytes_up` and `bytes_down` count bodies.

    Everything can be asked again without harm. `timeout_s` bounds how long the network may do nothing.
    """

    def __init__(self, address: ServerAddress, worker: str, key: str, *, timeout_s: float = 60.0) -> None:
        self.address = address
        self.worker = worker
        self.bytes_up = 0
        self.bytes_down = 0
        self._headers = address.headers | {"X-Worker-Key": key}
        self._timeout_s = timeout_s
        self._connection: http.client.HTTPConnection | None = None
        self._lock = threading.Lock()
        self._was_answered = False
        self.is_aborted = False

    def register(self, request: Register) -> Registered:
        return Registered.from_json(self._ask("POST", "/v1/workers", request.to_json()))

    def settings(self) -> Settings:
        """Those of the server, which tells them also to whoever is no worker."""
        return Settings.from_json(self._ask("GET", "/v1/settings"))

    def leave(self) -> None:
        self._ask("DELETE", f"/v1/workers/{self.worker}")

    def heartbeat(self, heartbeat: Heartbeat) -> Beat:
        answer = self._ask("POST", f"/v1/workers/{self.worker}/heartbeat", heartbeat.to_json())
        return Beat(int(answer["sync_every"]), answer.get("command"), int(answer.get("number", 0)))

    def leases(self, question: Question) -> tuple[list[Lease], list[tuple[int, int]]]:
        """The leases that a worker asks for, and which of the rows that it holds it has lost."""
        answer = self._ask("POST", "/v1/units", question.to_json())
        try:
            leases = [Lease(int(first), int(stop) - int(first)) for first, stop in answer["leases"]]
            return leases, [(int(first), int(stop)) for first, stop in answer["lost"]]
        except (KeyError, TypeError, ValueError) as error:
            raise DistributedError(
                f"{self.address} answers a request for rows with {str(answer)[:80]}",
                fix="install the same version of forgather on all machines",
            ) from error

    def save(self) -> None:
        """Have the server save; return when it has."""
        self._ask("POST", "/v1/control/save")

    def send(self, identity: Identity, contribution: Contribution, payload: Payload) -> Accepted | Closed:
        """Bring one part of a contribution, as its bytes come to be there; raises what keeps them from that."""
        path = f"/v1/contributions/{identity.worker}/{identity.round}/{identity.fragment}/{identity.part}"
        header = pack_header(contribution.to_json())
        with self._exchanging() as connection:
            connection.putrequest("PUT", path)
            for name, text in self._headers.items():
                connection.putheader(name, text)
            connection.putheader("Content-Type", "application/octet-stream")
            connection.putheader("Content-Length", str(len(header) + payload.num_bytes + DIGEST_BYTES))
            connection.endheaders()
            # What is sent into a connection that the server has closed may be lost together with its reason.
            is_sent = False
            with suppress(BrokenPipeError, ConnectionResetError):
                is_sent = self._send_all(connection, _body(header, payload))
            response = connection.getresponse()
            data = response.read(_MAX_JSON_BYTES)
            if not is_sent:
                self.close()  # the rest of this body would be taken for another request
            if response.status == 409 and "open" in (answer := parse_json(data)):
                return Closed.from_json(answer)
            self._require_good(response.status, data)
            answer = parse_json(data)
            return Accepted(answer["state"], int(answer.get("missing_parts", 0)))

    @contextmanager
    def values(self, fragment: int, want: WantValues) -> Iterator[Answer | None]:
        """Ask for values; None when there are none yet. Whoever asks reads all of the answer's payload."""
        with self._exchanging() as connection:
            body = json.dumps(want.to_json()).encode()
            headers = self._headers | {"Content-Type": "application/json"}
            connection.request("POST", f"/v1/values/{fragment}", body, headers)
            assert connection.sock is not None, "a request was sent over it"
            connection.sock.settimeout(self._timeout_s + want.wait_s)
            response = connection.getresponse()
            if response.status == 204:
                response.read()
                yield None
                return
            if response.status != 200:
                self._require_good(response.status, response.read(_MAX_JSON_BYTES))
            length = header_length(_read_exactly(response, 4))
            header = Values.from_json(parse_json(_read_exactly(response, length)))
            total = int(response.headers["Content-Length"] or 0)
            answer = Answer(header, response, total - length - 4, self)
            yield answer
            if answer.num_bytes == 0:
                response.read()  # lets the connection be used again
            else:
                self.close()

    def abort(self) -> None:
        """Let what this client is doing in another thread end with an error, and all that is asked of it later."""
        self.is_aborted = True
        self.interrupt()

    def interrupt(self) -> None:
        """Let what this client is doing in another thread end with an error."""
        with self._lock:
            if self._connection is not None and self._connection.sock is not None:
                with suppress(OSError):
                    self._connection.sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Let go of the connection; the next request opens another."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    def _ask(self, method: str, path: str, content: Any = None) -> Any:
        with self._exchanging() as connection:
            body = None if content is None else json.dumps(content).encode()
            connection.request(method, path, body, self._headers | {"Content-Type": "application/json"})
            response = connection.getresponse()
            data = response.read(_MAX_JSON_BYTES)
            self._require_good(response.status, data)
            return parse_json(data) if data else {}

    @contextmanager
    def _exchanging(self) -> Iterator[http.client.HTTPConnection]:
        """The connection, for one request and its answer. Whatever goes wrong with it closes it."""
        try:
            with self._lock:
                if self._connection is None:
                    self._connection = self.address.connection(min(CONNECT_S, self._timeout_s))
                connection = self._connection
            if connection.sock is None and not self.is_aborted:
                connection.connect()
            if self.is_aborted:  # perhaps while it was connecting, when there was nothing yet to interrupt
                raise UnreachableError("this worker has ended its exchanges")
            connection.sock.settimeout(self._timeout_s)
            yield connection
            self._was_answered = True
        except (OSError, http.client.HTTPException) as error:
            self.close()
            if isinstance(error, ssl.SSLError) and not isinstance(error, ssl.SSLEOFError):
                raise self.address.unreachable(error) from error  # a wrong certificate does not mend itself
            ended = ENDED if self.address.tls is not None else (ConnectionResetError, http.client.HTTPException)
            if isinstance(error, ended) and not self._was_answered:
                said = self.address.unreachable(error)  # what that may be: TLS on one side alone, for one
                raise UnreachableError(said.message, fix=said.fix) from error
            raise UnreachableError(f"{self.address}: {_reason(error)}") from error
        except BaseException:
            self.close()  # an answer that was not read to its end cannot be followed by another
            raise

    def _send_all(self, connection: http.client.HTTPConnection, blocks: Iterable[bytes | memoryview]) -> bool:
        """Send the blocks; False where the server has answered before it had all of them."""
        sock = connection.sock
        assert sock is not None, "the headers were sent over it"
        # Over TLS the socket is also readable for what belongs to TLS alone.
        is_plain = not isinstance(sock, ssl.SSLSocket)
        for block in blocks:
            if is_plain and select.select([sock], [], [], 0)[0]:
                return False
            sock.sendall(block)  # block by block, since a timeout holds for the whole of a call
            self.bytes_up += len(block)
        return True

    def _require_good(self, status: int, data: bytes) -> None:
        if status < 400:
            return
        if status == 404:
            raise UnknownWorkerError(f"{self.address} does not know the worker {self.worker!r}, or what it asks for")
        if status == 410:
            refused = self.address.refused(status, data)
            raise RemovedError(refused.message, fix=refused.fix)
        if status in _BUSY:
            raise UnreachableError(f"{self.address}: {self.address.refused(status, data).message}", is_there=True)
        raise self.address.refused(status, data)


def _body(header: bytes, payload: Payload) -> Iterator[bytes | memoryview]:
    yield header
    yield from payload.blocks()
    yield payload.digest


def _read_exactly(response: http.client.HTTPResponse, num_bytes: int) -> bytes:
    data = response.read(num_bytes)
    if len(data) != num_bytes:
        raise ConnectionResetError("the connection ended within an answer")
    return data


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
