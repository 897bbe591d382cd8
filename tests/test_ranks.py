"""The tests' own harness: results in order of rank, one rank's failure named, a fresh group afterwards."""

import pytest
import torch
import torch.distributed as dist

from tests.ranks import RankFailure, RankPool


def sum_of_ranks(plus: int) -> tuple[int, int]:
    total = torch.tensor(dist.get_rank() + plus)
    dist.all_reduce(total)
    return dist.get_rank(), int(total)


def fail_on_rank_one() -> None:
    if dist.get_rank() == 1:
        raise ValueError("this one")
    dist.barrier()


@pytest.fixture(scope="module")
def two_ranks():
    with RankPool(2) as pool:
        yield pool


def test_results_come_in_order_of_rank(two_ranks):
    assert two_ranks.run(sum_of_ranks, 1) == [(0, 3), (1, 3)]
    assert two_ranks.run(sum_of_ranks, plus=0) == [(0, 1), (1, 1)]


def test_a_failing_rank_is_named_and_the_next_call_starts_afresh(two_ranks):
    with pytest.raises(RankFailure, match=r"rank 1 of 2:(.|\n)*ValueError: this one"):
        two_ranks.run(fail_on_rank_one)
    assert two_ranks.run(sum_of_ranks, 1) == [(0, 3), (1, 3)]
