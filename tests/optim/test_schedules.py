"""Schedules have the values that their docstrings promise, in steps and in tokens, and obey a command to decay."""

from itertools import pairwise

import pytest

from forgather.errors import ConfigError
from forgather.optim.schedules import constant, infinite, warmup_cosine, warmup_stable_decay
from forgather.optim.shapes import CURVES


def values(schedule, steps, start=0):
    return [schedule(step) for step in range(start, steps)]


def test_constant_rises_then_stays():
    assert values(constant(warmup=4), 6) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert constant()(0) == 1.0


def test_cosine_begins_at_one_after_the_warm_up_and_ends_at_its_final_value():
    schedule = warmup_cosine(length=10, warmup=2, final=0.1)
    made = values(schedule, 10)
    assert made[:2] == [0.5, 1.0]
    assert made[5] == pytest.approx(0.1 + 0.9 * 0.5)  # half of what follows the warm-up
    assert made[-1] == 0.1
    assert made[1:] == sorted(made[1:], reverse=True)
    assert schedule(50) == 0.1  # a run that was prolonged
    assert values(warmup_cosine(length=2, warmup=2), 4) == [0.5, 1, 1, 1]


@pytest.mark.training_case(86)
@pytest.mark.parametrize("curve", CURVES)
def test_a_decay_begins_at_the_peak_falls_all_the_time_and_ends_at_its_final_value(curve):
    schedule = warmup_stable_decay(length=30, warmup=2, decay=20, final=0.1, curve=curve)
    assert schedule.factor(10) == 1.0
    made = [schedule.factor(done) for done in range(10, 31)]
    assert all(after < before for before, after in pairwise(made))
    assert made[-1] == schedule.factor(100) == 0.1


def test_stable_part_does_not_depend_on_the_length():
    short = values(warmup_stable_decay(length=10, warmup=2, decay=4), 10)
    long = values(warmup_stable_decay(length=20, warmup=2, decay=4), 20)
    assert short == [0.5, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0.0]
    assert short[:6] == long[:6]
    assert long[:16] == [0.5] + [1] * 15


@pytest.mark.training_case(85)
def test_infinite_rises_cools_down_stays_and_is_annealed():
    schedule = infinite(warmup=10, cooldown=20, level=0.4, decay=50, decay_from=100, final=0.01)
    assert schedule.factor(0) == 0.0
    assert schedule(0) == 0.1  # a step is never made with a rate of 0 because it is the first
    assert schedule.factor(10) == 1.0
    assert schedule.factor(30) == schedule.factor(100) == 0.4
    assert schedule.factor(20) == pytest.approx(0.7)
    assert schedule.factor(101) == pytest.approx(0.4 * (0.01 / 0.4) ** (1 / 50))
    assert schedule.factor(150) == schedule.factor(10**9) == 0.01


@pytest.mark.training_case(85)
def test_infinite_without_a_cooldown_stays_at_the_peak():
    schedule = infinite(warmup=10, cooldown=0, decay=50)
    assert schedule.factor(10**6) == 1.0


@pytest.mark.training_case(85)
def test_annealing_before_the_cooldown_is_over_is_refused():
    with pytest.raises(ConfigError, match="begins at 29, but warm-up and cooldown end at 30"):
        infinite(warmup=10, cooldown=20, decay=50, decay_from=29)


def test_a_command_begins_the_decay_with_the_next_step():
    schedule = warmup_stable_decay(length=None, warmup=2, decay=4)
    assert values(schedule, 7) == [0.5, 1, 1, 1, 1, 1, 1]
    assert schedule.end is None
    assert schedule.on_command("save") is None
    assert schedule.on_command("decay") == "the learning rate decays over the next 4 steps"
    assert schedule.end == 11
    assert values(schedule, 12, start=7) == [0.75, 0.5, 0.25, 0, 0]
    assert "already, since 7 steps" in schedule.on_command("decay")
    assert schedule.end == 11


def test_a_command_in_the_warm_up_decays_from_where_the_rate_is():
    schedule = warmup_stable_decay(length=100, warmup=10, decay=5)
    assert values(schedule, 5)[-1] == 0.5
    schedule.on_command("decay")
    assert values(schedule, 10, start=5) == pytest.approx([0.4, 0.3, 0.2, 0.1, 0])


def test_a_decay_that_has_begun_by_itself_is_not_begun_again():
    schedule = warmup_stable_decay(length=10, decay=4)
    values(schedule, 8)
    assert "already, since 6 steps" in schedule.on_command("decay")
    assert values(schedule, 10, start=8) == [0.25, 0.0]
    assert schedule.end is None  # the run ends where its steps do


def test_a_schedule_without_a_decay_says_so():
    assert "has no decay to begin" in warmup_cosine(length=10).on_command("decay")


@pytest.mark.training_case(85)
def test_a_resumed_schedule_remembers_the_command():
    schedule = infinite(warmup=2, cooldown=2, decay=10)
    values(schedule, 8)
    schedule.on_command("decay")
    ahead = values(schedule, 12, start=8)
    resumed = infinite(warmup=2, cooldown=2, decay=10)
    resumed.load_state_dict(schedule.state_dict())
    assert values(resumed, 12, start=8) == ahead
    assert resumed.end == schedule.end == 18
    assert values(resumed, 20, start=12) == values(schedule, 20, start=12)


def test_the_decay_of_a_run_whose_schedule_has_none_today_is_forgotten():
    schedule = warmup_stable_decay(length=None, decay=10)
    schedule.on_command("decay")
    today = constant()
    today.load_state_dict(schedule.state_dict())
    assert today(5) == 1.0
    assert today.end is None


@pytest.mark.parametrize(
    ("make", "lengths"),
    [
        (constant, {"warmup": 3}),
        (warmup_cosine, {"warmup": 3, "length": 12}),
        (warmup_stable_decay, {"warmup": 3, "length": 12, "decay": 5}),
        (infinite, {"warmup": 3, "cooldown": 2, "decay": 5, "decay_from": 6}),
    ],
)
def test_tokens_give_what_steps_give_when_all_steps_have_as_many(make, lengths):
    in_steps = make(**lengths)
    in_tokens = make(**{name: count * 640 for name, count in lengths.items()}, tokens_per_step=640)
    assert values(in_tokens, 14) == values(in_steps, 14)
    assert in_tokens.describe().endswith("in tokens")


def test_tokens_count_on_when_the_batch_changes():
    small = warmup_stable_decay(length=None, warmup=1000, decay=400, tokens_per_step=100)
    assert values(small, 6)[-1] == 0.6
    large = warmup_stable_decay(length=None, warmup=1000, decay=400, tokens_per_step=200)
    large.load_state_dict(small.state_dict())
    assert values(large, 8, start=6) == [0.8, 1.0]
    assert large.on_command("decay").endswith("over the next 400 tokens")
    assert large.end == 10
    assert values(large, 10, start=8) == [0.5, 0.0]
    smaller = warmup_stable_decay(length=None, warmup=1000, decay=400, tokens_per_step=50)
    smaller.load_state_dict(large.state_dict() | {"step": 8, "done_steps": 8, "done_tokens": 1000})
    assert smaller.end == 16
    assert values(smaller, 10, start=8) == [0.875, 0.75]


def test_a_run_that_counted_steps_can_count_tokens():
    before = constant(warmup=8)
    values(before, 4)
    after = constant(warmup=800, tokens_per_step=100)
    after.load_state_dict(before.state_dict())
    assert after(4) == 0.625


@pytest.mark.parametrize(
    ("make", "lengths", "message"),
    [
        (warmup_cosine, {"length": 10, "warmup": 11}, "its length is 10"),
        (warmup_stable_decay, {"length": 10, "warmup": 6, "decay": 5}, "its length is 10"),
        (warmup_stable_decay, {"length": None, "decay": 0}, "decay is 0"),
        (warmup_stable_decay, {"length": None, "decay": 9, "curve": "sine"}, "no curve 'sine'"),
        (warmup_stable_decay, {"length": None, "decay": 9, "curve": "inverse"}, "along inverse cannot end at 0"),
        (constant, {"warmup": -1}, "warmup is -1"),
    ],
)
def test_what_cannot_be_is_refused(make, lengths, message):
    with pytest.raises(ConfigError, match=message) as error:
        make(**lengths)
    assert error.value.fix
