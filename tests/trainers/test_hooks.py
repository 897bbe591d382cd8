"""What hooks may want together, and what becomes of one that is taken out."""

from collections.abc import Iterator

import pytest
import torch.distributed as dist

from forgather.trainers.events import Finished, Hooks, Outcome, Started
from tests.ranks import RankPool


class Hook:
    """Wants what it is told to, and remembers what it heard."""

    def __init__(self, *, stop: bool = False, abort: bool = False) -> None:
        self.stop = stop
        self.abort = abort
        self.heard: list[int] = []

    def on_start(self, event: Started) -> None:
        self.heard.append(event.step)

    def wants_stop(self) -> bool:
        return self.stop

    def wants_abort(self) -> bool:
        return self.abort


class Deaf:
    """A hook that wants nothing and hears nothing."""


@pytest.mark.training_case(15)
def test_a_hook_without_a_wish_keeps_the_run_going_and_the_strongest_wish_is_in_force():
    assert Hooks({"deaf": Deaf()}).wish() is None
    assert Hooks({"deaf": Deaf(), "quiet": Hook()}).wish() is None
    stop, abort = Hook(stop=True), Hook(abort=True)
    assert Hooks({"stop": stop, "quiet": Hook(), "deaf": Deaf()}).wish() is Outcome.STOPPED
    # Not the last word but the strongest: the order in a config decides nothing.
    assert Hooks({"stop": stop, "abort": abort}).wish() is Outcome.ABORTED
    assert Hooks({"abort": abort, "stop": stop}).wish() is Outcome.ABORTED


@pytest.mark.training_case(15)
def test_a_hook_that_is_taken_out_hears_nothing():
    kept = Hook()
    hooks = Hooks({"kept": kept, "out": None})
    hooks.tell(Started(3, 5))
    assert kept.heard == [3]
    assert list(hooks.hooks) == ["kept"]


class Ending:
    """Remembers how the run ended, and may have an objection."""

    def __init__(self, objection: str | None = None) -> None:
        self.objection = objection
        self.heard: list[int] = []

    def on_finish(self, event: Finished) -> None:
        self.heard.append(event.step)
        if self.objection is not None:
            raise ValueError(self.objection)


def test_every_hook_hears_the_end_and_the_first_objection_is_raised():
    hooks = {"a": Ending(), "b": Ending("first"), "c": Ending("second"), "d": Ending()}
    with pytest.raises(ValueError, match="first"):
        Hooks(hooks).tell(Finished(7, Outcome.STOPPED))
    assert [hook.heard for hook in hooks.values()] == [[7]] * 4


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[RankPool]:
    with RankPool(2) as pool:
        yield pool


def wanted(stops: list[int], aborts: list[int]) -> str | None:
    rank = dist.get_rank()
    end = Hooks({"hook": Hook(stop=rank in stops, abort=rank in aborts)}).wish()
    return None if end is None else end.value


def test_one_rank_decides_for_all(two_ranks):
    assert two_ranks.run(wanted, [], []) == [None, None]
    assert two_ranks.run(wanted, [1], []) == ["stopped", "stopped"]
    assert two_ranks.run(wanted, [0], [1]) == ["aborted", "aborted"]
