"""Schedules are pure functions of the step with the values that their docstrings promise."""

import pytest

from forgather.errors import ConfigError
from forgather.optim.schedules import constant, warmup_cosine, warmup_stable_decay


def test_constant_rises_then_stays():
    assert [constant(step, warmup=4) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert constant(0) == 1.0


def test_cosine_begins_at_one_after_the_warm_up_and_ends_at_its_final_value():
    values = [warmup_cosine(step, steps=10, warmup=2, final=0.1) for step in range(10)]
    assert values[:2] == [0.5, 1.0]
    assert values[5] == pytest.approx(0.1 + 0.9 * 0.5)  # half of what follows the warm-up
    assert values[-1] == pytest.approx(0.1)
    assert values[1:] == sorted(values[1:], reverse=True)
    assert warmup_cosine(50, steps=10, warmup=2, final=0.1) == pytest.approx(0.1)  # a run that was prolonged


def test_stable_part_does_not_depend_on_the_number_of_steps():
    short = [warmup_stable_decay(step, steps=10, warmup=2, decay=4) for step in range(10)]
    long = [warmup_stable_decay(step, steps=20, warmup=2, decay=4) for step in range(20)]
    assert short == [0.5, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0.0]
    assert short[:6] == long[:6]
    assert long[:16] == [0.5] + [1] * 15


@pytest.mark.parametrize(
    ("schedule", "parts"),
    [(warmup_cosine, {"warmup": 11}), (warmup_stable_decay, {"warmup": 6, "decay": 5})],
)
def test_parts_that_do_not_fit_are_refused(schedule, parts):
    with pytest.raises(ConfigError, match=r"but the run has 10") as error:
        schedule(0, steps=10, **parts)
    assert "warmup" in error.value.fix
