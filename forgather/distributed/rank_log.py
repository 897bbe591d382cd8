"""What each rank says, in a file of its own: `logs/rank-N.log` of the run folder.

Rank 0 speaks to the terminal and to its file. What any other rank writes, libraries in C included, goes to its file
alone: N ranks that share a terminal tell everything N times.
"""

import contextlib
import faulthandler
import io
import os
import re
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import TextIO

_ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_MOST_KEPT = 1 << 20  # characters of a start that is not yet known to have a folder

_open_log: "RankLog | None" = None


class RankLog:
    """Takes what this process prints, from its making on; `open` names the file. Only one is open at a time."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.path: Path | None = None
        self._streams = sys.stdout, sys.stderr
        self._file: TextIO | None = None
        self._early = io.StringIO()
        self._terminal: tuple[int, int] | None = None  # of a rank whose own descriptors lead to the file
        if rank == 0:
            sys.stdout, sys.stderr = _Tee(sys.stdout, self._take), _Tee(sys.stderr, self._take)

    def open(self, folder: Path) -> None:
        """Append to `folder/rank-N.log` from now on, beginning with what was said since this was made."""
        global _open_log
        self.path = folder / f"rank-{self.rank}.log"
        try:
            self._file = self.path.open("a", encoding="utf-8", errors="replace", buffering=1)
        except OSError as error:  # a full disk: the run has other ways to find out
            print(f"warning: no log of this rank: {error.strerror}: {self.path}", file=sys.stderr)
            return
        begun = datetime.now().astimezone().isoformat(timespec="seconds")
        self._file.write(f"--- rank {self.rank}, process {os.getpid()} on {socket.gethostname()}, {begun}\n")
        self._file.write(self._early.getvalue())
        faulthandler.enable(self._file)
        faulthandler.register(signal.SIGUSR1, self._file)  # where this rank is: asked before one that is stuck is ended
        _open_log = self
        if self.rank != 0:
            _flush()
            self._terminal = os.dup(1), os.dup(2)
            os.dup2(self._file.fileno(), 1)
            os.dup2(self._file.fileno(), 2)

    def close(self) -> None:
        """Let what is printed go where it went before."""
        global _open_log
        _flush()
        sys.stdout, sys.stderr = self._streams
        if self._terminal is not None:
            for number, descriptor in enumerate(self._terminal, start=1):
                os.dup2(descriptor, number)
                os.close(descriptor)
            self._terminal = None
        if self._file is not None:
            faulthandler.unregister(signal.SIGUSR1)
            faulthandler.disable()
            self._file.close()
            self._file = None
        if _open_log is self:
            _open_log = None

    def _take(self, line: str) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # a full disk must not end a run because of its log
                self._file.write(line)
        elif self._early.tell() < _MOST_KEPT:
            self._early.write(line)


@contextlib.contextmanager
def on_terminal() -> Iterator[None]:
    """Within this context stdout and stderr lead to where they led before a log was opened, and to the log no more."""
    if _open_log is None or _open_log._terminal is None:
        yield
        return
    _flush()
    kept = os.dup(1), os.dup(2)
    for number, descriptor in enumerate(_open_log._terminal, start=1):
        os.dup2(descriptor, number)
    yield
    _flush()
    for number, descriptor in enumerate(kept, start=1):
        os.dup2(descriptor, number)
        os.close(descriptor)


def log_path() -> Path | None:
    """The file that is open now."""
    return None if _open_log is None else _open_log.path


def append(text: str) -> None:
    """Write text into the log alone."""
    if _open_log is not None:
        _open_log._take(text)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()


class _Tee(io.TextIOBase):
    """A stream that is `stream` in every respect, and whose whole lines are also given to `take`.

    Of a line that is drawn over and over only its last state counts, and colours do not.
    """

    def __init__(self, stream: TextIO, take: Callable[[str], None]) -> None:
        self._stream = stream
        self._take = take
        self._line = ""

    def write(self, text: str) -> int:
        written = self._stream.write(text)
        *lines, rest = (self._line + text).split("\n")
        for line in lines:
            shown = _ESCAPE.sub("", line.rpartition("\r")[2]).rstrip()
            if shown or line == "":
                self._take(shown + "\n")
        self._line = rest.rpartition("\r")[2]
        return written

    def flush(self) -> None:
        self._stream.flush()

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding

    @property
    def buffer(self) -> object:
        return self._stream.buffer
