"""A look with torch's profiler at a few steps of a run: what the host and the device did, operation by operation."""

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch.profiler import ProfilerActivity, profile

from forgather.distributed.collectives import rank
from forgather.errors import ConfigError
from forgather.metrics.meter import Meter
from forgather.trainers.events import Finished, Started, StepEnded
from forgather.trainers.reports import Reports

_WIDTH = 100


class ProfileWindow:
    """A hook that records `steps` steps from step `first` on, of the ranks in `ranks`, and writes what it saw to `dir`.

    `rank-0.step-00000012.json.gz` is a trace for https://ui.perfetto.dev or chrome://tracing, the `.txt` beside it a
    table of the operations that took longest. One step before the window warms the profiler up. `first` counts from
    the run's beginning; a process that starts later than that records nothing. With `memory` allocations are recorded
    too, with `stacks` where in the code each operation came from; both cost time.
    """

    def __init__(
        self,
        dir: str | Path,
        meter: Meter,
        reports: Reports,
        *,
        first: int = 10,
        steps: int = 3,
        ranks: Sequence[int] = (0,),
        memory: bool = False,
        stacks: bool = False,
    ) -> None:
        if first < 2 or steps < 1:
            raise ConfigError(
                f"a profile of {steps} steps from step {first} on is not possible",
                fix="use steps from 1, and first from 2: the step before it warms the profiler up",
            )
        self.dir = Path(dir)
        self.meter = meter
        self.reports = reports
        self.first = first
        self.steps = steps
        self.ranks = tuple(ranks)
        self.memory = memory
        self.stacks = stacks
        self._profile: Any = None

    def on_start(self, event: Started) -> None:
        self._arm(event.step)

    def on_step_end(self, event: StepEnded) -> None:
        if self._profile is None:
            self._arm(event.step)
        else:
            self._profile.step()
            if event.step == self.first + self.steps - 1:
                self._write(event.step)

    def on_finish(self, event: Finished) -> None:
        if self._profile is not None and event.step >= self.first:
            self._write(event.step)  # the run ended within the window

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        if self._profile is not None:
            self._profile.stop()
            self._profile = None

    def _arm(self, steps_made: int) -> None:
        """Begin when the next step is the one before the window."""
        if steps_made + 1 != self.first - 1 or rank() not in self.ranks:
            return
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(
            activities=activities,
            schedule=torch.profiler.schedule(wait=0, warmup=1, active=self.steps, repeat=1),
            profile_memory=self.memory,
            with_stack=self.stacks,
        )
        self._profile.start()

    def _write(self, step: int) -> None:
        profiler, self._profile = self._profile, None
        with self.meter.doing("inspection"):
            profiler.stop()
            self.dir.mkdir(parents=True, exist_ok=True)
            stem = f"rank-{rank()}.step-{step:08}"
            profiler.export_chrome_trace(str(self.dir / f"{stem}.json.gz"))
            longest = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
            table = profiler.key_averages().table(sort_by=longest, row_limit=40, max_name_column_width=_WIDTH)
            (self.dir / f"{stem}.txt").write_text(table + "\n")
            self.reports.note(f"profile of steps {self.first} to {step}: {self.dir / stem}.json.gz")
