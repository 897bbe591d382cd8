"""What a server shows: its page, its metrics for Prometheus, and its model package for workers that ask."""

import asyncio
from collections.abc import Sequence

from aiohttp import web

from forgather.diloco.frame import ProtocolError
from forgather.diloco.package_service import DIGEST_HEADER, PackageArchive
from forgather.diloco.page import HEADERS, page
from forgather.diloco.prometheus import CONTENT_TYPE, exposition
from forgather.diloco.request import COORDINATOR


def views(package: PackageArchive | None = None) -> Sequence[web.RouteDef]:
    """The routes, for `application.serve(extra=...)`."""

    async def show_package(_: web.Request) -> web.Response:
        if package is None:
            raise ProtocolError("this server has no model package", status=404, fix="make it from the same config")
        return web.Response(
            body=package.content, headers={"Content-Type": "application/x-tar", DIGEST_HEADER: package.digest}
        )

    return [web.get("/", _show_page), web.get("/metrics", _show_metrics), web.get("/v1/package", show_package)]


async def _show_page(request: web.Request) -> web.Response:
    # Drawn beside the loop: what draws 200 rounds should keep no heartbeat waiting.
    text = await asyncio.to_thread(page, request.app[COORDINATOR].status())
    return web.Response(text=text, headers=HEADERS)


async def _show_metrics(request: web.Request) -> web.Response:
    text = exposition(request.app[COORDINATOR].status())
    return web.Response(body=text.encode(), headers={"Content-Type": CONTENT_TYPE})
