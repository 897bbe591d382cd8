"""A server in a thread of the test's own process, on loopback and a free port."""

import asyncio
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from forgather.checkpoint.run_folder import RunFolder
from forgather.diloco.application import serving
from forgather.diloco.coordinator import Coordinator
from forgather.diloco.outer import Nesterov, Outer
from forgather.diloco.settings import Settings

T = TypeVar("T")
TOKEN = "token-of-the-tests"


@dataclass
class RunningServer:
    """A server that answers at `host`:`port`."""

    host: str
    port: int
    token: str | None
    coordinator: Coordinator
    loop: asyncio.AbstractEventLoop

    def call(self, function: Callable[[], T], timeout_s: float = 10.0) -> T:
        """What `function` gives on the server's own thread, where its state may be looked at."""

        async def run() -> T:
            return function()

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(timeout_s)

    def status(self) -> dict[str, Any]:
        return self.call(self.coordinator.status)

    def published(self, name: str) -> Tensor:
        """A copy of a parameter as workers have it."""
        return next(each.published[name] for each in self.coordinator.fragments if name in each.published).clone()


def settings_of(
    values: Mapping[str, Tensor], fragments: Sequence[Sequence[str]] | None = None, **others: Any
) -> Settings:
    """Settings for these values; everything is one fragment unless something else is said."""
    return Settings(
        {name: tuple(value.shape) for name, value in values.items()},
        fragments or [list(values)],
        # Servers in several folders are one that was restored, unless a test says something else.
        **{"upload": "fp32", "download": "fp32", "sync_every": 1, "training": "the tests'"} | others,
    )


@contextmanager
def running_server(
    folder: Path,
    values: Mapping[str, Tensor],
    settings: Settings | None = None,
    outer: Outer | None = None,
    *,
    num_workers: int = 1,
    token: str | None = TOKEN,
    serve: Mapping[str, Any] | None = None,
    ends_with: type[Exception] | None = None,
    **arguments: Any,
) -> Iterator[RunningServer]:
    """Run a server that begins with `values`, or with what it finds in `folder`, until the block ends.

    `arguments` go to the Coordinator, those in `serve` to `application.serving`. The server is to end as it
    was told to, or with an error of the kind `ends_with`.
    """
    started: Future[RunningServer] = Future()
    failures: list[BaseException] = []

    async def run(run_folder: RunFolder) -> None:
        coordinator = Coordinator(
            {name: value.clone() for name, value in values.items()},
            settings or settings_of(values),
            outer or Nesterov(lr=1.0, momentum=0.0),
            run_folder,
            num_workers=num_workers,
            **arguments,
        )
        async with serving(coordinator, token, "127.0.0.1", 0, **(serve or {})) as (host, port):
            started.set_result(RunningServer(host, port, token, coordinator, asyncio.get_running_loop()))
            await coordinator.stopped.wait()

    def main() -> None:
        torch.set_num_threads(1)
        try:
            with RunFolder(folder) as run_folder:
                asyncio.run(run(run_folder))
        except BaseException as error:  # noqa: BLE001  raised by whoever started it
            if started.done():
                failures.append(error)
            else:
                started.set_exception(error)

    thread = threading.Thread(target=main, name="server")
    thread.start()
    try:
        server = started.result(60)
        yield server
    finally:
        if started.done() and started.exception() is None:
            ended = started.result()
            with suppress(RuntimeError):  # its loop is closed: it has ended by itself
                ended.loop.call_soon_threadsafe(ended.coordinator.shutdown)
        thread.join(30)
        assert not thread.is_alive(), "the server has not ended"
        if failures and (ends_with is None or not isinstance(failures[0], ends_with)):
            raise failures[0]
        assert ends_with is None or failures, f"the server has not ended with a {ends_with.__name__}"
