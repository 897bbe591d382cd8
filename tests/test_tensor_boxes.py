"""A rank's box is where its values stand in the whole, whatever has cut the tensor."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from forgather.tensor_boxes import box_at, local_box
from tests.ranks import RankPool


@pytest.fixture(scope="module")
def four_ranks() -> Iterator[RankPool]:
    with RankPool(4) as pool:
        yield pool


def test_a_plain_tensor_is_its_own_box():
    assert local_box(torch.zeros(3, 5)) == ((0, 0), (3, 5))
    assert local_box(torch.zeros(())) == ((), ())


def value_at_box(tensor: torch.Tensor, whole: torch.Tensor) -> bool:
    offsets, sizes = local_box(tensor)
    region = tuple(slice(start, start + size) for start, size in zip(offsets, sizes, strict=True))
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return torch.equal(local, whole[region])


def sharded_over_tensor_parallel(rows: int, columns: int, tensor_dim: int, data_dim: int) -> tuple[bool, str]:
    """A matrix split by tensor parallelism first and by FSDP then, whose values say where they stand."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("shard", "tensor"))
    whole = torch.arange(rows * columns, dtype=torch.float32).reshape(rows, columns)
    layer = nn.Linear(columns, rows, bias=False)
    layer.weight = nn.Parameter(distribute_tensor(whole, mesh["tensor"], [Shard(tensor_dim)]))
    fully_shard(layer, mesh=mesh["shard"], shard_placement_fn=lambda _: Shard(data_dim))
    return value_at_box(layer.weight.detach(), whole), type(layer.weight.placements[0]).__name__


@pytest.mark.parametrize("rows", [8, 7, 5, 3, 2, 1])
def test_fsdp_cuts_what_tensor_parallelism_has_left(four_ranks, rows):
    for right, placement in four_ranks.run(sharded_over_tensor_parallel, rows, 4, 0, 0):
        assert right
        assert placement == "_StridedShard"


def test_two_axes_may_cut_two_dimensions(four_ranks):
    for right, _ in four_ranks.run(sharded_over_tensor_parallel, 7, 6, 0, 1):
        assert right
    for right, _ in four_ranks.run(sharded_over_tensor_parallel, 7, 6, 1, 0):
        assert right


def distributed(places: str, rows: int) -> bool:
    named = {"S0": Shard(0), "S1": Shard(1), "R": Replicate()}
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("shard", "tensor"))
    whole = torch.arange(rows * 5, dtype=torch.float32).reshape(rows, 5)
    return value_at_box(distribute_tensor(whole, mesh, [named[place] for place in places.split()]), whole)


@pytest.mark.parametrize("places", ["S0 S0", "S0 S1", "S1 S0", "R S0", "S1 R", "R R"])
def test_plain_placements_cut_from_left_to_right(four_ranks, places):
    assert all(four_ranks.run(distributed, places, 9))


@pytest.mark.parametrize("size", [1, 5, 12, 13])
def test_the_boxes_of_all_ranks_tile_the_whole(size):
    mesh = (2, 3, 2)
    placements = (_StridedShard(0, split_factor=6), _StridedShard(0, split_factor=2), Shard(0))
    covered = torch.zeros(size, dtype=torch.int64)
    for coordinate in torch.cartesian_prod(*(torch.arange(n) for n in mesh)).tolist():
        (start,), (length,) = box_at((size,), mesh, placements, coordinate)
        covered[start : start + length] += 1
    assert covered.eq(1).all()
