"""One norm over all gradients, wherever their shards are, and clipping by it."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from forgather.distributed.collectives import sum_ranks, world_size
from forgather.distributed.holders import counts_here
from forgather.distributed.mesh import Mesh
from forgather.errors import ConfigError
from forgather.tensor_boxes import local_part

# Up to here PyTorch's fp32 norm on a CPU is off by less than 3e-7; beyond, it adds up a long line of squares (1e-5 at
# a million), and shards would have another norm than the whole.
_SHORT = 16_384
_LINE = 64  # what is added up in fp32 before it goes on in fp64: 6e-10 at a million, at 1.4 of the time


class GradientClip:
    """Measures the norm of the gradients of `parameters` over all ranks, and scales them down to `max_norm`.

    Plain tensors and DTensors of any part of `mesh` may be mixed. With `max_norm` None gradients are measured only;
    ConfigError for one that is not more than 0.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], max_norm: float | None, mesh: Mesh) -> None:
        self.parameters = list(parameters)
        if max_norm is not None and max_norm <= 0:
            raise ConfigError(
                f"gradients are to be clipped to a norm of {max_norm}, which leaves nothing of them",
                fix="max_grad_norm: 1.0, or null for no limit",
            )
        self.max_norm = max_norm
        self.mesh = mesh
        self.counted = [parameter for parameter in self.parameters if counts_here(parameter, mesh)]

    def norm(self, riding: Tensor) -> tuple[Tensor, Tensor]:
        """The 2-norm of all gradients, fp32, and `riding` (0-d) summed over the ranks in the same collective.

        Nothing is copied to the host. Each element counts once: a gradient that several ranks hold is counted by the
        one that comes first along every axis that replicates it. The same gradients have the same norm to 1e-6,
        whatever their shards.
        """
        square = sum_of_squares([local_part(p.grad) for p in self.counted if p.grad is not None], riding.device)
        if world_size() == 1:
            return square.sqrt().float(), riding
        both = sum_ranks(torch.stack([square, riding.to(square.dtype)]))
        return both[0].sqrt().float(), both[1].to(riding.dtype)

    def scale(self, norm: Tensor) -> None:
        """Scale the gradients in place so that their norm is at most `max_norm`."""
        if self.max_norm is None:
            return
        gradients = [local_part(p.grad) for p in self.parameters if p.grad is not None]
        # The same arithmetic as torch.nn.utils.clip_grad_norm_, so that the same gradients come out.
        torch._foreach_mul_(gradients, (self.max_norm / (norm + 1e-6)).clamp(max=1.0))


def sum_of_squares(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """The sum of the squares of all elements of plain `tensors`, 0-d, fp64, without a copy to the host."""
    if not tensors:
        return torch.zeros((), dtype=torch.float64, device=device)
    long = [t for t in tensors if t.device.type == "cpu" and t.numel() > _SHORT]
    short = [t for t in tensors if t.device.type != "cpu" or t.numel() <= _SHORT]
    norms = [*torch._foreach_norm(short)] if short else []
    for tensor in long:
        flat = tensor.reshape(-1)
        end = flat.numel() // _LINE * _LINE
        norms.append(torch.linalg.vector_norm(flat[:end].view(-1, _LINE), dim=1))
        norms.append(torch.linalg.vector_norm(flat[end:]))
    return torch.cat([norm.reshape(-1) for norm in norms]).double().square_().sum()
