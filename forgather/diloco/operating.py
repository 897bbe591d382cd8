"""What operators ask of a server: how it is doing, what is to change, and how fast the line to it is."""

import asyncio
from collections.abc import Sequence

from aiohttp import web

from forgather.diloco.frame import ProtocolError
from forgather.diloco.request import COORDINATOR, TIMES, Body, json_of

MAX_PROBE_BYTES = 1 << 30
_BLOCK = bytes(1 << 20)


def operating() -> Sequence[web.RouteDef]:
    """The routes."""
    return [
        web.get("/v1/settings", _settings),
        web.get("/v1/status", _status),
        web.post("/v1/control/{action}", _control),
        web.post("/v1/probe", _probe),
    ]


async def _settings(request: web.Request) -> web.Response:
    return web.json_response(request.app[COORDINATOR].settings.to_json())


async def _status(request: web.Request) -> web.Response:
    return web.json_response(request.app[COORDINATOR].status())


async def _control(request: web.Request) -> web.Response:
    coordinator = request.app[COORDINATOR]
    controls = coordinator.controls
    action = request.match_info["action"]
    arguments = await json_of(request) if request.can_read_body else {}
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
    blocks = Body(request)
    async for _ in blocks:
        pass
    if not wanted:
        return web.json_response({"received": blocks.received})
    response = web.StreamResponse(headers={"X-Received": str(blocks.received)})
    response.content_length = wanted
    await response.prepare(request)
    for start in range(0, wanted, len(_BLOCK)):
        async with asyncio.timeout(request.app[TIMES][0]):
            await response.write(_BLOCK[: wanted - start])
    await response.write_eof()
    return response
