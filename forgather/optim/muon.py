"""Muon for matrices, AdamW for all else, as one optimizer (Jordan et al., Muon, 2024)."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import partial
from math import sqrt
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from forgather.distributed.mesh import Mesh
from forgather.errors import ConfigError
from forgather.optim.adamw import new_adamw_state, update_adamw
from forgather.optim.orthogonal import orthogonalize
from forgather.optim.partwise import Groups, Part, PartwiseOptimizer, StateDtype, count_step
from forgather.optim.shared_matrices import SharedMatrices

_COMPUTE = {"bf16": torch.bfloat16, "fp32": torch.float32}

# Tables of tokens and positions, and the head: matrices by their shape alone.
NOT_MATRICES = r"embed|(^|\.)(wte|wpe|lm_head)\."


class Muon(PartwiseOptimizer):
    """Matrices move along their orthogonalised momentum; other parameters are updated by AdamW.

    A matrix is a parameter of two or more dimensions, the last two above 1 (those before them count matrices), whose
    name does not match `not_matrices`. Each group is cut in two by that. With `scale: match_rms_adamw` an update is as
    large as AdamW's would be, so that one learning rate and one decay serve both (Liu et al., Muon is scalable for LLM
    training, 2025, section 2.2); with `original` it is that of the first description, whose rates are about 0.02.

    The iteration is made in `compute_in`, bf16 or fp32. `mesh` lets ranks share the work also where they hold copies of
    whole matrices; with parts they always do. Groups may have options of their own.
    """

    def __init__(
        self,
        params: Groups,
        lr: float = 3e-4,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        scale: Literal["match_rms_adamw", "original"] = "match_rms_adamw",
        compute_in: Literal["bf16", "fp32"] = "bf16",
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        not_matrices: str = NOT_MATRICES,
        *,
        mesh: Mesh | None = None,
        stochastic_rounding: bool = True,
        seed: int = 0,
        state_dtype: StateDtype = "fp32",
    ) -> None:
        if scale not in ("match_rms_adamw", "original"):
            raise ConfigError(f"Muon's scale is {scale!r}", fix="use match_rms_adamw or original")
        if compute_in not in _COMPUTE:
            raise ConfigError(f"Muon's compute_in is {compute_in!r}", fix="use bf16 or fp32")
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_steps": ns_steps,
            "scale": scale,
            "betas": tuple(betas),
            "eps": eps,
        }
        super().__init__(
            [part for group in params for part in _cut(group, re.compile(not_matrices))],
            defaults,
            stochastic_rounding=stochastic_rounding,
            seed=seed,
            state_dtype=state_dtype,
        )
        self.compute_dtype = _COMPUTE[compute_in]
        self.copies = None if mesh is None else mesh.data_mesh
        self._shared: dict[tuple[object, ...], SharedMatrices] = {}
        for group in self.param_groups:
            # Made now: groups of processes are made by all ranks together, and a rank may have no gradient of one.
            if group["rule"] == "muon":
                for parameters in _by_mesh(group["params"]):
                    self._share(parameters)

    def new_state(self, group: Mapping[str, Any], parameter: Tensor) -> dict[str, Any]:
        if group["rule"] == "adamw":
            return new_adamw_state(self, parameter, group["fused"])
        return {"step": torch.zeros((), dtype=torch.float32), "momentum_buffer": self.like(parameter)}

    def update_group(self, group: dict[str, Any], parts: list[Part]) -> None:
        if group["rule"] == "adamw":
            update_adamw(self, group, parts, fused=group["fused"])
            return
        by_parameter = {part.parameter: part for part in parts}
        for parameters in _by_mesh(by_parameter):
            self._update_matrices(group, [by_parameter[parameter] for parameter in parameters])

    def _update_matrices(self, group: Mapping[str, Any], parts: list[Part]) -> None:
        shared = self._share([part.parameter for part in parts])
        steps = [count_step(part.state) for part in parts]
        directions = [self._direction(group, part, step) for part, step in zip(parts, steps, strict=True)]
        updates = shared.each(directions, partial(orthogonalize, steps=group["ns_steps"]))
        for part, step, update in zip(parts, steps, updates, strict=True):
            lr, stored = group["lr"], part.value
            value = stored.float()  # itself where it is float32
            value.mul_(1 - lr * group["weight_decay"]).add_(update, alpha=-lr * _ratio(group["scale"], part.parameter))
            if value is not stored:
                self.rounding(part, step).write(stored, value, 0)

    def _direction(self, group: Mapping[str, Any], part: Part, step: int) -> Tensor:
        """The momentum that is to be orthogonalised, in the dtype in which that is done."""
        stored, gradient, momentum = part.flat_state("momentum_buffer"), part.gradient.float(), group["momentum"]
        buffer = stored.float()
        buffer.lerp_(gradient, 1 - momentum)
        if buffer is not stored:
            self.rounding(part, step, "momentum_buffer").write(stored, buffer, 0)
        return (gradient.lerp(buffer, momentum) if group["nesterov"] else buffer).to(self.compute_dtype)

    def _share(self, parameters: list[Tensor]) -> SharedMatrices:
        key = tuple(
            (p.shape, p.device_mesh, p.placements) if isinstance(p, DTensor) else (p.shape,) for p in parameters
        )
        if key not in self._shared:
            self._shared[key] = SharedMatrices(parameters, self.copies)
        return self._shared[key]


def _cut(group: Mapping[str, Any], not_matrices: re.Pattern[str]) -> list[dict[str, Any]]:
    """The group as one of matrices and one of the rest; only those that have parameters."""
    name, params = group.get("name", "all"), list(group["params"])
    if any(isinstance(each, Tensor) for each in params):
        raise ConfigError("Muon needs the names of its parameters", fix="give it (name, parameter) pairs")
    rules: dict[str, list[tuple[str, Tensor]]] = {"muon": [], "adamw": []}
    for parameter_name, parameter in params:
        is_matrix = parameter.dim() >= 2 and min(parameter.shape[-2:]) > 1 and not not_matrices.search(parameter_name)
        rules["muon" if is_matrix else "adamw"].append((parameter_name, parameter))
    cut = [{**group, "name": f"{name} by {rule}", "rule": rule, "params": some} for rule, some in rules.items() if some]
    for part in cut:
        if part["rule"] == "adamw":
            part["fused"] = all(parameter.dtype == torch.float32 for _, parameter in part["params"])
    return cut


def _by_mesh(parameters: Iterable[Tensor]) -> list[list[Tensor]]:
    """Parameters by the mesh that they are spread over; the plain ones together."""
    found: dict[DeviceMesh | None, list[Tensor]] = defaultdict(list)
    for parameter in parameters:
        found[parameter.device_mesh if isinstance(parameter, DTensor) else None].append(parameter)
    return list(found.values())


def _ratio(scale: str, parameter: Tensor) -> float:
    """By what the learning rate is multiplied for a matrix of this shape."""
    rows, columns = parameter.shape[-2:]
    return 0.2 * sqrt(max(rows, columns)) if scale == "match_rms_adamw" else sqrt(max(1.0, rows / columns))
