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
from contextlib import asynccontextmanager

from aiohttp import web
from aiohttp.http_exceptions import BadHttpMessage

from forgather.diloco.coordinator import STEP_WAIT_S, Coordinator
from forgather.diloco.downloads import ChangedError
from forgather.diloco.frame import MAX_HEADER_BYTES, ProtocolError, parse_json
from forgather.diloco.messages import Closed, Contribution, Identity, WantValues
from forgather.diloco.operating import operating
from forgather.diloco.payload import DIGEST_BYTES
from forgather.diloco.presence import Heartbeat, Register
from forgather.diloco.request import COORDINATOR, MAX_JSON_BYTES, TIMES, Body, json_of, key_of
from forgather.diloco.security import CHALLENGE, is_authorized
from forgather.errors import ConfigError, ForgatherError

IDLE_S = 30.0  # a client that sends nothing for so long has gone
SLOWEST_BYTES_PER_S = 10_000  # and so has one that keeps its room for longer than this takes
_TOKEN = web.AppKey("token", str)
_CONTRIBUTION = "contribution"

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
    application[TIMES] = (idle_s, slowest_bytes_per_s)
    if token is not None:
        application[_TOKEN] = token
    application.add_routes(
        [
            web.post("/v1/workers", _register),
            web.delete("/v1/workers/{worker}", _leave),
            web.post("/v1/workers/{worker}/heartbeat", _beat),
            web.put(
                r"/v1/contributions/{worker}/{round:\d+}/{fragment:\d+}/{part:\d+}", _contribute, name=_CONTRIBUTION
            ),
            web.post(r"/v1/values/{fragment:\d+}", _values),
            web.post("/v1/units", _unit),
            *operating(),
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
        if error.status in (400, 413, 422) and request.match_info.route.name == _CONTRIBUTION:
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
    registered = coordinator.register(Register.from_json(await json_of(request)))
    return web.json_response(registered.to_json())


async def _leave(request: web.Request) -> web.Response:
    request.app[COORDINATOR].leave(request.match_info["worker"], key_of(request))
    return web.json_response({})


async def _beat(request: web.Request) -> web.Response:
    heartbeat = Heartbeat.from_json(await json_of(request))
    beat = request.app[COORDINATOR].beat(request.match_info["worker"], key_of(request), heartbeat)
    return web.json_response(beat.to_json())


async def _contribute(request: web.Request) -> web.Response:
    coordinator = request.app[COORDINATOR]
    identity = _identity(request)
    member = coordinator.members.require(identity.worker, key_of(request))
    blocks = Body(request)
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
    want = WantValues.from_json(await json_of(request, MAX_HEADER_BYTES))
    member = coordinator.members.with_key(key_of(request))
    worker = None if member is None else member.name
    answer = await coordinator.answer(int(request.match_info["fragment"]), want, worker)
    if answer is None:
        return web.Response(status=204)
    response = web.StreamResponse(headers={"Content-Type": "application/octet-stream"})
    response.content_length = answer.num_bytes + DIGEST_BYTES * len(answer.slices)
    idle_s, _ = request.app[TIMES]
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
            assert digesting is not None, "an answer has a header at least"
            async with asyncio.timeout(STEP_WAIT_S):
                digests = await digesting
            if not answer.is_current:
                raise ChangedError
            async with asyncio.timeout(idle_s):
                await response.write(b"".join(digests))
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


async def _unit(request: web.Request) -> web.Response:
    coordinator = request.app[COORDINATOR]
    return web.json_response(await coordinator.unit(await json_of(request), key_of(request)))


def _identity(request: web.Request) -> Identity:
    found = request.match_info
    numbers = [int(found[name]) for name in ("round", "fragment", "part") if len(found[name]) < 19]
    if len(numbers) != 3:
        raise ProtocolError("a round, a fragment and a part are numbers below 2**62", status=422)
    return Identity(found["worker"], *numbers)
