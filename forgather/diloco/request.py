"""What handlers read of a request: its coordinator, who asks, JSON, and a body as it comes."""

import asyncio
from typing import Any, Self

from aiohttp import web

from forgather.diloco.coordinator import Coordinator
from forgather.diloco.frame import ProtocolError, header_length, parse_json

MAX_JSON_BYTES = 1 << 20
KEY_HEADER = "X-Worker-Key"
COORDINATOR = web.AppKey("coordinator", Coordinator)
# Seconds after which a client that sends nothing has gone; bytes a second below which one has, too.
TIMES = web.AppKey("times", tuple[float, float])


class Body:
    """A request's body as it comes. TimeoutError for a client that stops, or is far too slow."""

    def __init__(self, request: web.Request) -> None:
        self._request = request
        self._idle_s, slowest = request.app[TIMES]
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


def key_of(request: web.Request) -> str:
    """The key that whoever asks says it has; empty for none."""
    return request.headers.get(KEY_HEADER, "")


async def json_of(request: web.Request, most: int = MAX_JSON_BYTES) -> Any:
    """The body as JSON. ProtocolError for what is none (400), or is longer than `most` bytes (413)."""
    if (request.content_length or 0) > most:
        raise ProtocolError(f"a body of {request.content_length:,} bytes; the most is {most:,}", status=413)
    data = bytearray()
    async for block in Body(request):
        data += block
        if len(data) > most:
            raise ProtocolError(f"a body of more than {most:,} bytes", status=413)
    return parse_json(bytes(data))
