"""What a person sees of a run: on a terminal one line that lives, elsewhere plain lines with fixed columns.

    step  120/2000 | eta 0:10:23 | loss   4.1234 nats | 12,345 tokens/s | lr 3.00e-04 | grad norm 0.951 | 1.21 GB

Every rank may call it and rank 0 speaks. The columns of the line are for eyes; programs read the JSON-lines record.
"""

import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import TextIO

from forgather.distributed import collectives

_ERASE_LINE = "\r\033[2K"
_REFRESH_S = 0.1  # a line that changes more often cannot be read, and costs the step

# The columns of a training line, in order of importance: a narrow terminal cuts the last ones.
_COLUMNS: dict[str, Callable[[float], str]] = {
    "loss": lambda value: f"loss {value:8.4f} nats",
    "tokens_per_s": lambda value: f"{value:>10,.0f} tokens/s",
    "lr": lambda value: f"lr {value:.2e}",
    "grad_norm": lambda value: f"grad norm {value:7.3f}",
    "mfu": lambda value: f"mfu {value:6.1%}",
    "peak_memory_bytes": lambda value: f"{value / 1e9:6.2f} GB",
    "epoch": lambda value: f"epoch {value:6.3f}",
}


class Console:
    """Reports a run of `total_steps` steps to `stream`, standard output by default.

    A stream that is no terminal, or one with TERM=dumb, gets a plain line for each write. On a terminal, training
    metrics only change the live line; evaluations, saves, samples and notes are rows that stay. NO_COLOR is honoured.
    """

    def __init__(self, total_steps: int, stream: TextIO | None = None) -> None:
        self._total = total_steps
        self._step = 0
        self._stream = sys.stdout if stream is None else stream
        self._speaks = collectives.rank() == 0
        self._is_live = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._in_color = self._is_live and not os.environ.get("NO_COLOR")  # any value but "": https://no-color.org
        self._metrics: Mapping[str, float | str] = {}
        self._first: tuple[int, float] | None = None
        self._drawn_at = 0.0
        self._line_is_drawn = False

    def expect(self, total_steps: int) -> None:
        """From now on the run has so many steps."""
        self._total = total_steps

    def start(self, step: int) -> None:
        """Say that `step` steps are behind the run; they do not count in its pace."""
        self._step = step
        self._first = None
        self._metrics = {}
        self._draw()

    def tick(self, step: int) -> None:
        """Move the live line to `step`, at most ten times a second; elsewhere only the pace for the ETA is noted."""
        self._step = step
        if self._first is None:
            self._first = (step, time.monotonic())  # the first step compiles and warms up: the pace is that of the rest
        if time.monotonic() - self._drawn_at >= _REFRESH_S:
            self._draw()

    def write(self, step: int, metrics: Mapping[str, float | str], kind: str = "train") -> None:
        """Show metrics: those of training in the line, others as a row of their own that begins with their kind."""
        self._step = step
        if kind == "train":
            self._metrics = metrics
            if self._is_live:
                self._draw()
            else:
                self._row(" | ".join(self._columns()))
            return
        head = f"{self._position()} | {self._painted(kind)}"
        numbers = [_shown(name, value) for name, value in metrics.items() if not _is_long(value)]
        texts = [_indented(_printable(str(value))) for value in metrics.values() if _is_long(value)]
        self._row("\n".join([" | ".join([head, *numbers]), *texts]))

    def note(self, text: str) -> None:
        """Show a line that stays."""
        self._row(text)

    def close(self) -> None:
        """Leave the last line standing; what the program prints next begins below it."""
        if self._line_is_drawn:
            self._put("\n")
            self._line_is_drawn = False

    def _draw(self) -> None:
        if not self._is_live:
            return
        width = _terminal_width(self._stream)
        line = "  ".join(" ".join(column.split()) for column in self._columns())  # narrower than padded columns
        self._put(_ERASE_LINE + line[: width - 1])  # a full line would wrap and scroll
        self._line_is_drawn = True
        self._drawn_at = time.monotonic()

    def _row(self, text: str) -> None:
        self._put((_ERASE_LINE if self._line_is_drawn else "") + text + "\n")
        self._line_is_drawn = False
        self._draw()  # below the row

    def _put(self, text: str) -> None:
        if not self._speaks:
            return
        # A sample may hold characters that a C locale cannot write; that must not end a run.
        encoding = self._stream.encoding or "utf-8"
        self._stream.write(text.encode(encoding, "replace").decode(encoding))
        self._stream.flush()

    def _columns(self) -> list[str]:
        numbers = ((form, self._metrics.get(name)) for name, form in _COLUMNS.items())
        shown = [form(value) for form, value in numbers if isinstance(value, int | float)]
        return [self._position(), f"eta {self._eta()}", *shown]

    def _position(self) -> str:
        return f"step {self._step:>{len(str(self._total))}}/{self._total}"

    def _eta(self) -> str:
        if self._step >= self._total:
            return "0:00:00"
        if self._first is None or self._step <= self._first[0]:
            return "-:--:--"
        first_step, first_time = self._first
        pace = (time.monotonic() - first_time) / (self._step - first_step)
        seconds = round(pace * (self._total - self._step))
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"

    def _painted(self, kind: str) -> str:
        return f"\033[36m{kind}\033[0m" if self._in_color else kind


def _shown(name: str, value: float | str) -> str:
    if isinstance(value, str):
        return f"{name} {_printable(value)}"
    if name in _COLUMNS:
        return " ".join(_COLUMNS[name](value).split())  # without the padding: a row stands alone
    # A count is shown whole: 16384 targets, not 1.638e+04.
    return f"{name} {value:,.0f}" if float(value).is_integer() else f"{name} {value:,.4g}"


def _is_long(value: float | str) -> bool:
    return isinstance(value, str) and (len(value) > 60 or "\n" in value)


def _indented(text: str) -> str:
    return "\n".join("    " + line for line in text.splitlines())


def _printable(text: str) -> str:
    """Without control characters, which an untrained model writes and a terminal obeys."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def _terminal_width(stream: TextIO) -> int:
    return os.get_terminal_size(stream.fileno()).columns or 80  # 0: a terminal that was never told its size
