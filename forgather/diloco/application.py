"""The server's HTTP side: routes, who may speak, and bodies that are streamed.

    POST   /v1/workers                                        come
    DELETE /v1/workers/{worker}                               leave
    POST   /v1/workers/{worker}/heartbeat                     live
    PUT    /v1/contributions/{worker}/{round}/{fragment}/{part}
    POST   /v1/values/{fragment}
    POST   /v1/units        GET /v1/settings   GET /v1/package
    GET    /v1/status       GET /metrics       GET /
    POST   /v1/control/{action}
    POST   /v1/probe

No body with tensors is ever whole in memory beside the place where it stays. A refusal is `{"error", "fix"}`.
"""

import asyncio
import errno
import logging
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, Self

from aiohttp import web
from aiohttp.http_exceptions import BadHttpMessage

from forgather.diloco.coordinator import Coordinator
from forgather.diloco.downloads import ChangedError
from forgather.diloco.fragment_values import Answer
from forgather.diloco.messages import (
    MAX_HEADER_BYTES,
    Closed,
    Contribution,
    Heartbeat,
    Identity,
    ProtocolError,
    Register,
    WantValues,
    header_length,
    parse_json,
)
from forgather.diloco.payload import DIGEST_BYTES
from forgather.diloco.security import CHALLENGE, is_authorized
from forgather.errors import ConfigError, ForgatherError

IDLE_S = 30.0  # a client that sends nothing for so long has gone
SLOWEST_BYTES_PER_S = 10_000  # and so has one that keeps its room for longer than this takes
MAX_JSON_BYTES = 1 << 20
MAX_PROBE_BYTES = 1 << 30
KEY_HEADER = "X-Worker-Key"
COORDINATOR = web.AppKey("coordinator", Coordinator)
_TOKEN = web.AppKey("token", str)
_TIMES = web.AppKey("times", tuple[float, float])
_BLOCK = bytes(1 << 20)

_LOG = logging.getLogger("forgather.diloco.http")
# Whoever sends what is no HTTP is told so; a traceback for each would fill the server's log.
_LOG.addFilter(lambda record: not (record.exc_info and isinstance(record.exc_info[1], BadHttpMessage)))

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def make_application(
    coordinator: Coordinator,
    token: str | None,
    *,
    extra: Sequence[web.AbstractRouteDef] = (),
    idle_s: float = IDLE_S,
    slowest_bytes_per_s: float = SLOWEST_BYTES_PER_S,
) -> web.Application:
    """The routes of a server. Without a `token` everybody may speak; `extra` routes are guarded as all others are."""
    application = web.Application(middlewares=[_guarded, _answered], client_max_size=MAX_JSON_BYTES)
    application[COORDINATOR] = coordinator
    application[_TIMES] = (idle_s, slowest_bytes_per_s)
    if token is not None:
        application[_TOKEN] = token
    application.add_routes(
        [
            web.post("/v1/workers", _register),
            web.delete("/v1/workers/{worker}", _leave),
            web.post("/v1/workers/{worker}/heartbeat", _beat),
            web.put(r"/v1/contributions/{worker}/{round:\d+}/{fragment:\d+}/{part:\d+}", _contribute),
            web.post(r"/v1/values/{fragment:\d+}", _values),
            web.post("/v1/units", _unit),
            web.get("/v1/settings", _settings),
            web.get("/v1/status", _status),
            web.post("/v1/control/{action}", _control),
            web.post("/v1/probe", _probe),
            *extra,
        ]
    )
    return application


@asynccontextmanager
async def serving(
    coordinator: Coordinator,
    token: str | None,
    host: str,
    port: int,
    *,
    tls: ssl.SSLContext | None = None,
    extra: Sequence[web.AbstractRouteDef] = (),
    idle_s: float = IDLE_S,
    slowest_bytes_per_s: float = SLOWEST_BYTES_PER_S,
) -> AsyncIterator[tuple[str, int]]:
    """Serve while the block runs; gives the address, whose port is a free one where `port` is 0.

    ConfigError when the address cannot be had.
    """
    application = make_application(
        coordinator, token, extra=extra, idle_s=idle_s, slowest_bytes_per_s=slowest_bytes_per_s
    )
    # Answers that have begun are finished when it ends; a worker that waits for values is told to come again.
    runner = web.AppRunner(application, access_log=None, logger=_LOG, shutdown_timeout=5.0, lingering_time=30.0)
    await runner.setup()
    try:
        site = web.TCPSite(runner, host, port, ssl_context=tls)
        try:
            await site.start()
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            raise ConfigError(
                f"cannot listen on {host}:{port}: {error.strerror}",
                fix="end the other server there, or --port another" if taken else "--host an address of this machine",
            ) from error
        address = runner.addresses[0]
        async with coordinator:
            yield str(address[0]), int(address[1])
    finally:
        await runner.cleanup()


async def serve(
    coordinator: Coordinator,
    token: str | None,
    host: str,
    port: int,
    *,
    tls: ssl.SSLContext | None = None,
    extra: Sequence[web.AbstractRouteDef] = (),
    ready: Callable[[str, int], None] | None = None,
) -> None:
    """Serve until somebody shuts the coordinator down; `ready` is called with the address when it is bound."""
    async with serving(coordinator, token, host, port, tls=tls, extra=extra) as address:
        if ready is not None:
            ready(*address)
        await coordinator.stopped.wait()


@web.middleware
async def _guarded(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Lets those in who have the token, or a certificate; says nothing to others."""
    is_welcome = is_authorized(
        request.headers.get("Authorization"),
        request.app.get(_TOKEN),
        method=request.method,
        origin=request.headers.get("Origin"),
        # Only asked for, and then verified, where the server was given an authority for it.
        has_certificate=bool(request.get_extra_info("peercert")),
    )
    if not is_welcome:
        return web.json_response({"error": "unauthorized"}, status=401, headers={"WWW-Authenticate": CHALLENGE})
    return await handler(request)


@web.middleware
async def _answered(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Makes answers of refusals."""
    try:
        if request.app[COORDINATOR].stopped.is_set() and request.method != "GET":
            raise ProtocolError("the server is being shut down", status=503, fix="try again when it is back")
        return await handler(request)
    except ProtocolError as error:
        if error.status in (400, 413, 422):
            request.app[COORDINATOR].num_refused += 1
        return _refusal(error, error.status)
    except ForgatherError as error:
        return _refusal(error, 400)
    except (ConnectionError, web.RequestPayloadError):
        return _refusal(ProtocolError("the body was torn", fix="send it again"), 400)  # for whoever is still there
    except TimeoutError:
        return _refusal(ProtocolError("this request took too long to arrive", fix="send it again"), 408)
    except web.HTTPException as error:
        if error.status < 400:
            raise
        return _refusal(ProtocolError(error.reason), error.status)


def _refusal(error: ForgatherError, status: int) -> web.Response:
    headers = {"Retry-After": "1"} if status == 503 else None
    return web.json_response({"error": error.message, "fix": error.fix}, status=status, headers=headers)


async def _register(request: web.Request) -> web.Response:
    coordinator = request.app[COORDINATOR]
    registered = coordinator.register(Register.from_json(await _json(request)))
    return web.json_response(registered.to_json())


async def _leave(request: web.Request) -> web.Response:
    request.app[COORDINATOR].leave(request.match_info["worker"], _key(request))
    return web.json_response({})


async def _beat(request: web.Request) -> web.Response:
    heartbeat = Heartbeat.from_json(await _json(request))
    beat = request.app[COORDINATOR].beat(request.match_info["worker"], _key(request), heartbeat)
    return web.json_response(beat.to_json())


async def _contribute(request: web.Request) -> web.Response:
    coordinator = request.app[COORDINATOR]
    identity = _identity(request)
    member = coordinator.members.require(identity.worker, _key(request))
    blocks = _Blocks(request)
    header = Contribution.from_json(parse_json(await blocks.header()))
    await coordinator.check(header)
    plan = coordinator.intake.plan(identity, header)
    if blocks.remaining is None or blocks.remaining != plan.num_bytes + DIGEST_BYTES:
        payload = max(0, (blocks.remaining or 0) - DIGEST_BYTES)
        raise ProtocolError(
            f"the payload has {payload:,} bytes, and the header tells of {plan.num_bytes:,}",
            status=422,
            fix="send each slice as its codec encodes it, then the digest, with a Content-Length",
        )
    answer = await coordinator.intake.verdict(identity, header)
    if answer is None:
        answer = await coordinator.intake.receive(member, identity, header, plan, blocks)
        coordinator.wake()
    member.bytes_up += blocks.received
    coordinator.bytes_up += blocks.received
    if isinstance(answer, Closed):
        return web.json_response(
            answer.to_json()
            | {
                "error": f"round {identity.round} is not open",
                "fix": f"send differences for round {answer.open.number}",
            },
            status=409,
        )
    return web.json_response(answer.to_json())


async def _values(request: web.Request) -> web.StreamResponse:
    coordinator = request.app[COORDINATOR]
    want = WantValues.from_json(await _json(request, MAX_HEADER_BYTES))
    member = coordinator.members.with_key(request.headers.get(KEY_HEADER, ""))
    worker = None if member is None else member.name
    answer = await coordinator.answer(int(request.match_info["fragment"]), want, worker)
    if answer is None:
        return web.Response(status=204)
    response = web.StreamResponse(headers={"Content-Type": "application/octet-stream"})
    response.content_length = answer.num_bytes + DIGEST_BYTES * len(answer.slices)
    idle_s, _ = request.app[_TIMES]
    await response.prepare(request)
    digesting: asyncio.Task[list[bytes]] | None = None
    try:
        with answer.values.downloads.sending(worker or "", answer.slices):
            for block in answer.blocks():
                if block is None:
                    await coordinator.change_goes_on(answer)
                    continue
                async with asyncio.timeout(idle_s):
                    await response.write(block)
                # Beside the sending, when what was sent has been taken: who takes nothing gets no work done.
                digesting = digesting or asyncio.create_task(coordinator.digests(answer))
                coordinator.bytes_down += len(block)
                if member is not None:
                    member.bytes_down += len(block)
            digests = b"".join(await _digests(coordinator, answer, digesting))
            async with asyncio.timeout(idle_s):
                await response.write(digests)
    except (ChangedError, TimeoutError):
        # Its length is told already: an answer that is too short is one to ask for again.
        if request.transport is not None:
            request.transport.abort()
        return response
    finally:
        if digesting is not None:
            digesting.cancel()
            await asyncio.gather(digesting, return_exceptions=True)
        await coordinator.tell()  # a version may be waiting for it
    await response.write_eof()
    return response


async def _digests(coordinator: Coordinator, answer: Answer, begun: asyncio.Task[list[bytes]] | None) -> list[bytes]:
    """Those of an answer all of which was sent. ChangedError when there are other values by now."""
    if begun is not None:
        with suppress(TimeoutError):  # it had waited since the beginning, and the values may have come since
            digests = await begun
            if answer.is_current:
                return digests
            raise ChangedError
    return await coordinator.digests(answer)


async def _unit(request: web.Request) -> web.Response:
    coordinator = request.app[COORDINATOR]
    return web.json_response(await coordinator.unit(await _json(request), _key(request)))


async def _settings(request: web.Request) -> web.Response:
    return web.json_response(request.app[COORDINATOR].settings.to_json())


async def _status(request: web.Request) -> web.Response:
    return web.json_response(request.app[COORDINATOR].status())


async def _control(request: web.Request) -> web.Response:
    coordinator = request.app[COORDINATOR]
    controls = coordinator.controls
    action = request.match_info["action"]
    arguments = await _json(request) if request.can_read_body else {}
    if not isinstance(arguments, dict):
        raise ProtocolError("the arguments of a control are a JSON object")
    match action, arguments:
        case "save", {}:
            return web.json_response({"step": await controls.save()})
        case "drain", {}:
            controls.drain()
        case "shutdown", {}:
            coordinator.shutdown()
        case "kick", {"worker": str(worker)}:
            controls.kick(worker)
        case "set", {}:
            return web.json_response(controls.set(**arguments))
        case "command", {"command": str(command)}:
            one = arguments.get("worker")
            if one is not None and not isinstance(one, str):
                raise ProtocolError("`worker` is a name, or null for all")
            return web.json_response({"workers": controls.command(one, command)})
        case (("kick" | "command"), _):
            raise ProtocolError(f"{action} lacks an argument", fix='{"worker": NAME} for kick, {"command": ...}')
        case _:
            raise ProtocolError(
                f"there is no control {action!r}", status=404, fix="save, drain, kick, shutdown, set or command"
            )
    return web.json_response({})


async def _probe(request: web.Request) -> web.StreamResponse:
    """Counts what comes, and sends as many bytes as `?send=` asks for: for measurements of the network."""
    try:
        wanted = int(request.query.get("send", "0"))
    except ValueError:
        raise ProtocolError("?send= is a number of bytes") from None
    if not 0 <= wanted <= MAX_PROBE_BYTES or (request.content_length or 0) > MAX_PROBE_BYTES:
        raise ProtocolError(f"a probe has at most {MAX_PROBE_BYTES:,} bytes", status=413)
    blocks = _Blocks(request)
    async for _ in blocks:
        pass
    if not wanted:
        return web.json_response({"received": blocks.received})
    response = web.StreamResponse(headers={"X-Received": str(blocks.received)})
    response.content_length = wanted
    await response.prepare(request)
    for start in range(0, wanted, len(_BLOCK)):
        async with asyncio.timeout(request.app[_TIMES][0]):
            await response.write(_BLOCK[: wanted - start])
    await response.write_eof()
    return response


class _Blocks:
    """A request's body as it comes. TimeoutError for a client that stops, or is far too slow."""

    def __init__(self, request: web.Request) -> None:
        self._request = request
        self._idle_s, slowest = request.app[_TIMES]
        self._loop = asyncio.get_running_loop()
        self._until = self._loop.time() + self._idle_s + (request.content_length or 0) / slowest
        self.received = 0

    @property
    def remaining(self) -> int | None:
        """The bytes that are still to come, by the Content-Length."""
        length = self._request.content_length
        return None if length is None else length - self.received

    async def header(self) -> bytes:
        """The header of a body with tensors."""
        length = header_length(await self._exactly(4))
        return await self._exactly(length)

    def __aiter__(self) -> Self:
        """What is left, as it comes."""
        return self

    async def __anext__(self) -> bytes:
        block = self._request.content.read_nowait()  # what is there needs no timer
        if not block:
            async with asyncio.timeout_at(min(self._loop.time() + self._idle_s, self._until)):
                block = await self._request.content.readany()
        if not block:
            raise StopAsyncIteration
        self.received += len(block)
        return block

    async def _exactly(self, length: int) -> bytes:
        try:
            async with asyncio.timeout_at(min(self._loop.time() + 4 * self._idle_s, self._until)):
                data = await self._request.content.readexactly(length)
        except asyncio.IncompleteReadError:
            raise ProtocolError("the body ends before its header does") from None
        self.received += length
        return data


def _identity(request: web.Request) -> Identity:
    found = request.match_info
    numbers = [int(found[name]) for name in ("round", "fragment", "part") if len(found[name]) < 19]
    if len(numbers) != 3:
        raise ProtocolError("a round, a fragment and a part are numbers below 2**62", status=422)
    return Identity(found["worker"], *numbers)


def _key(request: web.Request) -> str:
    return request.headers.get(KEY_HEADER, "")


async def _json(request: web.Request, most: int = MAX_JSON_BYTES) -> Any:
    if (request.content_length or 0) > most:
        raise ProtocolError(f"a body of {request.content_length:,} bytes; the most is {most:,}", status=413)
    data = bytearray()
    async for block in _Blocks(request):
        data += block
        if len(data) > most:
            raise ProtocolError(f"a body of more than {most:,} bytes", status=413)
    return parse_json(bytes(data))
