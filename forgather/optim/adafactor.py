"""Adafactor: second moments of a matrix as one number a row and one a column (Shazeer and Stern, 2018).

With parts of a matrix, sums over a row or column that is cut are added up over the ranks that hold its pieces: three
small collectives a step for all parameters of a mesh together. States are torch.optim.Adafactor's, and so is the
arithmetic.
"""

from collections.abc import Iterator, Mapping, Sequence
from math import sqrt
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from forgather.optim.partwise import Groups, Part, PartwiseOptimizer, count_step, laid_out, pieces
from forgather.optim.rounding import Rounding
from forgather.tensor_boxes import local_part

Axes = tuple[int, ...]


class Adafactor(PartwiseOptimizer):
    """An adaptive rate for each element at the price of two vectors a matrix; vectors keep all their moments.

    `lr` is relative: it is multiplied by a parameter's root mean square (at least `eps[1]`), and is at most
    1 / sqrt(step). With `relative: false` it is taken as it is. The update is scaled down to a root mean square of
    `clip`. `eps[0]` bounds the moments from below; null is the precision of float32.
    """

    def __init__(
        self,
        params: Groups,
        lr: float = 1e-2,
        beta2_decay: float = -0.8,
        eps: tuple[float | None, float] = (None, 1e-3),
        clip: float = 1.0,
        weight_decay: float = 0.0,
        relative: bool = True,
        *,
        stochastic_rounding: bool = True,
        seed: int = 0,
    ) -> None:
        defaults = {
            "lr": lr,
            "beta2_decay": beta2_decay,
            "eps": tuple(eps),
            "clip": clip,
            "weight_decay": weight_decay,
            "relative": relative,
        }
        super().__init__(params, defaults, stochastic_rounding=stochastic_rounding, seed=seed)

    def new_state(self, group: Mapping[str, Any], parameter: Tensor) -> dict[str, Any]:  # noqa: ARG002
        state: dict[str, Any] = {"step": torch.zeros((), dtype=torch.float32)}
        if parameter.dim() < 2:
            return state | {"variance": self.like(parameter)}
        return state | {"row_var": _zeros_without(parameter, -1), "col_var": _zeros_without(parameter, -2)}

    def update_group(self, group: dict[str, Any], parts: list[Part]) -> None:
        factors = [_Factored(part, group, count_step(part.state)) for part in parts]
        for phase in (_Factored.measure, _Factored.follow_rows_and_columns, _Factored.measure_update):
            _add_up([sum_ for factored in factors for sum_ in phase(factored)])
        for factored in factors:
            factored.apply(self.rounding(factored.part, factored.step))


class _Sum:
    """A local sum that is to be added up over the axes of a mesh which cut what it goes over."""

    def __init__(self, value: Tensor, parameter: Tensor, axes: Axes) -> None:
        self.value = value
        self.mesh: DeviceMesh | None = parameter.device_mesh if isinstance(parameter, DTensor) else None
        self.axes = axes


class _Factored:
    """One step of one parameter, in phases between which sums are added up."""

    def __init__(self, part: Part, group: Mapping[str, Any], step: int) -> None:
        self.part = part
        self.group = group
        self.step = step
        self.parameter = part.parameter
        self.value, self.gradient = part.value, part.gradient
        self.is_matrix = self.parameter.dim() > 1
        self.shape = tuple(local_part(self.parameter).shape)
        self.eps = torch.finfo(torch.float32).eps if group["eps"][0] is None else float(group["eps"][0])
        self.fraction = step ** group["beta2_decay"]  # of the new moments

    def measure(self) -> Iterator[_Sum]:
        """Sums of squares: of the parameter, and of the gradient's rows and columns."""
        self.of_value = self._zero()
        for piece in pieces(self.part):
            self.of_value += self.value[piece].float().square().sum()
        yield _Sum(self.of_value, self.parameter, self._axes())
        if self.is_matrix:
            gradient = self.part.local_gradient
            # As norms: their squares need no copy of the whole in between.
            self.of_rows = torch.linalg.vector_norm(gradient, dim=-1, keepdim=True, dtype=torch.float32).square_()
            self.of_columns = torch.linalg.vector_norm(gradient, dim=-2, keepdim=True, dtype=torch.float32).square_()
            yield _Sum(self.of_rows, self.parameter, self._axes(-1))
            yield _Sum(self.of_columns, self.parameter, self._axes(-2))

    def follow_rows_and_columns(self) -> Iterator[_Sum]:
        """Move the moments towards this step's."""
        if not self.is_matrix:
            variance = self.part.flat_state("variance")
            for piece in pieces(self.part):
                variance[piece].lerp_(self.gradient[piece].float().square(), self.fraction)
            return
        rows, columns = self.parameter.shape[-2:]
        self.row_var, self.col_var = local_part(self.part.state["row_var"]), local_part(self.part.state["col_var"])
        self.row_var.lerp_(self.of_rows.div_(columns), self.fraction)
        self.col_var.lerp_(self.of_columns.div_(rows), self.fraction)
        self.of_row_var = self.row_var.sum(dim=-2, keepdim=True)
        yield _Sum(self.of_row_var, self.parameter, self._axes(-2))

    def measure_update(self) -> Iterator[_Sum]:
        """The sum of squares of the update, which is not kept: it would take as much as the parameter in float32."""
        if self.is_matrix:
            self.row_scale = self.row_var / self.of_row_var.div_(self.parameter.shape[-2]).clamp_(min=self.eps)
        self.of_update = self._zero()
        for piece in pieces(self.part):
            self.of_update += self._update(piece).square().sum()
        yield _Sum(self.of_update, self.parameter, self._axes())

    def apply(self, rounding: Rounding) -> None:
        lr, count = self.group["lr"], self.parameter.numel()
        rate: Tensor | float = lr
        if self.group["relative"]:
            rate = (self.of_value / count).sqrt().clamp(min=self.group["eps"][1]) * min(lr, 1 / sqrt(self.step))
        # Stays on the device: nothing waits for it.
        factor = -rate / ((self.of_update / count).sqrt() / self.group["clip"]).clamp(min=1.0)
        for piece in pieces(self.part):
            value = self.value[piece].float()
            value.mul_(1 - lr * self.group["weight_decay"]).addcmul_(self._update(piece), factor)
            if value.data_ptr() != self.value[piece].data_ptr():
                rounding.write(self.value[piece], value, piece.start)

    def _update(self, piece: slice) -> Tensor:
        """The update of some elements, before it is scaled."""
        gradient = self.gradient[piece].float()
        if not self.is_matrix:
            moments = self.part.flat_state("variance")[piece].clone()
        else:
            moments = self._moments(piece.start, gradient.numel())
        return moments.clamp_(min=self.eps * self.eps).rsqrt_().mul_(gradient)

    def _moments(self, start: int, count: int) -> Tensor:
        """The product of row and column for `count` elements of the flat part."""
        columns = self.shape[-1]
        first, last = start // columns, -(-(start + count) // columns)  # the rows that they lie in
        rows = self.row_scale.reshape(-1)[first:last]
        per_matrix = self.col_var.reshape(-1, columns)
        if per_matrix.shape[0] == 1:
            moments = rows.unsqueeze(1) * per_matrix
        else:
            matrix = torch.arange(first, last, device=rows.device) // self.shape[-2]
            moments = rows.unsqueeze(1) * per_matrix[matrix]
        return moments.view(-1)[start - first * columns : start - first * columns + count]

    def _zero(self) -> Tensor:
        return torch.zeros((), dtype=torch.float32, device=self.part.local_value.device)

    def _axes(self, *dims: int) -> Axes:
        """The axes of the mesh that cut the parameter along `dims`; along any without them."""
        if not isinstance(self.parameter, DTensor):
            return ()
        wanted = {dim % self.parameter.dim() for dim in dims}
        return tuple(
            axis
            for axis, place in enumerate(self.parameter.placements)
            if not place.is_replicate() and (not wanted or _dim(place) in wanted)
        )


def _add_up(sums: Sequence[_Sum]) -> None:
    """Add up each over its axes, in place; those of equal axes travel together."""
    for mesh, axes in dict.fromkeys((each.mesh, each.axes) for each in sums if each.axes):
        alike = [each for each in sums if (each.mesh, each.axes) == (mesh, axes)]
        packed = torch.cat([each.value.reshape(-1) for each in alike])
        assert mesh is not None, "axes are those of a mesh"
        for axis in axes:
            dist.all_reduce(packed, group=mesh.get_group(axis))
        for each, total in zip(alike, torch.split(packed, [each.value.numel() for each in alike]), strict=True):
            each.value.copy_(total.view(each.value.shape))


def _zeros_without(parameter: Tensor, dim: int) -> Tensor:
    """Zeros laid out like `parameter`, but of length 1 along `dim`, on all ranks that hold a piece along it."""
    dim %= parameter.dim()
    part, shape = list(local_part(parameter).shape), list(parameter.shape)
    part[dim] = shape[dim] = 1
    zeros = torch.zeros(part, dtype=torch.float32, device=local_part(parameter).device)
    if not isinstance(parameter, DTensor):
        return zeros
    placements = [Replicate() if _dim(place) == dim else place for place in parameter.placements]
    return laid_out(zeros, parameter, torch.Size(shape), placements)


def _dim(place: object) -> int | None:
    """The dimension that a placement cuts; _StridedShard has one too and is no Shard."""
    return getattr(place, "dim", None)
