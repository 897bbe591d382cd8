"""One norm over all gradients, wherever their shards are, and clipping by it."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from forgather.distributed.collectives import sum_ranks, world_size


class GradientClip:
    """Measures the norm of the gradients of `parameters` over all ranks, and scales them down to `max_norm`.

    Plain tensors and DTensors of any mesh may be mixed. With `max_norm` None gradients are measured only.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], max_norm: float | None) -> None:
        self.parameters = list(parameters)
        self.max_norm = max_norm

    def norm(self, riding: Tensor) -> tuple[Tensor, Tensor]:
        """The 2-norm of all gradients, and `riding` (0-d) summed over the ranks in the same collective.

        Nothing is copied to the host. Each element counts once: a gradient that several ranks hold is counted by the
        one that comes first along every axis that replicates it.
        """
        counted = [_local(p.grad) for p in self.parameters if p.grad is not None and _counts_here(p)]
        norm = torch.nn.utils.get_total_norm(counted) if counted else torch.zeros((), device=riding.device)
        if world_size() == 1:
            return norm, riding
        both = sum_ranks(torch.stack([norm.square(), riding.to(norm.dtype)]))
        return both[0].sqrt(), both[1]

    def scale(self, norm: Tensor) -> None:
        """Scale the gradients in place so that their norm is at most `max_norm`."""
        if self.max_norm is None:
            return
        gradients = [_local(p.grad) for p in self.parameters if p.grad is not None]
        # The same arithmetic as torch.nn.utils.clip_grad_norm_, so that the same gradients come out.
        torch._foreach_mul_(gradients, (self.max_norm / (norm + 1e-6)).clamp(max=1.0))


def _local(gradient: Tensor) -> Tensor:
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def _counts_here(parameter: Tensor) -> bool:
    if not isinstance(parameter, DTensor):
        return world_size() == 1 or torch.distributed.get_rank() == 0
    coordinate = parameter.device_mesh.get_coordinate()
    assert coordinate is not None, "a rank holds parameters of a mesh that it is no part of"
    return all(place.is_shard() or here == 0 for place, here in zip(parameter.placements, coordinate, strict=True))
