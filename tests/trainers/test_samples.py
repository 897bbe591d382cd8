"""Samples are written at their interval and at the end of a run, and take no time from one that is told to stop."""

from typing import Any

import pytest
import torch

from forgather.metrics.meter import Meter
from forgather.trainers import samples
from forgather.trainers.events import Finished, Outcome, StepEnded
from forgather.trainers.samples import SampleText


class Rows:
    """Reports that only note at which steps they were written to."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def write(self, step: int, metrics: Any, kind: str) -> None:
        assert (kind, metrics) == ("sample", {"text_0": "def run"})
        self.steps.append(step)


@pytest.fixture
def rows(monkeypatch) -> Rows:
    monkeypatch.setattr(samples, "generate", lambda model, tokenizer, prompt, **options: prompt + "run")
    return Rows()


def sampled(rows: Rows, last: StepEnded, outcome: Outcome) -> list[int]:
    """Where a run samples whose last step is `last`, at an interval of 2."""
    nothing: Any = None
    hook = SampleText(nothing, nothing, rows, Meter(torch.device("cpu")), prompts=["def "], every=2)
    for step in range(1, last.step):
        hook.on_step_end(StepEnded(step, nothing))
    hook.on_step_end(last)
    hook.on_finish(Finished(last.step, outcome))
    return rows.steps


@pytest.mark.parametrize(("steps", "expected"), [(5, [2, 4, 5]), (4, [2, 4])])
def test_a_run_samples_at_its_interval_and_once_at_its_end(steps, expected, rows):
    assert sampled(rows, StepEnded(steps, None), Outcome.FINISHED) == expected


@pytest.mark.parametrize("outcome", [Outcome.STOPPED, Outcome.ABORTED])
@pytest.mark.parametrize("steps", [4, 5])
def test_a_run_that_is_told_to_stop_does_not_sample(steps, outcome, rows):
    assert sampled(rows, StepEnded(steps, None, is_stopping=True), outcome) == [2, 4][: (steps - 1) // 2]
