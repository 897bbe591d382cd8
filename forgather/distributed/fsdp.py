"""Spreading a model over a mesh with PyTorch's FSDP2 (`fully_shard`).

The model declares, this acts: blocks are the classes named in `_no_split_modules`, as Transformers has them. Embedding,
final norm and head stay together in the root group, which is not freed between forward and backward; so the head's
weight is a plain tensor there and the loss can be computed from it without ever making all logits.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from forgather.distributed.mesh import Mesh
from forgather.distributed.mixed_precision import COMPUTE_DTYPE, ComputeCopies, Precision

# Below this size one group for the whole model is faster: a group costs a few milliseconds a step in copies and
# bookkeeping, whatever its size. Measured on 2 CPU ranks, 1M parameters: 0.74 of DDP's speed by blocks, 0.95 in one
# group; at 8M there is nothing left to gain.
ONE_GROUP_BELOW = 5_000_000


_SPREAD = "_forgather_spread"  # the attribute of a model in which apply_fsdp notes what it did


@dataclass(frozen=True)
class Spread:
    """What `apply_fsdp` made of `auto`: into how many groups it cut, and what they compute in."""

    num_groups: int  # 0: one process, not wrapped
    precision: Precision


def apply_fsdp(
    model: nn.Module, mesh: Mesh, precision: Precision = "fp32", *, reshard_after_forward: bool = True
) -> None:
    """Shard `model` in place over `mesh`; a world of one is not wrapped, since wrapping costs 5 to 10 % there.

    Works on a model on meta. Gradients are summed over the ranks, not averaged: the loss has been divided by the number
    of target tokens of the whole batch already. `reshard_after_forward` frees a block's parameters until its backward:
    less memory, one more gather.
    """
    dtype = COMPUTE_DTYPE[precision]
    if mesh.data_mesh is None:
        if dtype is not None:
            ComputeCopies(model, dtype)
        _remember(model, Spread(num_groups=0, precision=precision))
        return
    # Inputs are not cast: with bf16 parameters every activation is bf16 already, and a cast at each block would round
    # what a model deliberately passes on in fp32, which the world of one does not do.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    blocks = list(find_blocks(model))
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    if num_parameters < ONE_GROUP_BELOW:
        blocks = []
    for block in blocks:
        fully_shard(block, mesh=mesh.data_mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward)
    fully_shard(model, mesh=mesh.data_mesh, mp_policy=policy)
    for module in fsdp_modules(model):
        # The divisor alone would ask for a scaled sum, which gloo does not have; together they mean: just add up.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    _remember(model, Spread(num_groups=len(blocks) + 1, precision=precision))


def describe_spread(model: nn.Module) -> str:
    """How `apply_fsdp` has spread `model`, in words."""
    spread = model.__dict__.get(_SPREAD, Spread(num_groups=0, precision="fp32"))
    if spread.num_groups == 0:
        return f"not sharded, {spread.precision}"
    return f"FSDP2 in {spread.num_groups} group{'s' if spread.num_groups > 1 else ''}, {spread.precision}"


def _remember(model: nn.Module, spread: Spread) -> None:
    model.__dict__[_SPREAD] = spread


def find_blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The modules whose class the model names in `_no_split_modules`, in order; none where it names none."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    return (module for module in model.modules() if type(module).__name__ in names)


def fsdp_modules(model: nn.Module) -> Iterator[FSDPModule]:
    """The sharded groups of `model`, root first; nothing where it is not wrapped."""
    return (module for module in model.modules() if isinstance(module, FSDPModule))


def mark_microbatch(model: nn.Module, is_last: bool) -> None:
    """Tell the groups whether this backward ends the step: only then are gradients reduced, once a step."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(is_last)
        model.set_is_last_backward(is_last)


def reshard(model: nn.Module) -> None:
    """Free what a forward without a backward left gathered, so that `parameters()` are the shards again."""
    for module in fsdp_modules(model):
        module.reshard()
