"""A plan that a schedule cannot carry out is refused before anything is built, with the numbers that work."""

from types import SimpleNamespace
from typing import Any

import pytest

from forgather.distributed.pipeline_plan import SCHEDULES, PipelinePlan
from forgather.errors import DistributedError


def plan(ranks: int = 2, here: int = 0, rows: int = 8, rows_per_forward: int = 8, **options: Any) -> PipelinePlan:
    mesh: Any = SimpleNamespace(pipeline=ranks, coordinate=lambda axis: here)
    return PipelinePlan(mesh, rows=rows, rows_per_forward=rows_per_forward, length=16, **options)


def test_without_a_pipeline_a_plan_changes_nothing():
    assert plan(ranks=1, schedule="zbv", rows_per_forward=3).rows_per_microbatch == 3


@pytest.mark.parametrize(
    ("schedule", "ranks", "stages", "rank_of"),
    [
        ("1f1b", 3, 3, [0, 1, 2]),
        ("interleaved_1f1b", 2, 4, [0, 1, 0, 1]),
        ("looped_bfs", 3, 6, [0, 1, 2, 0, 1, 2]),
        ("zbv", 3, 6, [0, 1, 2, 2, 1, 0]),
    ],
)
def test_stages_lie_in_a_loop_or_in_a_v(schedule, ranks, stages, rank_of):
    made = plan(ranks, rows=12, schedule=schedule)
    assert made.num_stages == stages
    assert [made.rank_of(stage) for stage in range(stages)] == rank_of
    assert plan(ranks, here=1, rows=12, schedule=schedule).local_stages == [
        stage for stage, rank in enumerate(rank_of) if rank == 1
    ]
    assert made.last_rank == rank_of[-1]


@pytest.mark.parametrize(
    ("options", "microbatches"),
    [
        ({}, 2),  # one for each stage at least
        ({"rows_per_forward": 2}, 4),
        ({"rows_per_forward": 3}, 4),
        ({"rows": 12, "ranks": 4}, 4),
        ({"rows": 12, "ranks": 4, "rows_per_forward": 2}, 6),
        ({"rows": 10, "ranks": 4, "schedule": "interleaved_1f1b", "rows_per_forward": 1}, 10),  # 2 rounds of 5
        ({"schedule": "gpipe", "microbatches": 1}, 1),
    ],
)
def test_microbatches(options, microbatches):
    made = plan(**options)
    assert made.microbatches == microbatches
    assert made.rows_per_microbatch * microbatches == made.rows


@pytest.mark.parametrize(
    ("options", "message", "fix"),
    [
        ({"schedule": "2f2b"}, "pipeline.schedule is '2f2b'", "gpipe, 1f1b, interleaved_1f1b, looped_bfs"),
        ({"stages_per_rank": 2}, "stages_per_rank is 2, and schedule 1f1b takes 1", "use 1, or auto; 2 is what these"),
        ({"schedule": "zbv", "stages_per_rank": 3}, "is 3, and schedule zbv takes 2", "use 2, or auto; 3 is what"),
        ({"schedule": "looped_bfs", "stages_per_rank": 1}, "schedule looped_bfs takes 2 or more", "use 2 or more"),
        ({"stages_per_rank": "two"}, "stages_per_rank is 'two'", "use 1, or auto"),
        (
            {"microbatches": 1},
            "microbatches is 1, and schedule 1f1b over 2 ranks with 8 rows",
            "microbatches 2 or 4 or 8",
        ),
        ({"microbatches": 3}, "microbatches is 3", "microbatches 2 or 4 or 8"),
        ({"microbatches": True}, "microbatches is True", "microbatches 2 or 4 or 8"),
        (
            {"schedule": "interleaved_1f1b", "ranks": 4, "rows": 30, "microbatches": 10, "rows_per_forward": 1},
            None,
            None,
        ),
        (
            {"schedule": "interleaved_1f1b", "ranks": 4, "rows": 11, "microbatches": 11},
            "microbatches is 11",
            "microbatches 1",
        ),
        ({"rows": 1}, "no number of microbatches suits", "raise rows_per_step: a rank of data needs 2 rows"),
        ({"rows": 3, "ranks": 2, "schedule": "1f1b", "rows_per_forward": 0}, "and 0 rows a forward", "microbatches 3"),
        ({"cuts": [1, 2]}, r"pipeline.cuts is \[1, 2\]; 2 stages need 1", "give the 1 blocks"),
        ({"cuts": [0]}, "every stage must have a block", "rising numbers from 1"),
        ({"schedule": "zbv", "cuts": [1, 1, 2]}, "every stage must have a block", r"such as \[2, 4, 6\]"),
        ({"cuts": ["a"]}, "cuts is", "give the 1 blocks"),
    ],
)
def test_what_a_schedule_cannot_take(options, message, fix):
    if message is None:
        plan(**options)
        return
    with pytest.raises(DistributedError, match=message) as caught:
        plan(**options)
    assert caught.value.fix is not None
    assert fix.replace("\\", "") in caught.value.fix


def test_every_schedule_names_its_source():
    assert {"gpipe", "1f1b", "interleaved_1f1b", "looped_bfs", "interleaved_zero_bubble", "zbv"} == set(SCHEDULES)
    assert all("arXiv" in schedule.source for schedule in SCHEDULES.values())
