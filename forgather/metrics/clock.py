"""What a process spends its time on: one activity at a time, so that their seconds add up to all that pass."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import torch

Activity = Literal[
    "start_up", "training", "data_wait", "exchange", "evaluation", "checkpoint", "sampling", "inspection"
]
ACTIVITIES: tuple[Activity, ...] = get_args(Activity)


class ActivityClock:
    """Seconds of each activity since the clock was made. It begins with `start_up`; what is nested counts once, inside.

    On CUDA a pause of training waits for the queued kernels before it starts and before it ends, so that the training
    queued before it counts as training, and the evaluation queued within it does not. Waiting for data does not.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds: dict[Activity, float] = dict.fromkeys(ACTIVITIES, 0.0)
        self._current: Activity = "start_up"
        self._since = time.perf_counter()

    def seconds(self) -> dict[Activity, float]:
        """What each activity has taken until now; they add up to the time since the clock was made."""
        self._book()
        return dict(self._seconds)

    def turn_to(self, activity: Activity) -> None:
        """From now on the time is spent on `activity`."""
        self._book()
        self._current = activity

    @contextmanager
    def doing(self, activity: Activity) -> Iterator[None]:
        """Spend the time inside on `activity`, then go on with what was done before."""
        self._finish_queued_work(activity)
        before = self._current
        self.turn_to(activity)
        try:
            yield
        finally:
            self._finish_queued_work(activity)
            self.turn_to(before)

    def _book(self) -> None:
        now = time.perf_counter()
        self._seconds[self._current] += now - self._since
        self._since = now

    def _finish_queued_work(self, activity: Activity) -> None:
        if self._device.type == "cuda" and activity != "data_wait":
            torch.cuda.synchronize(self._device)
