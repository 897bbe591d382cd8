"""Spreading a model over the ranks that read other rows: PyTorch's FSDP2 (`fully_shard`), or plain replicas.

The model declares, this acts: blocks are the classes named in `_no_split_modules`, as Transformers has them. Embedding,
final norm and head stay together in the root group, which is not freed between forward and backward; so the head's
weight is a plain tensor there and the loss can be computed from it without ever making all logits.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.distributed_c10d import _get_default_group
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from forgather.distributed.blocks import find_blocks
from forgather.distributed.mesh import Mesh
from forgather.distributed.mixed_precision import COMPUTE_DTYPE, ComputeCopies, Precision
from forgather.distributed.replicas import Replicas
from forgather.distributed.tensor_parallel import describe_split
from forgather.errors import DistributedError

# Below this size one group for the whole model is faster: a group costs a few milliseconds a step in copies and
# bookkeeping, whatever its size. Measured on 2 CPU ranks, 1M parameters: 0.74 of DDP's speed by blocks, 0.95 in one
# group; at 8M there is nothing left to gain.
ONE_GROUP_BELOW = 5_000_000


_SPREAD = "_forgather_spread"  # the attribute of a model in which apply_fsdp notes what it did


@dataclass(frozen=True)
class FsdpOptions:
    """How FSDP2 trades memory for speed.

    `reshard_after_forward` frees a block's parameters until its backward: less memory, one more gather. auto does so,
    but not in a pipeline, where each microbatch would gather anew. `cpu_offload` keeps parameters, gradients and
    optimizer state in the host's memory between uses. `prefetch` is how many blocks ahead are gathered; 0 leaves that
    to FSDP2, which gathers the next one. DistributedError for a value that means nothing.
    """

    reshard_after_forward: bool | Literal["auto"] = "auto"
    cpu_offload: bool = False
    prefetch: int = 0

    def __post_init__(self) -> None:
        if self.reshard_after_forward not in (True, False, "auto"):
            raise DistributedError(
                f"fsdp.reshard_after_forward is {self.reshard_after_forward!r}", fix="use true, false or auto"
            )
        if isinstance(self.prefetch, bool) or not isinstance(self.prefetch, int) or self.prefetch < 0:
            raise DistributedError(f"fsdp.prefetch is {self.prefetch!r}", fix="use a number of blocks from 0")


FSDP_DEFAULTS = FsdpOptions()


@dataclass(frozen=True)
class Spread:
    """What `apply_fsdp` made of `auto`: into how many groups it cut, and what they compute in."""

    precision: Precision
    num_groups: int = 0  # 0: parameters are not sharded
    replicas: Replicas | None = None
    offloaded: bool = False
    reshards: bool = False
    copies: ComputeCopies | None = None

    def describe(self) -> str:
        if self.num_groups:
            words = f"FSDP2 in {self.num_groups} group{'s' if self.num_groups > 1 else ''}"
            words += ", blocks freed after forward" if self.reshards else ""
            return f"{words}{', offloaded to CPU memory' if self.offloaded else ''}, {self.precision}"
        return f"{'not sharded' if self.replicas is None else 'replicated'}, {self.precision}"


def apply_fsdp(
    model: nn.Module,
    mesh: Mesh,
    precision: Precision = "fp32",
    options: FsdpOptions = FSDP_DEFAULTS,
) -> None:
    """Spread `model` in place over the rows' axes of `mesh`: sharded by FSDP2, or replicated where `shard` is 1.

    A world of one is not wrapped, since wrapping costs 5 to 10 % there, and replicas alone are not either: DTensors
    cost as much. Works on a model on meta, and on layers split by `apply_tensor_parallel`. Gradients are summed over
    the ranks, not averaged: the loss has been divided by the number of target tokens of the whole batch already.
    Raises DistributedError for an offload where there is nothing to offload from.
    """
    dtype = COMPUTE_DTYPE[precision]
    if options.cpu_offload:
        _require_offloading(mesh)
    if mesh.shard == 1:
        # Before the copies: their hook, which comes then, puts others in the parameters' places.
        replicas = Replicas(model, mesh.data_group or _get_default_group()) if mesh.replicate > 1 else None
        copies = None if dtype is None else ComputeCopies(model, dtype)
        _remember(model, Spread(precision, replicas=replicas, copies=copies))
        return
    # Inputs are not cast: with bf16 parameters every activation is bf16 already, and a cast at each block would round
    # what a model deliberately passes on in fp32, which the world of one does not do.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    blocks = list(find_blocks(model))
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    if num_parameters < ONE_GROUP_BELOW:
        blocks = []
    settings: dict[str, Any] = {
        "mesh": mesh.data_mesh,
        "mp_policy": policy,
        "offload_policy": CPUOffloadPolicy() if options.cpu_offload else OffloadPolicy(),
        "shard_placement_fn": partial(_place, mesh.shard),
    }
    asked = options.reshard_after_forward
    reshards = mesh.pipeline == 1 if asked == "auto" else asked
    for block in blocks:
        fully_shard(block, **settings, reshard_after_forward=reshards)
    fully_shard(model, **settings)
    if options.prefetch:
        _prefetch([block for block in blocks if isinstance(block, FSDPModule)], options.prefetch)
    for module in fsdp_modules(model):
        # The divisor alone would ask for a scaled sum, which gloo does not have; together they mean: just add up.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    _remember(
        model,
        Spread(
            precision,
            num_groups=len(blocks) + 1,
            offloaded=options.cpu_offload,
            reshards=reshards and bool(blocks),
        ),
    )


def _prefetch(groups: list[FSDPModule], number: int) -> None:
    """Let each group, when it is used, gather the `number` groups that come after it, or in the backward before it."""
    for here, group in enumerate(groups):
        group.set_modules_to_forward_prefetch(groups[here + 1 : here + 1 + number])
        group.set_modules_to_backward_prefetch(groups[max(0, here - number) : here][::-1])


def _place(shards: int, parameter: nn.Parameter) -> Shard:
    """Which dimension FSDP cuts: another than tensor parallelism has cut, where that divides."""
    if not isinstance(parameter, DTensor) or not any(place.is_shard(0) for place in parameter.placements):
        return Shard(0)
    return Shard(1) if parameter.dim() > 1 and parameter.shape[1] % shards == 0 else Shard(0)


def _require_offloading(mesh: Mesh) -> None:
    if mesh.environment.device.type == "cpu":
        raise DistributedError("cpu_offload is true, but the run is on the CPU", fix="use cpu_offload: false")
    if mesh.shard == 1:
        raise DistributedError(
            "cpu_offload is true, but mesh.shard is 1: only what is sharded is offloaded",
            fix="use cpu_offload: false, or more of mesh.shard",
        )


def describe_spread(model: nn.Module) -> str:
    """How `apply_tensor_parallel` and `apply_fsdp` have spread `model`, in words."""
    split = describe_split(model)
    return _spread(model).describe() if split is None else f"{split}; {_spread(model).describe()}"


def _spread(model: nn.Module) -> Spread:
    spread: Spread = model.__dict__.get(_SPREAD, Spread("fp32"))
    return spread


def _remember(model: nn.Module, spread: Spread) -> None:
    model.__dict__[_SPREAD] = spread


def fsdp_modules(model: nn.Module) -> Iterator[FSDPModule]:
    """The sharded groups of `model`, root first; nothing where it is not wrapped."""
    return (module for module in model.modules() if isinstance(module, FSDPModule))


def mark_microbatch(model: nn.Module, is_last: bool) -> None:
    """Tell the groups whether this backward ends the step: only then are gradients reduced, once a step."""
    replicas = _spread(model).replicas
    if replicas is not None:
        replicas.is_last = is_last
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(is_last)
        model.set_is_last_backward(is_last)


def sum_replicas(model: nn.Module) -> None:
    """Sum the gradients over plain replicas, if there are any, after backwards that were all marked as not the last.

    For schedules that make a backward in parts, where nobody can say which part of it ends a parameter's gradient.
    """
    replicas = _spread(model).replicas
    if replicas is not None:
        replicas.finish()


def computed_parameters(model: nn.Module) -> list[nn.Parameter]:
    """What a forward of `model` has taken for its parameters: those that are lent in a lower precision, or its own."""
    copies = _spread(model).copies
    return list(model.parameters()) if copies is None else copies.lent()


def copies_held(model: nn.Module) -> AbstractContextManager[None]:
    """A context within which parameters lent in a lower precision stay as they are now, through several forwards."""
    copies = _spread(model).copies
    return nullcontext() if copies is None else copies.held()


def reshard(model: nn.Module) -> None:
    """Free what a forward without a backward left gathered, so that `parameters()` are the shards again."""
    for module in fsdp_modules(model):
        module.reshard()
