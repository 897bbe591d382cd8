"""Which checkpoints stay: the newest, those of every so many steps, the best."""

import math
from pathlib import Path

import pytest

from forgather.checkpoint.folder import saved_steps
from forgather.checkpoint.keep import Keep
from forgather.checkpoint.run_folder import RunFolder
from forgather.checkpoint.store import CheckpointStore
from forgather.errors import CheckpointError
from tests.checkpoint.training import Run


def kept(keep: Keep, losses: dict[int, float | None]) -> list[int]:
    """What stays after checkpoints with these losses were saved one after the other."""
    there: dict[int, dict[str, float]] = {}
    for step, loss in losses.items():
        there[step] = {} if loss is None else {"loss": loss}
        for doomed in keep.doomed(there):
            del there[doomed]
    return sorted(there)


@pytest.mark.training_case(32)
def test_the_newest_stay() -> None:
    assert kept(Keep(last=2), dict.fromkeys((1, 2, 3, 4), 1.0)) == [3, 4]


@pytest.mark.training_case(33)
def test_the_best_stay_beside_the_newest() -> None:
    losses = {25: 2.0, 50: 1.0, 75: 1.5, 100: 9.0, 125: 9.1, 150: 9.2}
    assert kept(Keep(last=3, best=2), losses) == [50, 75, 100, 125, 150]


@pytest.mark.training_case(34)
def test_a_better_one_comes_into_a_full_list_and_zero_is_a_value() -> None:
    losses = {1: 1.0, 2: 2.0, 3: 1.5, 4: 7.0}
    assert kept(Keep(last=1, best=2), losses) == [1, 3, 4]
    assert kept(Keep(last=1, best=1), {1: 0.5, 2: 0.0, 3: 0.1, 4: 7.0}) == [2, 4]


def test_every_so_many_steps_stay_for_good() -> None:
    assert kept(Keep(last=1, every=20), dict.fromkeys(range(10, 80, 10), 1.0)) == [20, 40, 60, 70]


def test_the_highest_may_be_the_best() -> None:
    assert kept(Keep(last=1, best=1, highest=True), {1: 0.5, 2: 0.9, 3: 0.1}) == [2, 3]


def test_what_was_not_measured_and_what_is_no_number_is_none_of_the_best() -> None:
    assert kept(Keep(last=1, best=1), {1: 3.0, 2: None, 3: math.nan, 4: None}) == [1, 4]


@pytest.mark.parametrize("rule", [{"last": 0}, {"every": 0}, {"best": -1}])
def test_rules_that_keep_nothing_are_refused(rule: dict[str, int]) -> None:
    with pytest.raises(CheckpointError, match=r"keep\."):
        Keep(**rule)


def test_the_best_are_known_from_what_is_on_the_disk(tmp_path: Path) -> None:
    """Also after a restart: there is no list that could be lost or be of another folder."""
    run = Run()
    keep = Keep(last=1, best=1)
    for step, loss in ((1, 0.5), (2, 2.0), (3, 3.0)):
        with RunFolder(tmp_path / "run") as folder, CheckpointStore(folder, keep, asynchronous=False) as store:
            store.save(run.state, step, {"loss": loss})
    assert saved_steps(tmp_path / "run" / "checkpoints") == [1, 3]
