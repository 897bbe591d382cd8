"""Which part of a distributed tensor a rank holds, as a box: where it begins in the whole, and how large it is.

FSDP over a matrix that tensor parallelism has already split cuts what each rank has, not the whole: the axes are not
applied in the order of the mesh. A DTensor marks that with a `_StridedShard`; here the cuts are made in the order in
which they happened, each as `torch.chunk` does it, so a box is right also where nothing divides evenly.
"""

from collections.abc import Hashable, Iterable, Iterator, Sequence

import torch
from torch.distributed.tensor import DTensor, Partial
from torch.distributed.tensor.placement_types import Placement, _StridedShard

Box = tuple[tuple[int, ...], tuple[int, ...]]


def local_box(tensor: torch.Tensor) -> Box:
    """`(offsets, sizes)` of this rank's part of `tensor`: all of one that is not distributed.

    A part without elements has a size of 0 and begins at or before the end of the whole. Needs no communication; a
    tensor on meta will do.
    """
    if not isinstance(tensor, DTensor):
        return (0,) * tensor.dim(), tuple(tensor.shape)
    coordinate = tensor.device_mesh.get_coordinate()
    assert coordinate is not None, "a rank holds a tensor of a mesh that it is no part of"
    return box_at(tensor.shape, tensor.device_mesh.shape, tensor.placements, coordinate)


def local_boxes(tensors: Iterable[torch.Tensor]) -> Iterator[Box]:
    """`local_box` of each; those that are cut alike share the work."""
    known: dict[Hashable, Box] = {}
    for tensor in tensors:
        if not isinstance(tensor, DTensor):
            yield local_box(tensor)
            continue
        kind = (tensor.shape, tensor.placements, id(tensor.device_mesh))
        if kind not in known:
            known[kind] = local_box(tensor)
        yield known[kind]


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of `tensor`, itself and not a view: its memory, outside of autograd."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def box_at(
    shape: Sequence[int], mesh: Sequence[int], placements: Sequence[Placement], coordinate: Sequence[int]
) -> Box:
    """`(offsets, sizes)` of what the rank at `coordinate` of a `mesh` holds of a tensor of `shape`."""
    offsets, sizes = [0] * len(shape), list(shape)
    for dim in range(len(shape)):
        for axis in _cuts(dim, mesh, placements):
            start, sizes[dim] = _chunk(sizes[dim], mesh[axis], coordinate[axis])
            offsets[dim] += start
    return tuple(offsets), tuple(sizes)


def _cuts(dim: int, mesh: Sequence[int], placements: Sequence[Placement]) -> list[int]:
    """The axes of the mesh that cut dimension `dim`, in the order in which they have cut it."""
    order: list[int] = []
    for axis in reversed(range(len(mesh))):
        place = placements[axis]
        assert not isinstance(place, Partial), "a sum that is still to be made has no box"
        if not place.is_shard(dim) and not (isinstance(place, _StridedShard) and place.dim == dim):
            continue
        # split_factor says into how many pieces the dimension had been cut before, by axes to the right.
        pieces_before = int(place.split_factor) if isinstance(place, _StridedShard) else 1
        position, pieces = 0, 1
        while pieces < pieces_before:
            pieces *= mesh[order[position]]
            position += 1
        order.insert(position, axis)
    return order


def _chunk(size: int, pieces: int, number: int) -> tuple[int, int]:
    """Start and size of a piece, as torch.chunk cuts: the last pieces may be smaller or empty."""
    longest = -(-size // pieces)
    start = min(number * longest, size)
    return start, min(longest, size - start)
