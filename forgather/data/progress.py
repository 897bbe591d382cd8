"""How far a long preparation is: a bar on a terminal, a plain line every few seconds elsewhere. On stderr."""

import sys
import time
from types import TracebackType
from typing import Any, Self

_LINE_EVERY_S = 5.0


class Progress:
    """Counts bytes read and tokens made towards a total that may be unknown."""

    def __init__(self, title: str, total_bytes: int | None) -> None:
        self._title = title
        self._total = total_bytes
        self._bytes = 0
        self._tokens = 0
        self._start = self._last_line = time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            # Imported here: only a terminal needs it, and it takes a tenth of a second.
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[line]}"),
                TimeRemainingColumn(),
            )
            self._bar = Bar(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task(self._title, total=self._total, line="")
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def add(self, num_bytes: int, num_tokens: int) -> None:
        """Shows what has been done, at most every few seconds where lines stay."""
        self._bytes += num_bytes
        self._tokens += num_tokens
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=self._bytes, line=self._line(now))
        elif now - self._last_line >= _LINE_EVERY_S:
            self._last_line = now
            print(f"{self._title}: {self._line(now)}", file=sys.stderr)

    def _line(self, now: float) -> str:
        share = f"{100 * self._bytes / self._total:.0f} % of {self._total / 1e6:,.1f} MB, " if self._total else ""
        speed = self._bytes / 1e6 / max(now - self._start, 1e-3)
        return f"{share}{self._tokens:,} tokens, {speed:.1f} MB/s"
