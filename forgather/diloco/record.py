"""Each closed round as a row of metrics, in the record and in TensorBoard, as a run has them of its steps.

The step of a row is the number of outer steps over all fragments, which is also the step of a checkpoint. A server that
goes on from an older checkpoint makes the rows beyond it again, and the record stays single-valued.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

from forgather.diloco.coordinator import Coordinator
from forgather.errors import ForgatherError
from forgather.metrics.sinks import Metrics

KIND = "outer"
_PATIENCE_S = 5.0


class Sink(Protocol):
    """Where rows go; see forgather.metrics.sinks."""

    def start(self, step: int) -> None: ...

    def write(self, step: int, metrics: Metrics, kind: str = ...) -> None: ...

    def close(self) -> None: ...


class RoundRecord:
    """Follows a coordinator. A sink that fails is told of once and written to no more; the rounds go on."""

    def __init__(self, coordinator: Coordinator, sinks: Sequence[Sink]) -> None:
        self._coordinator = coordinator
        self._sinks = list(sinks)
        self._step = coordinator.publisher.step
        for sink in list(self._sinks):
            self._try(sink, partial(sink.start, self._step))

    async def follow(self) -> None:
        """Write rows until the coordinator has stopped and the last is written."""
        there = self._coordinator
        try:
            while not there.stopped.is_set():
                await there.until(lambda: there.publisher.step > self._step, _PATIENCE_S)
                await self._catch_up()
        finally:
            await self._catch_up()
            for sink in self._sinks:
                self._try(sink, sink.close)

    async def _catch_up(self) -> None:
        # No await between the two: they are of one moment.
        publisher = self._coordinator.publisher
        last, closed = publisher.step, list(publisher.history)
        new = closed[len(closed) - min(len(closed), max(0, last - self._step)) :]
        for step, each in enumerate(new, start=last - len(new) + 1):
            row = row_of(each)
            for sink in list(self._sinks):
                await asyncio.to_thread(self._try, sink, partial(sink.write, step, row, KIND))
        self._step = last

    def _try(self, sink: Sink, call: Callable[[], None]) -> None:
        try:
            call()
        except (ForgatherError, OSError) as error:
            self._sinks.remove(sink)
            self._coordinator.run.say(f"warning: {error}; rounds go on without {type(sink).__name__}")


def row_of(closed: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of one closed round."""
    named = {
        "fragment": closed["fragment"],
        "version": closed["version"],
        "num_workers": len(closed["workers"]),
        "tokens": closed["tokens"],
        "loss": closed["loss"],
        "contribution_norm": closed["norm"],
        "round_s": closed["seconds"],
        "outer_s": closed.get("outer_s"),
    }
    return {name: value for name, value in named.items() if value is not None}
