"""Plain replicas add up their gradients, once a step, whatever their size and whether each rank used them all."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from forgather.distributed import fsdp, replicas
from forgather.distributed.environment import Environment
from forgather.distributed.fsdp import apply_fsdp, describe_spread, mark_microbatch, sum_replicas
from forgather.distributed.mesh import Mesh
from tests.ranks import RankPool


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))
        self.frozen = nn.Parameter(torch.ones(6), requires_grad=False)

    def forward(self, x: Tensor, used: int = 4) -> Tensor:
        for layer in self.layers[:used]:
            x = torch.tanh(layer(x))
        return (x * self.frozen).sum()


def rows(rank: int, number: int) -> Tensor:
    return torch.randn(3, 6, generator=torch.Generator().manual_seed(10 * rank + number))


def expected(used: list[int], microbatches: int) -> list[Tensor]:
    model = Layers()
    for rank in range(2):
        for number in range(microbatches):
            model(rows(rank, number), used[rank]).backward()
    return [p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters() if p.requires_grad]


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[RankPool]:
    with RankPool(2) as pool:
        yield pool


def gradients(used: list[int], microbatches: int, bucket_mib: float, marked: bool) -> tuple[list[Tensor], int, str]:
    """The gradients of two steps' second one, how many collectives it took, and what was made of the model."""
    large, bucket = replicas.LARGE_MIB, replicas.BUCKET_MIB
    replicas.LARGE_MIB, replicas.BUCKET_MIB = bucket_mib, bucket_mib
    mesh = Mesh(Environment(device="cpu"), replicate=2)
    model = Layers()
    names, kind = [name for name, _ in model.named_parameters()], type(model)
    apply_fsdp(model, mesh)
    assert [name for name, _ in model.named_parameters()] == names
    assert type(model) is kind
    calls: list[int] = []
    all_reduce = dist.all_reduce

    def counted(*args, **kwargs):
        calls.append(1)
        return all_reduce(*args, **kwargs)

    dist.all_reduce = counted
    try:
        for _ in range(2):
            calls.clear()
            model.zero_grad()
            for number in range(microbatches):
                mark_microbatch(model, marked and number == microbatches - 1)
                model(rows(mesh.data_rank, number), used[mesh.data_rank]).backward()
            if not marked:
                sum_replicas(model)
    finally:
        dist.all_reduce = all_reduce
        replicas.LARGE_MIB, replicas.BUCKET_MIB = large, bucket
    return [p.grad for p in model.parameters() if p.requires_grad], len(calls), describe_spread(model)


@pytest.mark.parametrize("used", [[4, 4], [4, 2], [1, 1]], ids=str)
@pytest.mark.parametrize("microbatches", [1, 3])
@pytest.mark.parametrize(
    ("bucket_mib", "collectives"), [(1.0, 1), (0.0, 8), (100 / 2**20, 5), (200 / 2**20, 4)], ids=str
)
def test_gradients_are_summed_once_a_step(two_ranks, used, microbatches, bucket_mib, collectives):
    theirs = expected(used, microbatches)
    for ours, calls, words in two_ranks.run(gradients, used, microbatches, bucket_mib, True):
        assert calls == collectives
        assert words == "replicated, fp32"
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_gradients_that_were_made_in_parts_are_summed_when_asked(two_ranks):
    theirs = expected([4, 4], 2)
    for ours, calls, _ in two_ranks.run(gradients, [4, 4], 2, 1.0, False):
        assert calls == 1
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def low_gradients(bucket_mib: float) -> tuple[list[Tensor], set[torch.dtype]]:
    """The gradients of a bf16 model's second step, and the dtypes that they were summed in."""
    large, replicas.LARGE_MIB = replicas.LARGE_MIB, bucket_mib
    mesh = Mesh(Environment(device="cpu"), replicate=2)
    model = Layers().bfloat16()
    apply_fsdp(model, mesh)
    dtypes: set[torch.dtype] = set()
    all_reduce = dist.all_reduce

    def noted(tensor, *args, **kwargs):
        dtypes.add(tensor.dtype)
        return all_reduce(tensor, *args, **kwargs)

    dist.all_reduce = noted
    try:
        for _ in range(2):
            model.zero_grad()
            model(rows(mesh.data_rank, 0).bfloat16()).backward()
    finally:
        dist.all_reduce, replicas.LARGE_MIB = all_reduce, large
    return [p.grad for p in model.parameters() if p.requires_grad], dtypes


@pytest.mark.parametrize("bucket_mib", [1.0, 0.0])
def test_low_precision_is_added_up_in_fp32(two_ranks, bucket_mib):
    alone = []
    for rank in range(2):
        model = Layers().bfloat16()
        model(rows(rank, 0).bfloat16()).backward()
        alone.append([p.grad.float() for p in model.parameters() if p.requires_grad])
    for gradients_there, dtypes in two_ranks.run(low_gradients, bucket_mib):
        assert dtypes == {torch.float32}
        for gradient, first, second in zip(gradients_there, *alone, strict=True):
            assert torch.equal(gradient, (first + second).bfloat16())


def most_at_once(marked: bool) -> tuple[int, int]:
    """How many messages a bf16 model's step sends, and for how many of them there is memory at the same time."""
    large, replicas.LARGE_MIB = replicas.LARGE_MIB, 0.0
    mesh = Mesh(Environment(device="cpu"), replicate=2)
    model = Layers().bfloat16()
    apply_fsdp(model, mesh)
    at_once: list[int] = []
    all_reduce = dist.all_reduce

    def noted(tensor, *args, **kwargs):
        at_once.append(sum(bucket.buffer is not None for bucket in fsdp._spread(model).replicas._buckets))
        return all_reduce(tensor, *args, **kwargs)

    dist.all_reduce = noted
    try:
        mark_microbatch(model, marked)
        model(rows(mesh.data_rank, 0).bfloat16()).backward()
        if not marked:
            sum_replicas(model)
    finally:
        dist.all_reduce, replicas.LARGE_MIB = all_reduce, large
    return len(at_once), max(at_once)


@pytest.mark.parametrize("marked", [True, False])
def test_memory_for_sums_in_fp32_does_not_grow_with_the_model(two_ranks, marked):
    assert two_ranks.run(most_at_once, marked) == [(8, replicas.IN_FP32_AT_ONCE)] * 2
