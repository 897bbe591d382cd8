"""Which parts of a model's parameters this rank has, and which rank of a worker speaks for each.

A part is a box of a parameter (a `Slice`). Replicas have equal ones, and so have the first and the last stage of a
pipeline whose embeddings are tied: of the ranks that hold a box one is its *owner*, who sends it and receives it, and
gives the others what has become of it. The work is divided evenly.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from forgather.checkpoint.state import TrainState
from forgather.diloco.messages import Slice
from forgather.distributed.collectives import gather_objects, rank, world_size
from forgather.errors import DistributedError
from forgather.tensor_boxes import local_box, local_part


def covering_ranges(shape: Sequence[int], part: Slice, block: int) -> list[tuple[int, int]]:
    """Ascending, disjoint ranges of the elements of a row-major tensor of `shape` that cover the slice `part`.

    Each begins at a multiple of `block`, and ends at one or at the end of the tensor; neighbours that touch are one.
    """
    starts, length = runs(shape, part)
    if not length or not len(starts):
        return []
    first = starts // block * block
    last = np.minimum(-(-(starts + length) // block) * block, prod(shape))
    is_new = np.ones(len(starts), dtype=bool)
    is_new[1:] = first[1:] > last[:-1]
    begins = np.flatnonzero(is_new)
    ends = np.append(begins[1:], len(starts)) - 1
    return [(int(first[begin]), int(last[end])) for begin, end in zip(begins, ends, strict=True)]


def runs(shape: Sequence[int], part: Slice) -> tuple[np.ndarray, int]:
    """Where in the row-major whole the contiguous runs of a slice begin, ascending, and how long each of them is."""
    whole_from = len(shape)  # dimensions from here on are taken whole, so their elements are one run
    while whole_from > 0 and part.sizes[whole_from - 1] == shape[whole_from - 1]:
        whole_from -= 1
    cut = max(0, whole_from - 1)  # the dimension whose part is a run: the last one that is cut
    length = prod(part.sizes[cut:])
    starts = np.zeros(1, dtype=np.int64)
    for dim in range(len(shape)):
        stride = prod(shape[dim + 1 :])
        count = part.sizes[dim] if dim < cut else 1
        steps = (part.offsets[dim] + np.arange(count, dtype=np.int64)) * stride
        starts = (starts[:, None] + steps[None, :]).ravel()
    return starts, length


@dataclass(frozen=True)
class Holding:
    """What this rank holds of one parameter, and who else does. `holders` are ranks, the owner is one of them."""

    slice: Slice
    shape: tuple[int, ...]
    parameter: Tensor
    owner: int
    holders: tuple[int, ...]

    @property
    def is_owned(self) -> bool:
        """Whether this rank sends and receives it."""
        return self.owner == rank()

    @property
    def local(self) -> Tensor:
        """The memory of it, in its own dtype and on its own device, outside of autograd."""
        return local_part(self.parameter).detach()


class Holdings:
    """The slices of the parameters that `optimizer` trains, over the ranks of this worker. Collective.

    `mine` are this rank's, `parameters` the shapes of all ranks'. Names are those of a checkpoint: tied parameters have
    one. DistributedError, on all ranks, where their slices do not make up the parameters.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        trained = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        held = {name: tensor for name, tensor in TrainState(model, optimizer).weights().items() if tensor in trained}
        here = {name: (tuple(tensor.shape), local_box(tensor)) for name, tensor in held.items()}
        holders: dict[Slice, list[int]] = {}
        self.parameters: dict[str, tuple[int, ...]] = {}
        for number, there in enumerate(gather_objects(here)):
            for name, (shape, (offsets, sizes)) in there.items():
                if self.parameters.setdefault(name, shape) != shape:
                    raise DistributedError(f"{name} has shape {list(shape)} on rank {number}, and another elsewhere")
                if prod(sizes):  # not the shard that is left without elements
                    holders.setdefault(Slice(name, tuple(offsets), tuple(sizes)), []).append(number)
        _require_whole(holders, self.parameters)
        self.owners = _choose_owners(holders)
        self.mine = [
            Holding(part, shape, held[name], self.owners[part], tuple(holders[part]))
            for name, (shape, box) in here.items()
            if (part := Slice(name, tuple(box[0]), tuple(box[1]))).numel
        ]
        self.groups = _make_groups(holders.values())

    def of(self, names: Iterable[str]) -> list[Holding]:
        """This rank's holdings of parameters of these names, in their order."""
        by_name = {holding.slice.name: holding for holding in self.mine}
        return [by_name[name] for name in names if name in by_name]

    def part_of(self, names: Iterable[str]) -> tuple[int | None, int]:
        """This rank's number among those that own something of these parameters (None: it owns nothing), and theirs."""
        wanted = set(names)
        speakers = sorted({owner for part, owner in self.owners.items() if part.name in wanted})
        return (speakers.index(rank()) if rank() in speakers else None), len(speakers)

    @torch.no_grad()
    def share(self, holdings: Sequence[Holding], values: Mapping[str, Tensor]) -> None:
        """Give what the owners of `holdings` have in `values`, by name, to the other holders, in place. Collective.

        Values are flat fp32 tensors on the CPU; each holder gives room for those that others own.
        """
        bundles: dict[tuple[tuple[int, ...], int], list[Tensor]] = {}
        for holding in holdings:
            if len(holding.holders) > 1:
                bundles.setdefault((holding.holders, holding.owner), []).append(values[holding.slice.name])
        # Ranks that share several groups must meet in them in one order: holdings may come in another on each stage.
        for (ranks, owner), tensors in sorted(bundles.items(), key=lambda bundle: bundle[0]):
            flat = torch.cat(tensors)
            dist.broadcast(flat, src=owner, group=self.groups[ranks])
            if rank() != owner:
                for tensor, received in zip(
                    tensors, torch.split(flat, [each.numel() for each in tensors]), strict=True
                ):
                    tensor.copy_(received)


def _choose_owners(holders: Mapping[Slice, Sequence[int]]) -> dict[Slice, int]:
    """One of the holders of each slice, so that all have about as much; the same on every rank."""
    load = [0] * world_size()
    owners = {}
    for part, ranks in holders.items():
        chosen = min(ranks, key=lambda number: load[number])
        owners[part] = chosen
        load[chosen] += part.numel
    return owners


def _make_groups(holders: Iterable[Sequence[int]]) -> dict[tuple[int, ...], dist.ProcessGroup | None]:
    """A process group for every set of ranks that hold something together; None is the group of all."""
    groups: dict[tuple[int, ...], dist.ProcessGroup | None] = {}
    for ranks in sorted({tuple(each) for each in holders if len(each) > 1}):
        if len(ranks) == world_size():
            groups[ranks] = None
            continue
        group = dist.new_group(list(ranks))
        groups[ranks] = group if isinstance(group, dist.ProcessGroup) else None  # ranks outside get a placeholder
    return groups


def _require_whole(holders: Mapping[Slice, Sequence[int]], parameters: Mapping[str, Sequence[int]]) -> None:
    covered = dict.fromkeys(parameters, 0)
    for part in holders:
        covered[part.name] += part.numel
    for name, elements in covered.items():
        if elements != prod(parameters[name]):
            raise DistributedError(
                f"the ranks hold {elements:,} elements of {name}, which has {prod(parameters[name]):,}",
                fix="let every rank of the mesh make a DiLoCo object, with tensors that are whole shards of one",
            )
