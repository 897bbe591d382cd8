"""What a step does, in whole tensors: loss, gradients, gradient norm and parameters, read off any mesh.

Two meshes are compared by these readings (`trainers.parity`). Every rank runs the same steps; rank 0 gets the readings.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal, Protocol

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from forgather.data.batch import Batch
from forgather.distributed.collectives import gather_objects, rank, sum_ranks, world_size
from forgather.metrics.step_result import StepResult
from forgather.tensor_boxes import local_box, local_part

Kind = Literal["targets", "loss", "gradient", "grad_norm", "parameter"]
Array = NDArray[np.float64] | NDArray[np.float32]

# Tensors are gathered this many elements of a rank at a time, so that a large model is never in one message.
_ELEMENTS_AT_ONCE = 2**22


@dataclass(frozen=True)
class Reading:
    """One value of one step, whole: step 0 is before the first one. A scalar has no name.

    `value` is None for a gradient that the step did not make. `replicas` is how far copies of the tensor on several
    ranks are apart: the largest difference of two elements.
    """

    step: int
    kind: Kind
    name: str
    value: Array | None
    replicas: float = 0.0


class Step(Protocol):
    """What is recorded: `trainers.step.LocalStep` is one."""

    def __call__(self, step: int, batches: Sequence[Batch]) -> StepResult: ...

    def settle(self) -> None: ...


class Recorder:
    """Runs steps and tells `deliver` what they did; only rank 0 is told, and all ranks call it alike.

    The gradients are those that the optimizer is given, after clipping. An optimizer that is fused with the backward is
    given none at once: its gradients are read as absent.
    """

    def __init__(
        self, step: Step, model: nn.Module, optimizer: Optimizer, deliver: Callable[[list[Reading]], None]
    ) -> None:
        self.step = step
        self.model = model
        self.optimizer = optimizer
        self.deliver = deliver
        self.names = sorted(
            {name for names in gather_objects(list(self._parameters())) for name in names}, key=_natural
        )
        self._number = 0

    def record(self, batches: Iterable[Sequence[Batch]]) -> None:
        """Make one step of each element of `batches`, which are this rank's microbatches."""
        self._tell_tensors("parameter", self._parameters())
        hook = self.optimizer.register_step_pre_hook(lambda *_: self._tell_gradients())
        try:
            for number, microbatches in enumerate(batches):
                self._number = number + 1
                self._has_gradients = False
                result = self.step(number, microbatches)
                self.step.settle()
                if not self._has_gradients:
                    self._tell_tensors("gradient", {})
                loss = sum_ranks(result.loss_sum.detach().double().cpu())
                self._tell("targets", torch.as_tensor(result.num_targets))
                self._tell("loss", loss)
                self._tell("grad_norm", result.grad_norm)
                self._tell_tensors("parameter", self._parameters())
        finally:
            hook.remove()

    def _parameters(self) -> dict[str, Tensor]:
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def _tell_gradients(self) -> None:
        self._has_gradients = True
        gradients = {name: parameter.grad for name, parameter in self._parameters().items()}
        self._tell_tensors("gradient", {name: grad for name, grad in gradients.items() if grad is not None})

    def _tell(self, kind: Kind, value: Tensor) -> None:
        if rank() == 0:
            self.deliver([Reading(self._number, kind, "", value.detach().double().cpu().numpy())])

    def _tell_tensors(self, kind: Kind, tensors: Mapping[str, Tensor]) -> None:
        for names in self._portions(tensors):
            pieces = gather_pieces({name: tensors[name] for name in names if name in tensors})
            if pieces is not None:
                self.deliver(
                    [Reading(self._number, kind, name, *assemble_pieces(pieces.get(name, []))) for name in names]
                )

    def _portions(self, tensors: Mapping[str, Tensor]) -> Iterator[list[str]]:
        """The names in portions that are gathered at once: the same on every rank."""
        sizes = gather_objects({name: tensor.numel() for name, tensor in tensors.items()})
        portion: list[str] = []
        held = 0
        for name in self.names:
            size = max(of_rank.get(name, 0) for of_rank in sizes)
            if portion and held + size > _ELEMENTS_AT_ONCE:
                yield portion
                portion, held = [], 0
            portion.append(name)
            held += size
        if portion:
            yield portion


@dataclass(frozen=True)
class Piece:
    """What one rank holds of a tensor: the part that begins at `offsets`."""

    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    values: Array


def gather_pieces(tensors: Mapping[str, Tensor]) -> dict[str, list[Piece]] | None:
    """The pieces of tensors by name, from all ranks, on rank 0; None on the others."""
    own = {name: _piece(tensor) for name, tensor in tensors.items()}
    if world_size() == 1:
        return {name: [piece] for name, piece in own.items()}
    gathered: list[dict[str, Piece] | None] | None = [None] * world_size() if rank() == 0 else None
    dist.gather_object(own, gathered, dst=0)
    if gathered is None:
        return None
    pieces: dict[str, list[Piece]] = {}
    for of_rank in gathered:
        for name, piece in (of_rank or {}).items():
            pieces.setdefault(name, []).append(piece)
    return pieces


def assemble_pieces(pieces: Sequence[Piece]) -> tuple[Array | None, float]:
    """The whole tensor, and how far copies of one part are apart; None where there is no piece."""
    if not pieces:
        return None, 0.0
    whole = np.zeros(pieces[0].shape, pieces[0].values.dtype)
    seen: dict[tuple[tuple[int, ...], tuple[int, ...]], Array] = {}
    apart = 0.0
    for piece in pieces:
        box = (piece.offsets, piece.values.shape)
        if box in seen:
            if piece.values.size:
                apart = max(apart, float(np.abs(seen[box] - piece.values).max()))
            continue
        seen[box] = piece.values
        whole[tuple(slice(start, start + size) for start, size in zip(*box, strict=True))] = piece.values
    covered = sum(prod(sizes) for _, sizes in seen)
    assert covered == whole.size, f"{covered} of {whole.size} elements are on some rank"
    return whole, apart


def _piece(tensor: Tensor) -> Piece:
    offsets, _ = local_box(tensor)
    values = local_part(tensor).detach().cpu()
    # numpy has no bfloat16, and fp32 holds every value of the shorter types.
    values = values if values.dtype == torch.float64 else values.float()
    return Piece(tuple(tensor.shape), tuple(offsets), values.numpy())


def _natural(name: str) -> tuple[tuple[int, str], ...]:
    """Layer 10 after layer 9."""
    return tuple((int(part), "") if part.isdecimal() else (-1, part) for part in name.split("."))
