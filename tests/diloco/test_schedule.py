"""Every fragment has one turn a cycle, and a cycle keeps the length with which it began."""

import time

import torch

from forgather.diloco.schedule import Schedule
from tests.diloco.running_server import settings_of

FRAGMENTS = [["a"], ["b"], ["c"]]
VALUES = {name: torch.zeros(1) for name in "abc"}


def schedule(**others) -> Schedule:
    return Schedule(settings_of(VALUES, FRAGMENTS, **others))


def turns(of: Schedule, first: int, last: int) -> dict[int, int]:
    return {step: due for step in range(first, last + 1) if (due := of.due(step)) is not None}


def test_another_h_holds_from_the_next_cycle_on():
    plan = schedule(sync_every=6)
    assert turns(plan, 1, 3) == {2: 0}
    plan.next_sync_every = 3
    assert turns(plan, 4, 12) == {4: 1, 6: 2, 7: 0, 8: 1, 9: 2, 10: 0, 11: 1, 12: 2}


def test_an_h_below_the_number_of_fragments_leaves_none_out():
    plan = schedule(sync_every=3)
    plan.next_sync_every = 1
    assert turns(plan, 1, 6) == {1: 0, 2: 1, 3: 2, 4: 0, 5: 1, 6: 2}


def test_it_goes_on_where_it_was_saved():
    plan = schedule(sync_every=6)
    turns(plan, 1, 3)
    plan.next_sync_every = 9
    other = schedule(sync_every=6)
    other.load_state_dict(plan.state_dict())
    assert turns(other, 4, 15) == turns(plan, 4, 15) == {4: 1, 6: 2, 9: 0, 12: 1, 15: 2}


def test_rounds_of_a_fixed_time_follow_the_clock_and_not_the_steps(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    plan = schedule(round_seconds=3.0, sync_every=500)
    made = []
    for step in range(1, 15):
        made.append(plan.due(step))  # the first of them starts the clock
        now[0] += 0.5
    assert made == [None, None, 0, None, 1, None, 2, None, 0, None, 1, None, 2, None]


class Trainee:
    """A worker on a clock of its own that makes a step a second, and may wait for others between two of them."""

    def __init__(self, monkeypatch, begun_at: float) -> None:
        self.now = begun_at
        self.step = 0
        self._monkeypatch = monkeypatch
        self.plan = schedule(round_seconds=30.0, sync_every=500)

    def sends(self) -> float:
        """When it next sends something."""
        self._monkeypatch.setattr(time, "monotonic", lambda: self.now)
        while True:
            self.step += 1
            self.now += 1.0
            if self.plan.due(self.step) is not None:
                return self.now

    def has_values(self, at: float) -> None:
        self.plan.waited(at - self.now)
        self.now = at


def test_workers_that_came_at_different_times_are_in_phase_once_they_have_had_values_together(monkeypatch):
    """Before, the clock ran on while one waited for the other, and then it was due at once, and waited again."""
    first, late = Trainee(monkeypatch, 0.0), Trainee(monkeypatch, 1007.0)
    for number in range(7):
        sent = [first.sends(), late.sends()]
        if number > 0:
            assert sent[0] == sent[1]
        for each in (first, late):
            each.has_values(max(sent))


def test_another_time_of_rounds_holds_from_the_next_cycle_on(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    plan = schedule(round_seconds=3.0, sync_every=500)
    made = []
    for step in range(13):
        if step == 2:
            plan.next_round_seconds = 6.0
        made.append(plan.due(step + 1))
        now[0] += 1.0
    assert made == [None, 0, 1, 2, None, 0, None, 1, None, 2, None, 0, None]


def test_a_cycle_by_steps_that_was_saved_in_one_by_the_clock_ends(monkeypatch):
    """The steps since it began may be more than H; a new H holds when these are made."""
    plan = schedule(sync_every=6)
    plan.load_state_dict({"begun": 0, "sync_every": 6, "next_sync_every": 3})
    assert turns(plan, 20, 27) == {20: 0, 22: 1, 24: 2, 25: 0, 26: 1, 27: 2}
