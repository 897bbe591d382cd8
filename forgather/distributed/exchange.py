"""What ranks that split a layer among them tell one another, each with the gradient that belongs to it.

A tensor is *whole* when every rank of the group holds the same, *split* along a dimension when each holds a piece, and
*partial* when the sum over the ranks is meant. The pairs are those of Shoeybi et al. 2019, "Megatron-LM",
arXiv:1909.08053, section 3, and for the sequence of Korthikanti et al. 2022, arXiv:2205.05198, section 4.2.

    function           forward           its gradient
    enter              nothing           partial -> whole
    add                partial -> whole  nothing
    split              whole -> split    split -> whole
    gather             split -> whole    its own piece
    gather_and_enter   split -> whole    partial -> split
    add_and_split      partial -> split  split -> whole

Shapes: B rows, L tokens, D channels. Pieces have the same size on all ranks, save those of `split` and `gather`, which
are cut as torch.chunk cuts.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup


def enter(x: Tensor, group: Group) -> Tensor:
    """A whole tensor, from which each rank computes something else: its gradient is the sum of theirs."""
    return _apply(_Enter, x, group)


def add(x: Tensor, group: Group, *, over: bool = True) -> Tensor:
    """The sum over the ranks, whole. May be written over `x`, save where `over` is false."""
    return _apply(_Add, x, group, over)


def split(x: Tensor, dim: int, group: Group) -> Tensor:
    """This rank's piece of a whole tensor."""
    return _apply(_Split, x, dim, x.shape[dim], group)


def gather(x: Tensor, dim: int, size: int, group: Group) -> Tensor:
    """The whole, `size` long in `dim`, of this piece and the others; what follows is the same on all ranks."""
    return _apply(_Gather, x, dim, size, group)


def gather_and_enter(x: Tensor, dim: int, group: Group) -> Tensor:
    """The whole of this piece and the others, from which each rank computes something else."""
    return _apply(_GatherAndEnter, x, dim, group)


def add_and_split(x: Tensor, dim: int, group: Group) -> Tensor:
    """This rank's piece of the sum over the ranks."""
    return _apply(_AddAndSplit, x, dim, group)


def chunk_bounds(size: int, pieces: int, number: int) -> tuple[int, int]:
    """Start and end of a piece, as torch.chunk cuts: the last pieces may be smaller or empty."""
    longest = -(-size // pieces)
    return min(number * longest, size), min((number + 1) * longest, size)


def _apply(function: Any, *args: Any) -> Tensor:
    result: Tensor = function.apply(*args)
    return result


def _sum(x: Tensor, group: Group) -> Tensor:
    x = x.contiguous()
    dist.all_reduce(x, group=group)
    return x


def _own(x: Tensor, dim: int, group: Group) -> Tensor:
    start, end = chunk_bounds(x.shape[dim], group.size(), group.rank())
    return x.narrow(dim, start, end - start)


def _whole(x: Tensor, dim: int, size: int, group: Group) -> Tensor:
    """All pieces, in the order of the ranks."""
    ranks = group.size()
    longest = -(-size // ranks)
    missing = longest - x.shape[dim]
    if missing:  # collectives want equal sizes
        x = torch.cat([x, x.new_zeros(*x.shape[:dim], missing, *x.shape[dim + 1 :])], dim)
    pieces = x.new_empty(ranks, *x.shape)
    dist.all_gather_single(pieces.view(-1), x.contiguous().view(-1), group=group)
    # Not a view: FSDP hangs its hooks on what a block returns.
    whole = torch.cat(pieces.unbind(0), dim)
    return whole if longest * ranks == size else whole.narrow(dim, 0, size).contiguous()


def _sum_own(x: Tensor, dim: int, group: Group) -> Tensor:
    ranks = group.size()
    shape = (*x.shape[:dim], ranks, x.shape[dim] // ranks, *x.shape[dim + 1 :])
    pieces = x.reshape(shape).movedim(dim, 0).contiguous()
    own = torch.empty_like(pieces[0])
    dist.reduce_scatter_single(own.view(-1), pieces.view(-1), group=group)
    return own


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        # The gradient may be somebody else's memory, which a sum in place would change.
        return _sum(grads[0].clone(memory_format=torch.contiguous_format), ctx.group), None


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, over: bool) -> Tensor:
        if torch.compiler.is_compiling() or not x.is_contiguous() or not over:
            return _sum(x.clone(memory_format=torch.contiguous_format), group)
        ctx.mark_dirty(x)
        return _sum(x, group)

    @staticmethod
    def backward(_ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0], None, None


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, size: int, group: Group) -> Tensor:
        ctx.dim, ctx.size, ctx.group = dim, size, group
        return _own(x, dim, group).contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _whole(grads[0], ctx.dim, ctx.size, ctx.group), None, None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, size: int, group: Group) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return _whole(x, dim, size, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _own(grads[0], ctx.dim, ctx.group), None, None, None


class _GatherAndEnter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: Group) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return _whole(x, dim, x.shape[dim] * group.size(), group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _sum_own(grads[0], ctx.dim, ctx.group), None, None


class _AddAndSplit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: Group) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return _sum_own(x, dim, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _whole(grads[0], ctx.dim, grads[0].shape[ctx.dim] * ctx.group.size(), ctx.group), None, None
