"""Tokenizes batches of documents on all cores, in order, with a bounded number of batches in memory.

The processes are started as plain programs, not through `multiprocessing`: that would import the caller's main script
again (a script without a main guard fails), and forbids children to the ranks of a test or a daemon.
"""

import json
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from forgather.data import tokenize_process
from forgather.data.tokenize_process import Encoder, read_frame, write_frame
from forgather.errors import DataError

Encoded = tuple[NDArray[np.int64], NDArray[np.uint32]]


class TokenizePool:
    """`num_processes` tokenizers; with 0 or 1 the caller's own process does the work."""

    def __init__(self, tokenizer_json: str, before: Sequence[int], after: Sequence[int], num_processes: int) -> None:
        self._settings = (tokenizer_json, list(before), list(after))
        self._num_processes = num_processes
        self._threads: ThreadPoolExecutor | None = None
        self._own = threading.local()
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        if self._num_processes > 1:
            # A thread a process: it waits in a pipe without the interpreter's lock.
            self._threads = ThreadPoolExecutor(self._num_processes, initializer=self._start)
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        if self._threads is not None:
            if kind is not None:
                for process in self._processes:
                    process.kill()
            self._threads.shutdown(wait=True, cancel_futures=True)
        for process in self._processes:
            assert process.stdin is not None
            assert process.stdout is not None
            with suppress(BrokenPipeError):  # what a killed process had not read yet
                process.stdin.close()
            process.wait()
            process.stdout.close()

    def encode(self, batches: Iterable[Sequence[bytes]]) -> Iterator[Encoded]:
        """Lengths and tokens of each batch of UTF-8 documents, in order."""
        if self._threads is None:
            encoder = Encoder(*self._settings)
            for batch in batches:
                yield encoder.encode([document.decode() for document in batch])
            return
        waiting: deque[Future[Encoded]] = deque()
        for batch in batches:
            waiting.append(self._threads.submit(self._ask, batch))
            if len(waiting) > 2 * self._num_processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def _start(self) -> None:
        # -P: the script's folder must not come first on the path, its `tokenizers.py` would hide the library.
        command = [sys.executable, "-P", tokenize_process.__file__]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._own.process = process
        self._processes.append(process)
        assert process.stdin is not None
        write_frame(process.stdin, np.empty(0, np.int64), json.dumps(self._settings).encode())

    def _ask(self, batch: Sequence[bytes]) -> Encoded:
        process: subprocess.Popen[bytes] = self._own.process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            write_frame(process.stdin, np.array([len(document) for document in batch], np.int64), b"".join(batch))
            frame = read_frame(process.stdout)
        except BrokenPipeError:
            frame = None
        if frame is None:
            raise DataError(
                f"a tokenizing process ended with status {process.wait()}",
                fix="if it was killed for memory, set fewer `processes` or split very large documents",
            )
        lengths, content = frame
        return lengths, np.frombuffer(content, np.uint32)
