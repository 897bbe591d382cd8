"""When something is done: the cases of the reference, as a function of the step."""

import pytest

from forgather.errors import ConfigError
from forgather.trainers.interval import Interval


def due(*args, until: int = 12, **kwargs) -> list[int]:
    interval = Interval("log_every", *args, **kwargs)
    return [step for step in range(1, until + 1) if interval.is_due(step)]


@pytest.mark.training_case(1)
def test_null_is_never():
    assert due(None, until=100) == []


@pytest.mark.training_case(2, 5)
def test_every_third_step_and_a_resume_shifts_nothing():
    assert due(3) == [3, 6, 9, 12]
    # There is no counter that a resume could lose: the same step has the same answer in any process.
    assert [step for step in range(7, 13) if Interval("log_every", 3).is_due(step)] == [9, 12]


@pytest.mark.training_case(3)
def test_a_first_step():
    assert due(2, first=5) == [5, 7, 9, 11]


@pytest.mark.training_case(4)
def test_every_epoch():
    assert due("epoch", steps_per_epoch=3) == [3, 6, 9, 12]
    assert due("epoch", steps_per_epoch=2.5) == [3, 5, 8, 10]  # the step in which a pass ends
    assert due("epoch", steps_per_epoch=0.4, until=3) == [1, 2, 3]


@pytest.mark.training_case(4)
@pytest.mark.parametrize("every", [0, -3, "epochs", "", 2.5, True])
def test_anything_else_is_refused(every):
    with pytest.raises(ConfigError, match="log_every is") as error:
        Interval("log_every", every, steps_per_epoch=3)
    assert "epoch, or null" in error.value.fix


def test_an_epoch_needs_to_be_known():
    with pytest.raises(ConfigError, match="counts steps"):
        Interval("every of the samples", "epoch")
    with pytest.raises(ConfigError, match="first step of log_every is 0"):
        Interval("log_every", 3, first=0)
