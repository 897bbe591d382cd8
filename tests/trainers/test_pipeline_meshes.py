"""Stages that are themselves sharded, replicated or split by tensor give what one process gives."""

from collections.abc import Iterator
from typing import Any

import pytest

from forgather.distributed.fsdp import FsdpOptions
from forgather.errors import DistributedError
from tests.ranks import RankPool, run_ranks
from tests.trainers.staged import Run, Staged, train, train_and_look

SHARDED = {"pipeline": 2, "shard": 2}
REPLICATED = {"pipeline": 2, "replicate": 2}
SPLIT = {"pipeline": 2, "tensor": 2}


@pytest.fixture(scope="module")
def four_ranks() -> Iterator[RankPool]:
    with RankPool(4) as pool:
        yield pool


@pytest.fixture(scope="module")
def single() -> dict[bool, dict[str, Any]]:
    return {tied: train_and_look(3, accumulate=4, source={"tied": tied}) for tied in (False, True)}


def assert_equal(run: Run, expected: Run, tolerance: float = 2e-6) -> None:
    for (loss, norm), (expected_loss, expected_norm) in zip(run, expected, strict=True):
        assert loss == pytest.approx(expected_loss, rel=tolerance)
        assert norm == pytest.approx(expected_norm, rel=tolerance)


@pytest.mark.parametrize(
    ("axes", "tied", "options"),
    [
        (SHARDED, True, {"plan": {"schedule": "1f1b"}, "groups": True}),
        (SHARDED, True, {"plan": {"schedule": "zbv"}, "groups": True}),
        (SHARDED, False, {"plan": {"schedule": "interleaved_zero_bubble"}, "groups": True}),
        (SHARDED, True, {"plan": {"schedule": "gpipe"}, "accumulate": 1}),
        (REPLICATED, True, {"plan": {"schedule": "zbv"}}),
        (REPLICATED, False, {"plan": {"schedule": "interleaved_1f1b"}}),
        (SPLIT, True, {"plan": {"schedule": "zbv"}}),
        (SPLIT, True, {"plan": {"schedule": "1f1b"}}),
        (SPLIT, False, {"plan": {"schedule": "looped_bfs"}, "sequence_parallel": False}),
        ({"pipeline": 4}, True, {"plan": {"schedule": "1f1b"}}),
    ],
)
def test_stages_on_any_mesh(four_ranks, single, axes, tied, options):
    expected = single[tied]
    ranks = four_ranks.run(train_and_look, 3, axes=axes, source={"tied": tied}, **options)
    for rank in ranks:
        assert_equal(rank["run"], expected["run"])
        for when in ("before", "after"):
            assert rank[when] == pytest.approx(expected[when], rel=2e-6)
        assert rank["rehearsal"] == pytest.approx(expected["rehearsal"], rel=2e-6)
        assert rank["sample"] == expected["sample"]
    assert {name for rank in ranks for name in rank["weights"]} == expected["weights"].keys()


def refused(**options: Any) -> str:
    with pytest.raises(DistributedError) as caught:
        Staged(axes=SHARDED, plan={"schedule": "zbv"}, **options)
    return str(caught.value)


def test_blocks_that_are_freed_have_no_gradients_of_weights_later(four_ranks):
    for message in four_ranks.run(refused, fsdp=FsdpOptions(reshard_after_forward=True)):
        assert "schedule zbv makes gradients of weights when their blocks would have been freed" in message


@pytest.mark.soak
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "schedule", ["gpipe", "1f1b", "interleaved_1f1b", "looped_bfs", "interleaved_zero_bubble", "zbv"]
)
def test_twenty_steps_on_eight_ranks(schedule, tied):
    same = {"source": {"tied": tied}, "lr": 2e-3}
    axes = {"pipeline": 2, "tensor": 2, "shard": 2}
    for run in run_ranks(8, train, 20, axes=axes, plan={"schedule": schedule}, **same):
        assert_equal(run, train(20, **same), 1e-5)
