"""Work on whole matrices whose parts are spread over ranks: each matrix is done once, by one of them.

All parts of a matrix go to its worker, and the parts of the result come back, in two exchanges for all matrices
together (cf. Liu et al., Muon is scalable for LLM training, 2025, section 2.3, where each rank gathers and does all).
A rank sends and receives about its own share of the elements twice, however many ranks there are. The worker does what
a single process would do, so every mesh gives the same bits for the same matrices.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.placement_types import Placement

from forgather.tensor_boxes import Box, box_at

Work = Callable[[Tensor], Tensor]

# Elements of matrices that one worker holds at a time, beside as many of results.
ROUND = 1 << 28


class SharedMatrices:
    """`parameters` that have one mesh, and who of its ranks works on which.

    Those that are no DTensors are taken to be whole and equal on the ranks of `copies`; None for this rank alone.
    """

    def __init__(self, parameters: Sequence[Tensor], copies: DeviceMesh | None = None) -> None:
        first = parameters[0]
        mesh = first.device_mesh if isinstance(first, DTensor) else copies
        self.group = None if mesh is None else (mesh.get_group() if mesh.ndim == 1 else mesh._flatten().get_group())
        self.ranks = 1 if self.group is None else dist.get_world_size(self.group)
        self.rank = 0 if self.group is None else dist.get_rank(self.group)
        sizes = (1,) if mesh is None else tuple(mesh.shape)
        self.matrices = [_Matrix(parameter, sizes) for parameter in parameters]
        self.rounds = list(_share_out(self.matrices, self.ranks))

    def each(self, parts: Sequence[Tensor], work: Work) -> list[Tensor]:
        """This rank's parts of `work(matrix)` for all matrices; `parts` are its flat parts of these, of one dtype.

        Collective over the ranks of the mesh.
        """
        results: list[Tensor | None] = [None] * len(parts)
        for numbers in self.rounds:
            for number, part in zip(numbers, self._round(numbers, [parts[n] for n in numbers], work), strict=True):
                results[number] = part
        return [part for part in results if part is not None]

    def _round(self, numbers: Sequence[int], parts: Sequence[Tensor], work: Work) -> list[Tensor]:
        matrices = [self.matrices[number] for number in numbers]
        if self.group is None:
            pairs = zip(matrices, parts, strict=True)
            return [work(part.view(matrix.shape)).reshape(-1) for matrix, part in pairs]
        kind = parts[0]
        # To the workers: for each of them, this rank's parts of its matrices, in order.
        outgoing = [
            [
                part
                for matrix, part in zip(matrices, parts, strict=True)
                if matrix.worker == rank and matrix.is_sender(self.rank)
            ]
            for rank in range(self.ranks)
        ]
        mine = [matrix for matrix in matrices if matrix.worker == self.rank]
        incoming = [[matrix.size_at(rank) for matrix in mine if matrix.is_sender(rank)] for rank in range(self.ranks)]
        arrived = [iter(received) for received in _exchange(outgoing, incoming, kind, self.group)]
        done = []
        for matrix in mine:
            whole = kind.new_empty(matrix.shape)
            for rank in range(self.ranks):
                if matrix.is_sender(rank):
                    matrix.cut(whole, rank).copy_(next(arrived[rank]).view(matrix.box_of(rank)[1]))
            done.append(work(whole))
        # And back, to everyone who holds a part.
        outgoing = [
            [matrix.cut(whole, rank).reshape(-1) for matrix, whole in zip(mine, done, strict=True)]
            for rank in range(self.ranks)
        ]
        incoming = [
            [matrix.size_at(self.rank) for matrix in matrices if matrix.worker == rank] for rank in range(self.ranks)
        ]
        arrived = [iter(received) for received in _exchange(outgoing, incoming, kind, self.group)]
        return [next(arrived[matrix.worker]) for matrix in matrices]


class _Matrix:
    """Where the parts of one parameter are, and which rank of the mesh works on the whole."""

    def __init__(self, parameter: Tensor, mesh: tuple[int, ...]) -> None:
        self.shape = tuple(parameter.shape)
        self.mesh = mesh
        self.placements = tuple(parameter.placements) if isinstance(parameter, DTensor) else (Replicate(),) * len(mesh)
        self.worker = 0

    @property
    def cost(self) -> int:
        """What a Newton-Schulz step costs, in multiplications."""
        return prod(self.shape) * min(self.shape[-2:])

    def box_of(self, rank: int) -> Box:
        return _box(self.shape, self.mesh, self.placements, rank)

    def size_at(self, rank: int) -> int:
        return prod(self.box_of(rank)[1])

    def cut(self, whole: Tensor, rank: int) -> Tensor:
        """The part of `rank`, as a view of the whole."""
        offsets, sizes = self.box_of(rank)
        return whole[tuple(slice(start, start + size) for start, size in zip(offsets, sizes, strict=True))]

    def is_sender(self, rank: int) -> bool:
        """Whether `rank` sends its part to the worker: of copies, those send that stand where the worker stands."""
        here, there = _coordinate(rank, self.mesh), _coordinate(self.worker, self.mesh)
        return all(not place.is_replicate() or here[axis] == there[axis] for axis, place in enumerate(self.placements))


def _share_out(matrices: Sequence[_Matrix], ranks: int) -> Iterator[list[int]]:
    """Rounds of matrices, and a worker for each matrix: the dearest first, to whom has least to do."""
    numbers = iter(range(len(matrices)))
    pending = next(numbers, None)
    while pending is not None:
        taken: list[int] = []
        room = ROUND * ranks
        while pending is not None and (not taken or prod(matrices[pending].shape) <= room):
            room -= prod(matrices[pending].shape)
            taken.append(pending)
            pending = next(numbers, None)
        load = [0] * ranks
        for number in sorted(taken, key=lambda number: -matrices[number].cost):
            matrices[number].worker = load.index(min(load))
            load[matrices[number].worker] += matrices[number].cost
        yield taken


def _exchange(
    outgoing: Sequence[Sequence[Tensor]], incoming: Sequence[Sequence[int]], kind: Tensor, group: dist.ProcessGroup
) -> list[list[Tensor]]:
    """Send each rank its flat tensors; receive tensors of the `incoming` sizes from each, of the dtype of `kind`."""
    bytes_each = kind.element_size()
    sent = [part for parts in outgoing for part in parts]
    packed = torch.cat(sent) if sent else kind.new_empty(0)
    received = kind.new_empty(sum(map(sum, incoming)))
    # As bytes: not every backend knows every dtype.
    dist.all_to_all_single(
        received.view(torch.uint8),
        packed.view(torch.uint8),
        [sum(sizes) * bytes_each for sizes in incoming],
        [sum(part.numel() for part in parts) * bytes_each for parts in outgoing],
        group=group,
    )
    by_rank = torch.split(received, [sum(sizes) for sizes in incoming])
    return [list(torch.split(all_, list(sizes))) for all_, sizes in zip(by_rank, incoming, strict=True)]


def _coordinate(rank: int, mesh: tuple[int, ...]) -> tuple[int, ...]:
    coordinate = []
    for size in reversed(mesh):
        rank, here = divmod(rank, size)
        coordinate.append(here)
    return tuple(reversed(coordinate))


@cache
def _box(shape: tuple[int, ...], mesh: tuple[int, ...], placements: tuple[Placement, ...], rank: int) -> Box:
    return box_at(shape, mesh, placements, _coordinate(rank, mesh))
