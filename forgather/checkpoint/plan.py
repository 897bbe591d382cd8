"""Who writes which part of which tensor.

Each rank says once which boxes of which tensors it holds; a box that several hold is given to one of them, so that all
have about as much to write. The plan stays good as long as no rank's tensors change their names, kinds or boxes, which
is the whole run from its second step on.

PyTorch's distributed checkpoint (DCP) has such planners. They take a tensor's place from the DTensor's own bookkeeping,
which is wrong where FSDP and tensor parallelism cut one dimension (`_StridedShard`), keep one of several tensors that
share a name without a look at whether they are the same, and plan anew, over all ranks, at each save.
"""

import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from forgather.checkpoint.part import Item, place
from forgather.distributed.collectives import gather_objects, rank
from forgather.errors import CheckpointError
from forgather.tensor_boxes import Box, local_box

_OF_HOOKS = "extras/"


@dataclass(frozen=True)
class Held:
    """What one rank has of one tensor."""

    dtype: str
    shape: tuple[int, ...]
    box: Box
    is_shard: bool  # it knows its place in a whole; others are taken for copies of one another

    @property
    def num_bytes(self) -> int:
        return prod(self.box[1]) * torch.empty((), dtype=getattr(torch, self.dtype)).element_size()


@dataclass(frozen=True)
class SavePlan:
    """What this rank writes, and which names it holds copies of that another writes."""

    items: Sequence[Item]
    copies: Sequence[str]


class Plans:
    """The plan of this rank, and whether it is still the right one.

    What hooks give has a plan of its own: their tensors may have other names at each save, and the model and its
    optimizer, which are all the rest, need not be planned anew for that.
    """

    def __init__(self) -> None:
        self._halves = {True: _Half(), False: _Half()}  # what hooks give, and the rest
        self._plan: SavePlan | None = None

    @property
    def plan(self) -> SavePlan:
        assert self._plan is not None, "a plan is made before it is used"
        return self._plan

    def stale(self, tensors: Mapping[str, Tensor]) -> frozenset[bool]:
        """Which halves of the plan were made for tensors of other names or kinds."""
        halves = _halves(tensors)
        return frozenset(
            is_of_hooks for is_of_hooks, half in self._halves.items() if not half.holds(halves[is_of_hooks])
        )

    def make(self, tensors: Mapping[str, Tensor], stale: Iterable[bool] = (False, True)) -> None:
        """Plan these halves for these tensors. Collective, and `stale` the same on all ranks."""
        halves = _halves(tensors)
        for is_of_hooks in sorted(stale):
            self._halves[is_of_hooks].make(halves[is_of_hooks])
        model, hooks = self._halves[False].plan, self._halves[True].plan
        # Behind the model and optimizer, whose places stay what they are.
        behind = place([model.items[-1].at + model.items[-1].length])[-1] if model.items else 0
        items = [*model.items, *(replace(item, at=item.at + behind) for item in hooks.items)]
        self._plan = SavePlan(items, [*model.copies, *hooks.copies])


class _Half:
    """Some of the tensors: the plan for them, and what it was made for."""

    def __init__(self) -> None:
        self.plan = SavePlan((), ())
        self._held: dict[str, Held] | None = None
        # To know a tensor again is all that is wanted of it: a hook's may be a copy of the model, made for one save.
        self._known: dict[str, weakref.ref[Tensor]] = {}

    def make(self, tensors: Mapping[str, Tensor]) -> None:
        here = held(tensors)
        self.plan = make_plan(here)
        self._held = here
        self._known = {name: weakref.ref(tensor) for name, tensor in tensors.items()}

    def holds(self, tensors: Mapping[str, Tensor]) -> bool:
        here = self._held
        if here is None or tensors.keys() != here.keys():
            return False
        # Parameters and moments stay the objects that they are, so that hardly any is looked at: planning anew for
        # every save would cost more than the copy of a small model.
        return all(tensor is self._known[name]() or _held(tensor) == here[name] for name, tensor in tensors.items())


def _halves(tensors: Mapping[str, Tensor]) -> dict[bool, dict[str, Tensor]]:
    halves: dict[bool, dict[str, Tensor]] = {False: {}, True: {}}
    for name, tensor in tensors.items():
        halves[name.startswith(_OF_HOOKS)][name] = tensor
    return halves


def held(tensors: Mapping[str, Tensor]) -> dict[str, Held]:
    """What this rank has of each tensor."""
    return {name: _held(tensor) for name, tensor in tensors.items()}


def make_plan(here: Mapping[str, Held]) -> SavePlan:
    """Divide the work between the ranks. Collective. CheckpointError, on all, where their tensors make no whole."""
    everywhere = gather_objects(dict(here))
    owners = _owners(everywhere)
    own = [name for name in here if owners[name, here[name].box] == rank()]
    places = place(here[name].num_bytes for name in own)
    items = [
        Item(name, here[name].dtype, here[name].shape, *here[name].box, at, here[name].num_bytes)
        for name, (at, _) in zip(own, pairwise(places), strict=True)
    ]
    copies = [
        name
        for name, there in here.items()
        if not there.is_shard and name.startswith(_OF_HOOKS) and owners[name, there.box] != rank()
    ]
    return SavePlan(items, copies)


def _held(tensor: Tensor) -> Held:
    dtype = str(tensor.dtype).removeprefix("torch.")
    shape = tuple(tensor.shape)
    if not isinstance(tensor, DTensor):
        return Held(dtype, shape, ((0,) * len(shape), shape), is_shard=False)
    offsets, sizes = local_box(tensor)
    return Held(dtype, shape, (tuple(offsets), tuple(sizes)), is_shard=True)


def _owners(everywhere: Sequence[Mapping[str, Held]]) -> dict[tuple[str, Box], int]:
    """The rank that writes each box; the same on every rank, as each computes it from the same."""
    holders: dict[tuple[str, Box], list[int]] = {}
    kinds: dict[str, tuple[int, Held]] = {}
    for number, here in enumerate(everywhere):
        for name, there in here.items():
            first, known = kinds.setdefault(name, (number, there))
            if (known.dtype, known.shape) != (there.dtype, there.shape):
                raise CheckpointError(
                    f"{name} is {known.dtype} {list(known.shape)} on rank {first}, "
                    f"and {there.dtype} {list(there.shape)} on rank {number}: one of them would be lost",
                    fix="let its state_dict() give the same on every rank, or put the rank into the key",
                )
            holders.setdefault((name, there.box), []).append(number)
    load = [0] * len(everywhere)
    owners = {}
    for (name, box), ranks in holders.items():
        # Of what hooks give, rank 0's is the one that is kept.
        chosen = ranks[0] if name.startswith(_OF_HOOKS) else min(ranks, key=lambda number: load[number])
        owners[name, box] = chosen
        load[chosen] += everywhere[chosen][name].num_bytes
    _require_whole(owners, {name: known.shape for name, (_, known) in kinds.items()})
    return owners


def _require_whole(owners: Mapping[tuple[str, Box], int], shapes: Mapping[str, tuple[int, ...]]) -> None:
    covered: dict[str, int] = {}
    for (name, (_, sizes)), _ in owners.items():
        covered[name] = covered.get(name, 0) + prod(sizes)
    for name, elements in covered.items():
        if elements != prod(shapes[name]):
            raise CheckpointError(
                f"the ranks hold {elements:,} elements of {name}, which has {prod(shapes[name]):,}",
                fix="let every rank of the mesh save, and lay the tensor out as whole shards of one",
            )
