"""The clock behind tokens/s: it runs while training does, and stands still while the run does something else."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class PausableClock:
    """Seconds of training since `restart`, without what ran inside `paused()`, and how many of them waited for data.

    On CUDA a pause waits for the queued kernels before it starts and before it ends, so that the training queued
    before it counts as training, and the evaluation queued within it does not.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pauses_open = 0
        self.restart()

    def restart(self) -> None:
        """Begin again at zero."""
        self._start = time.perf_counter()
        self._paused_s = 0.0
        self.waited_s = 0.0

    def elapsed_s(self) -> float:
        """Seconds since `restart` that were not paused. Do not ask inside a pause."""
        assert self._pauses_open == 0, "the clock is read while it is paused"
        return time.perf_counter() - self._start - self._paused_s

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time inside out of the count; pauses may be nested."""
        self._pauses_open += 1
        self._finish_queued_work()
        start = time.perf_counter()
        try:
            yield
        finally:
            self._pauses_open -= 1
            if self._pauses_open == 0:
                self._finish_queued_work()
                self._paused_s += time.perf_counter() - start

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Count the time inside as training that waited for the loader."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.waited_s += time.perf_counter() - start

    def _finish_queued_work(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
