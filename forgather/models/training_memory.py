"""How much memory the training of a model takes before the first activation: weights, gradients, optimizer state."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes on one device that holds the whole model in `dtype`."""

    dtype: str
    optimizer: str
    weights: int
    gradients: int
    optimizer_state: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer_state


def training_memory(model: nn.Module, *, fused: bool = False) -> list[TrainingMemory]:
    """One entry for each of float32 and bfloat16 with each optimizer; what is frozen has no gradient and no state.

    Weights, gradients and state are all in that dtype, as torch's optimizers keep them. `fused`: each parameter is
    stepped as soon as its gradient is whole, so that at most the largest gradient exists. Shared tensors count once.
    """
    parameters = list(model.parameters())
    trained = [parameter.shape for parameter in parameters if parameter.requires_grad]
    elements = [shape.numel() for shape in trained]
    return [
        TrainingMemory(
            dtype=str(dtype).removeprefix("torch."),
            optimizer=name,
            weights=sum(parameter.numel() for parameter in parameters) * dtype.itemsize,
            gradients=(max(elements, default=0) if fused else sum(elements)) * dtype.itemsize,
            optimizer_state=sum(map(state, trained)) * dtype.itemsize,
        )
        for dtype in DTYPES
        for name, state in OPTIMIZERS.items()
    ]


def _nothing(shape: torch.Size) -> int:  # noqa: ARG001  the others look at it
    return 0


def _momentum(shape: torch.Size) -> int:
    return shape.numel()


def _two_moments(shape: torch.Size) -> int:
    return 2 * shape.numel()


def _factored(shape: torch.Size) -> int:
    """Adafactor keeps row and column means of a matrix's second moment, and all of a vector's."""
    if len(shape) < 2:
        return shape.numel()
    return shape.numel() // shape[-1] + shape.numel() // shape[-2]


# Elements of state for a parameter of some shape; the step counters of a few bytes are left out.
OPTIMIZERS: dict[str, Callable[[torch.Size], int]] = {
    "SGD": _nothing,
    "SGD with momentum": _momentum,
    "Adafactor": _factored,
    "AdamW": _two_moments,
}
