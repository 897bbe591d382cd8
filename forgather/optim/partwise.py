"""What the optimizers here have in common: each rank updates its part of every parameter, by name.

Values, gradients and states are taken out of their DTensors once a step, and the arithmetic is plain; what needs more
than this rank's part (a whole matrix, a sum over a row) says so itself. Parameters in bfloat16 are computed in float32,
a piece at a time, and rounded stochastically.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement
from torch.optim import Optimizer

from forgather.errors import ConfigError
from forgather.optim.rounding import Rounding
from forgather.tensor_boxes import local_box, local_part

Groups = Iterable[dict[str, Any]]
StateDtype = str  # "fp32" or "parameter"

# Elements that are computed at once in float32: on a CPU they stay in the cache, on a device the launches are few.
_PIECE_ON_CPU = 1 << 16
_PIECE_ON_DEVICE = 1 << 25


@dataclass(slots=True)
class Part:
    """This rank's part of one parameter: local tensors of its shape, and the same flat; they may be written."""

    name: str
    parameter: Tensor
    local_value: Tensor
    local_gradient: Tensor
    state: dict[str, Any]

    @property
    def value(self) -> Tensor:
        """The part, flat."""
        assert self.local_value.is_contiguous(), f"{self.name} has gaps in memory, so it has no flat view"
        return self.local_value.view(-1)

    @property
    def gradient(self) -> Tensor:
        """Its gradient, flat."""
        return self.local_gradient.reshape(-1)

    def local_state(self, key: str) -> Tensor:
        """The local part of a state that is laid out like the parameter."""
        return local_part(self.state[key])

    def flat_state(self, key: str) -> Tensor:
        """The same, flat."""
        return local_part(self.state[key]).view(-1)


class PartwiseOptimizer(Optimizer):
    """A torch optimizer whose `update_group` is given the parts of a group that have a gradient.

    Parameters come with their names, as `optim.groups.build_optimizer` gives them. With `stochastic_rounding` the
    random bits depend on `seed`, the step, the name and the element alone.
    """

    def __init__(
        self,
        params: Groups,
        defaults: dict[str, Any],
        *,
        stochastic_rounding: bool = True,
        seed: int = 0,
        state_dtype: StateDtype = "fp32",
    ) -> None:
        if state_dtype not in ("fp32", "parameter"):
            raise ConfigError(f"state_dtype is {state_dtype!r}", fix="use fp32 or parameter")
        super().__init__(params, defaults)
        self.seed = seed if stochastic_rounding else None
        self.state_dtype = state_dtype
        for group in self.param_groups:
            _check_ranges(group)
            if "param_names" not in group:
                raise ConfigError(
                    f"{type(self).__name__} needs the names of its parameters",
                    fix="give it (name, parameter) pairs, or make it by forgather.optim.groups.build_optimizer",
                )

    def new_state(self, group: Mapping[str, Any], parameter: Tensor) -> dict[str, Any]:
        """The state of a parameter before its first step."""
        raise NotImplementedError

    def update_group(self, group: dict[str, Any], parts: list[Part]) -> None:
        """Make a step with the `parts` of one group. All ranks that share the parameters call it together."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self.update_group(group, list(self._parts(group)))
        return loss

    def like(self, parameter: Tensor) -> Tensor:
        """Zeros laid out like `parameter`, in the dtype of states."""
        dtype = torch.float32 if self.state_dtype == "fp32" else parameter.dtype
        return torch.zeros_like(parameter, dtype=dtype, memory_format=torch.contiguous_format)

    def rounding(self, part: Part, step: int, key: str = "") -> Rounding:
        """How to write `part`'s value, or its state `key`, at this step (counted from 1)."""
        name = f"{part.name}\0{key}"
        return Rounding(self.seed, name, step, local_box(part.parameter), part.parameter.shape)

    def _parts(self, group: dict[str, Any]) -> Iterator[Part]:
        # A group that stands in for another has one of its parameters: strict would refuse it.
        for name, parameter in zip(group["param_names"], group["params"], strict=False):
            if parameter.grad is None:
                continue
            if not self.state[parameter]:
                self.state[parameter] = self.new_state(group, parameter)
            yield Part(name, parameter, local_part(parameter), local_part(parameter.grad), self.state[parameter])


def _check_ranges(group: Mapping[str, Any]) -> None:
    """ConfigError for an option of a group with which a step would lead nowhere."""
    for name in ("lr", "eps", "weight_decay"):
        value = group.get(name, 0)
        if isinstance(value, int | float) and not 0 <= value < math.inf:
            raise ConfigError(f"the optimizer's {name} is {value}", fix=f"use a number from 0 for {name}")
    means = {"betas": group.get("betas", ()), "momentum": (group.get("momentum", 0),)}
    for name, weights in means.items():
        if not all(0 <= weight < 1 for weight in weights):
            shown = ", ".join(map(str, weights))
            raise ConfigError(f"the optimizer's {name}: {shown}", fix=f"use numbers from 0, below 1, for {name}")
    if group.get("nesterov") and not group["momentum"]:
        raise ConfigError(
            "the optimizer's nesterov is true, but its momentum is 0", fix="use nesterov: false, or momentum: 0.9"
        )


def laid_out(part: Tensor, parameter: Tensor, shape: torch.Size, placements: Iterable[Placement]) -> Tensor:
    """`part` as the local part of a tensor of `shape`, spread over the mesh of `parameter`; plain where that is."""
    if not isinstance(parameter, DTensor):
        return part
    strides = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        part, parameter.device_mesh, tuple(placements), run_check=False, shape=shape, stride=strides
    )


def pieces(part: Part) -> Iterator[slice]:
    """The ranges of a flat part that are computed at once."""
    size = _PIECE_ON_CPU if part.local_value.device.type == "cpu" else _PIECE_ON_DEVICE
    return (slice(start, start + size) for start in range(0, part.local_value.numel(), size))


def count_step(state: dict[str, Any]) -> int:
    """One step more in `state`, and how many there are now; it is counted on the host, so nothing is waited for."""
    state["step"] += 1
    return int(state["step"].item())
