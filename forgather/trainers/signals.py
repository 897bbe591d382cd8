"""The signals that ask a run to stop: they leave a mark, which the loop finds at the end of its step.

SIGTERM is what job systems send before they take a machine away, SIGINT is Ctrl-C, SIGHUP a terminal that is closed.
"""

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

_STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class StopSignals:
    """Within this context, `received` is the signal that asked this process to stop, or None.

    A second Ctrl-C ends the process at once. A second SIGTERM does not: a job system may send it to the launcher and to
    its ranks, so that a rank gets two for one. In a thread that is not the main one nothing is caught: Python lets only
    the main thread handle signals. A signal that is ignored (`nohup`) stays ignored.
    """

    def __init__(self, *, say: bool = True) -> None:
        self.received: signal.Signals | None = None
        self._say = say
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in _STOPPING:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002  what Python passes
        first = self.received is None
        self.received = self.received or signal.Signals(number)
        if number == signal.SIGINT:
            # Left to the system, so that it also ends a process that is not in Python.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        if first and self._say:
            again = " (Ctrl-C again ends it at once)" if number == signal.SIGINT else ""
            # Not through sys.stderr, which may be in the middle of a write.
            os.write(2, f"\n{signal.Signals(number).name}: the run stops after its step, and saves{again}\n".encode())
