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
        now[0] += 0.5
        made.append(plan.due(step))
    assert made == [None, 0, None, 1, None, 2] * 2 + [None, 0]
