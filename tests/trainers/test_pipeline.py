"""A model cut into stages over two ranks trains, evaluates and samples as it does in one process."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from forgather.errors import ConfigError, DistributedError
from forgather.optim.groups import split
from tests.ranks import RankPool
from tests.trainers.staged import Run, Staged, train, train_and_look

SCHEDULES = ["gpipe", "1f1b", "interleaved_1f1b", "looped_bfs", "interleaved_zero_bubble", "zbv"]
PIPELINE = {"axes": {"pipeline": 2}}


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[RankPool]:
    with RankPool(2) as pool:
        yield pool


@pytest.fixture(scope="module")
def single() -> dict[bool, dict[str, Any]]:
    """The same in one process, untied and tied."""
    return {tied: train_and_look(5, source={"tied": tied}) for tied in (False, True)}


def assert_equal(run: Run, expected: Run, tolerance: float = 2e-6) -> None:
    for (loss, norm), (expected_loss, expected_norm) in zip(run, expected, strict=True):
        assert loss == pytest.approx(expected_loss, rel=tolerance)
        assert norm == pytest.approx(expected_norm, rel=tolerance)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_gives_what_one_process_gives(two_ranks, single, schedule, tied):
    expected = single[tied]
    ranks = two_ranks.run(train_and_look, 5, source={"tied": tied}, plan={"schedule": schedule}, **PIPELINE)
    for rank in ranks:
        assert_equal(rank["run"], expected["run"])
        for when in ("before", "after"):
            assert rank[when] == pytest.approx(expected[when], rel=2e-6)
        assert rank["rehearsal"] == pytest.approx(expected["rehearsal"], rel=2e-6)
        assert rank["sample"] == expected["sample"]
        assert rank["modes"] == {True}
    held = [rank["weights"] for rank in ranks]
    assert held[0].keys() | held[1].keys() == expected["weights"].keys()
    for weights in held:
        for name, weight in weights.items():
            torch.testing.assert_close(weight, expected["weights"][name], rtol=1e-5, atol=1e-5)
    both = held[0].keys() & held[1].keys()
    # In a V one rank has embedding and head; else both ranks have the tied parameter, the same to the bit.
    assert both == ({"model.embed_tokens.weight"} if tied and schedule != "zbv" else set())
    assert all(torch.equal(held[0][name], held[1][name]) for name in both)


def messages_of_an_evaluation(schedule: str) -> dict[str, list[str]]:
    """What this rank sent and received, in order, in each group."""
    run = Staged(plan={"schedule": schedule}, **PIPELINE)
    found: dict[str, list[str]] = {}
    send, receive = dist.isend, dist.recv

    def noted(kind: str, call: Any) -> Any:
        def do(tensor: torch.Tensor, **options: Any) -> Any:
            found.setdefault(options["group"].group_name, []).append(kind)
            return call(tensor, **options)

        return do

    dist.isend, dist.recv = noted("sends", send), noted("receives", receive)
    try:
        run.evaluate()
    finally:
        dist.isend, dist.recv = send, receive
    return found


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_two_ranks_meet_their_messages_in_one_order(two_ranks, schedule):
    """NCCL takes the messages between two ranks of a group one after the other: else they wait for each other."""
    first, second = two_ranks.run(messages_of_an_evaluation, schedule)
    other = {"sends": "receives", "receives": "sends"}
    assert first
    assert second == {group: [other[kind] for kind in kinds] for group, kinds in first.items()}


@pytest.mark.parametrize("microbatches", [2, 8])
def test_any_number_of_microbatches_gives_the_same(two_ranks, single, microbatches):
    for run in two_ranks.run(train, 3, plan={"microbatches": microbatches}, **PIPELINE):
        assert_equal(run, single[False]["run"][:3])


@pytest.mark.parametrize("schedule", ["interleaved_1f1b", "interleaved_zero_bubble", "zbv"])
def test_one_microbatch_is_enough(two_ranks, single, schedule):
    for run in two_ranks.run(train, 2, plan={"schedule": schedule, "microbatches": 1}, **PIPELINE):
        assert_equal(run, single[False]["run"][:2])


def test_given_cuts(two_ranks, single):
    first, last = two_ranks.run(train_and_look, 2, plan={"cuts": [1]}, recompute="full", **PIPELINE)
    for rank, blocks in ((first, 1), (last, 3)):
        assert_equal(rank["run"], single[False]["run"][:2])
        assert rank["described"][1] == f"blocks: recomputed {blocks} of {blocks}"
        assert "(embedding, 0 | 1-3, head)" in rank["described"][2]


@pytest.mark.parametrize("schedule", ["1f1b", "zbv"])
@pytest.mark.parametrize("options", [{"precision": "bf16"}, {"recompute": "full"}], ids=["bf16", "recompute"])
def test_options_of_the_step_mean_the_same(two_ranks, options, schedule):
    expected = train(3, **options)
    for run in two_ranks.run(train, 3, plan={"schedule": schedule}, **options, **PIPELINE):
        # bf16 gradients of microbatches are added up in fp32, in the same order
        assert_equal(run, expected)


@pytest.mark.parametrize("schedule", ["1f1b", "zbv"])
def test_a_model_with_positions_of_its_own_and_no_plan(two_ranks, schedule):
    gpt2 = {"source": {"kind": "gpt2", "tied": True}}
    expected = train_and_look(3, **gpt2)
    for rank in two_ranks.run(train_and_look, 3, plan={"schedule": schedule}, **gpt2, **PIPELINE):
        assert_equal(rank["run"], expected["run"])
        assert rank["after"] == pytest.approx(expected["after"], rel=2e-6)


def dropped_out() -> tuple[Run, Run, Run]:
    """Two runs of one seed, with an evaluation and samples between the steps of one; and a run without dropout."""
    undisturbed = Staged(source={"dropout": 0.5}, **PIPELINE).train(2)
    disturbed = Staged(source={"dropout": 0.5}, **PIPELINE)
    disturbed.evaluate()
    disturbed.sample()
    return undisturbed, disturbed.train(2), train(2, **PIPELINE)


def test_dropout_is_a_matter_of_seed_and_step(two_ranks):
    for undisturbed, disturbed, without in two_ranks.run(dropped_out):
        assert undisturbed == disturbed
        assert undisturbed != without


def refused(**options: Any) -> tuple[str, str]:
    with pytest.raises(DistributedError) as caught:
        Staged(**options)
    return str(caught.value), str(caught.value.fix)


def test_more_stages_than_blocks(two_ranks):
    plan = {"schedule": "interleaved_1f1b", "stages_per_rank": 3}
    for message, fix in two_ranks.run(refused, plan=plan, **PIPELINE):
        assert "6 stages, and the model has 4 blocks" in message
        assert "at most 4 stages" in fix


def refused_options(**options: Any) -> str:
    with pytest.raises(DistributedError) as caught:
        Staged(plan={"schedule": "zbv"}, **options, **PIPELINE)
    return str(caught.value)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"recompute": "selective"}, "what is selectively kept is there for one"),
        ({"compile": True}, "a compiled block"),
    ],
)
def test_what_cannot_be_where_the_backward_is_split(two_ranks, options, expected):
    for message in two_ranks.run(refused_options, **options):
        assert "schedule zbv makes two backwards over a block" in message
        assert expected in message


def groups_of_stages() -> tuple[list[str], str]:
    model = Staged(**PIPELINE).model
    with pytest.raises(ConfigError) as caught:
        split(model, {"misspelt": {"match": "embed_token_s"}})
    return [group.name for group in split(model, {"embedding": {"match": "embed_tokens"}})], str(caught.value)


def test_a_group_may_be_on_another_stage(two_ranks):
    (first, misspelt), (second, also_misspelt) = two_ranks.run(groups_of_stages)
    assert first == ["embedding", "rest"]
    assert second == ["rest"]
    for message in (misspelt, also_misspelt):
        assert "matches no parameter" in message


@pytest.mark.soak
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_twenty_steps(two_ranks, schedule, tied):
    # At the default rate AdamW makes a whole step of a gradient that is nothing but rounding, and that grows.
    same = {"source": {"tied": tied}, "lr": 2e-3}
    for run in two_ranks.run(train, 20, plan={"schedule": schedule}, **same, **PIPELINE):
        assert_equal(run, train(20, **same), 1e-5)
