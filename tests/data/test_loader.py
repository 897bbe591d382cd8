"""The loader: the same samples in the same order on any number of ranks and workers, from any point on."""

from itertools import islice

import numpy as np
import pytest
import torch

from forgather.data.batch import NO_TARGET, combine_digests
from forgather.data.loader import EvaluationLoader, Loader
from forgather.data.order import Permutation
from forgather.data.packing import PackedBlocks
from forgather.errors import DataError, DistributedError
from tests.data.corpora import random_documents, write_shards

LENGTH = 16


@pytest.fixture(scope="module")
def blocks(tmp_path_factory):
    return PackedBlocks(
        write_shards(tmp_path_factory.mktemp("shards"), random_documents(120), shard_tokens=1000), LENGTH
    )


def loader(blocks, **changes) -> Loader:
    settings = {"rows_per_step": 24, "rows_per_forward": 3} | changes
    seed = settings.pop("seed", 3)
    return Loader(blocks, Permutation(len(blocks), seed), **settings)


def digests(loader: Loader, steps: int) -> list[str]:
    """Of this rank's part of each step."""
    try:
        return [combine_digests(batch.digest() for batch in loader.take()) for _ in range(steps)]
    finally:
        loader.close()


def global_digests(blocks, ranks: int, steps: int, *, start: dict | None = None, **changes) -> list[str]:
    per_rank = []
    for rank in range(ranks):
        part = loader(blocks, data_rank=rank, data_ranks=ranks, **changes)
        if start is not None:
            part.load_state_dict(start)
        per_rank.append(digests(part, steps))
    return [combine_digests(step) for step in zip(*per_rank, strict=True)]


def test_all_ranks_together_see_the_same_steps(blocks):
    steps = 2 * len(blocks) // 24 + 3  # over two ends of an epoch
    expected = global_digests(blocks, 1, steps)
    assert len(set(expected)) == steps
    for ranks in (2, 4, 8):
        assert global_digests(blocks, ranks, steps) == expected


def test_an_epoch_is_every_block_once(blocks):
    part = loader(blocks, rows_per_step=1)
    order = Permutation(len(blocks), 3)
    seen = []
    for _ in range(len(blocks)):
        (batch,) = part.take()
        (sample,) = batch.samples
        assert batch.input_ids[0].tolist() == blocks[order.sample(sample)].input_ids.tolist()
        seen.append(order.sample(sample))
    part.close()
    assert sorted(seen) == list(range(len(blocks)))
    assert part.epoch == 1.0


def test_workers_change_nothing(blocks):
    expected = digests(loader(blocks), 12)
    assert digests(loader(blocks, workers=2), 12) == expected


def test_resumed_is_uninterrupted_on_another_number_of_ranks(blocks):
    expected = global_digests(blocks, 1, 14)
    started = loader(blocks, data_rank=1, data_ranks=4)
    for stop in range(8):
        state = started.state_dict()
        assert state["consumed"] == 24 * stop
        assert global_digests(blocks, (1, 2, 8)[stop % 3], 14 - stop, start=state) == expected[stop:]
        started.take()
    started.close()


def test_a_loader_in_use_can_be_set_back(blocks):
    part = loader(blocks)
    state = part.state_dict()
    first = [batch.digest() for batch in part.take()]
    part.take()
    part.load_state_dict(state)
    assert [batch.digest() for batch in part.take()] == first
    part.close()


def test_a_billion_samples_in_is_like_the_start(blocks):
    part = loader(blocks)
    part.load_state_dict(part.state_dict() | {"consumed": 10**9})
    (batch, *_) = part.take()
    part.close()
    assert batch.samples == (10**9, 10**9 + 1, 10**9 + 2)


def test_peek_is_the_global_batch_on_every_rank(blocks):
    (expected,) = global_digests(blocks, 1, 1)
    for rank in (0, 3):
        part = loader(blocks, data_rank=rank, data_ranks=4)
        assert part.peek().digest() == expected
        assert part.consumed == 0


def test_a_rank_takes_its_run_of_the_step(blocks):
    part = loader(blocks, data_rank=1, data_ranks=4)
    assert [batch.samples for batch in part.take()] == [(6, 7, 8), (9, 10, 11)]
    assert [batch.samples for batch in part.take()] == [(30, 31, 32), (33, 34, 35)]
    part.close()


def test_targets_are_counted(blocks):
    part = loader(blocks)
    for batch in part.take():
        assert batch.num_targets == int((batch.targets != NO_TARGET).sum()) > 0
        assert batch.input_ids.shape == batch.targets.shape == batch.position_ids.shape == (3, LENGTH)
        assert batch.input_ids.dtype == torch.int64
    part.close()


@pytest.mark.parametrize(("forward", "ranks", "rows", "microbatches"), [(5, 1, 4, 6), (5, 2, 4, 3), (99, 4, 6, 1)])
def test_a_microbatch_is_the_largest_divisor(blocks, forward, ranks, rows, microbatches):
    part = loader(blocks, rows_per_forward=forward, data_ranks=ranks)
    assert (part.rows_per_microbatch, part.num_microbatches) == (rows, microbatches)
    assert (
        part.describe()
        == f"24 rows of 16 tokens a step = {ranks} data ranks x {microbatches} microbatches x {rows} rows"
    )


def test_a_step_that_does_not_divide_names_what_would(blocks):
    with pytest.raises(DistributedError, match=r"24 rows a step cannot(.|\n)*rows_per_step to 20 or 25"):
        loader(blocks, data_ranks=5)
    with pytest.raises(DistributedError, match="rows_per_step to 32,"):
        loader(blocks, data_ranks=32)
    with pytest.raises(DataError, match="rows_per_forward is 0"):
        loader(blocks, rows_per_forward=0)


def test_a_resume_on_other_data_is_refused(blocks, tmp_path):
    state = loader(blocks).state_dict()
    other = PackedBlocks(write_shards(tmp_path, random_documents(120, seed=1)), LENGTH)
    for changed in (
        loader(other),
        loader(PackedBlocks(blocks.shards, LENGTH - 1)),
        loader(blocks, seed=4),
    ):
        with pytest.raises(DataError, match=r"other data|another order"):
            changed.load_state_dict(state)
        assert changed.consumed == 0


def test_another_batch_size_goes_on_with_the_next_sample(blocks):
    part = loader(blocks)
    part.take()
    bigger = loader(blocks, rows_per_step=30, rows_per_forward=30)
    bigger.load_state_dict(part.state_dict())
    assert bigger.take()[0].samples == tuple(range(24, 54))
    part.close()
    bigger.close()


@pytest.mark.parametrize(("ranks", "limit"), [(1, None), (3, None), (4, 17), (8, 1)])
def test_evaluation_sees_each_block_once_in_equally_many_batches(blocks, ranks, limit):
    loaders = [
        EvaluationLoader(blocks, rows_per_forward=5, data_rank=rank, data_ranks=ranks, limit=limit)
        for rank in range(ranks)
    ]
    batches = [list(part) for part in loaders]
    assert {len(part) for part in batches} == {len(loaders[0])}
    samples = [sample for part in batches for batch in part for sample in batch.samples]
    assert sorted(samples) == list(range(limit or len(blocks)))
    assert {batch.input_ids.shape for part in batches for batch in part} == {(5, LENGTH)}

    counted = sum(batch.num_targets for part in batches for batch in part)
    chosen = np.arange(limit or len(blocks)) * len(blocks) // (limit or len(blocks))
    assert counted == np.count_nonzero(blocks.gather(chosen).targets != NO_TARGET)
    assert counted == sum(int((batch.targets != NO_TARGET).sum()) for part in batches for batch in part)


def test_evaluation_can_be_repeated_and_must_have_something(blocks):
    part = EvaluationLoader(blocks, rows_per_forward=4, limit=10)
    assert [batch.digest() for batch in part] == [batch.digest() for batch in part]
    with pytest.raises(DataError, match="nothing to evaluate"):
        EvaluationLoader(blocks, rows_per_forward=4, limit=0)


def test_digest_depends_on_content_and_place(blocks):
    batches = loader(blocks).peek(), loader(blocks, seed=9).peek()
    assert batches[0].digest() != batches[1].digest()
    one, other = islice(EvaluationLoader(blocks, rows_per_forward=4), 2)
    assert combine_digests([one.digest(), other.digest()]) == combine_digests([other.digest(), one.digest()])
    moved = type(one)(one.input_ids, one.targets, one.position_ids, one.num_targets, other.samples)
    assert moved.digest() != one.digest()
    assert one.to("cpu").digest() == one.digest()
