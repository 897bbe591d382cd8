"""Bytes on the wire, by hand: each collective by its formula, and DDP and FSDP by the size of their model."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from forgather.metrics.traffic import Traffic
from tests.ranks import RankPool

FLOATS = 100


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[RankPool]:
    with RankPool(2) as pool:
        yield pool


def collectives() -> dict[str, int]:
    group = dist.group.WORLD
    x, both = torch.ones(FLOATS), torch.ones(2 * FLOATS)
    with Traffic() as traffic:
        dist.all_reduce(x)
        dist.all_gather_single(both, x)
        dist.reduce_scatter_single(x, both)
        dist.broadcast(x, 0)
        torch.ops._c10d_functional.all_reduce(x, "sum", group.group_name)
        if dist.get_rank() == 0:
            dist.send(x, 1)
        else:
            dist.recv(x, 0)
        torch.mm(both.view(2, FLOATS), both.view(FLOATS, 2))  # nothing of this is sent
    return traffic.by_collective


def test_each_collective_by_its_formula(two_ranks):
    first, second = two_ranks.run(collectives)
    size = 4 * FLOATS
    assert first == {
        "all_gather": size,  # each has half of the result
        "all_reduce": 2 * size,  # twice half, and two of them
        "broadcast": size,
        "reduce_scatter": size,
        "send": size,
    }
    assert second == {**first, "send": 0} or "send" not in second  # it only received


def one_step(wrap: str) -> tuple[dict[str, int], dict[str, int]]:
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Linear(10, 20), nn.Linear(20, 10))
    if wrap == "ddp":
        model = DistributedDataParallel(model)
    else:
        for layer in model:
            fully_shard(layer)
        fully_shard(model)
    for _ in range(3):  # DDP rearranges its buckets in the second step
        with Traffic() as traffic:
            model(torch.ones(3, 10)).sum().backward()
    return traffic.by_collective, traffic.calls


def test_ddp_sends_each_gradient_once_and_fsdp_gathers_twice(two_ranks):
    size = 4 * (10 * 20 + 20 + 20 * 10 + 10)
    (ddp, calls), _ = two_ranks.run(one_step, "ddp")
    assert ddp == {"all_reduce": size}
    assert calls == {"all_reduce": 1}
    (fsdp, calls), _ = two_ranks.run(one_step, "fsdp")
    # Gathered before forward and again before backward, the second layer of this model in one go.
    assert fsdp["reduce_scatter"] == size / 2
    assert size / 2 < fsdp["all_gather"] <= size
    assert calls["reduce_scatter"] == 2


def test_alone_nothing_is_sent():
    with Traffic() as traffic:
        torch.ones(3).sum()
    assert traffic.bytes_sent == 0
