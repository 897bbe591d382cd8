"""Where a run's numbers and texts go: a console and any number of records, told the same."""

from collections.abc import Mapping
from typing import Protocol

from forgather.metrics.console import Console


class Sink(Protocol):
    """A record of metrics: `forgather.metrics.sinks` has some. Every rank calls it; rank 0 writes."""

    def start(self, step: int) -> None: ...

    def write(self, step: int, metrics: Mapping[str, float | str], kind: str = "train") -> None: ...

    def close(self) -> None: ...


class Reports:
    """One place to write to; a name with None is a record that a config has taken out."""

    def __init__(self, console: Console, sinks: Mapping[str, Sink | None]) -> None:
        self.console = console
        self.records = [sink for sink in sinks.values() if sink is not None]
        self.sinks: list[Sink] = [console, *self.records]

    def start(self, step: int, steps: int) -> None:
        """Open the records of a run that has made `step` of its `steps` steps."""
        self.console.expect(steps)
        for sink in self.sinks:
            sink.start(step)

    def write(self, step: int, metrics: Mapping[str, float | str], kind: str = "train") -> None:
        """Record metrics of a kind: train, evaluation, sample."""
        for sink in self.sinks:
            sink.write(step, metrics, kind)

    def record(self, step: int, metrics: Mapping[str, float | str], kind: str) -> None:
        """Put metrics into the records without showing them."""
        for sink in self.records:
            sink.write(step, metrics, kind)

    def tick(self, step: int, steps: int) -> None:
        """Say that a step was made, without its numbers; a decay on command changes how many the run has."""
        self.console.expect(steps)
        self.console.tick(step)

    def note(self, text: str) -> None:
        """Show a line to the person who watches; it is not recorded."""
        self.console.note(text)

    def close(self) -> None:
        for sink in self.sinks:
            sink.close()
