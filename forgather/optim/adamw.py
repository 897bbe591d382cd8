"""AdamW (Loshchilov and Hutter, 2019): torch's fused kernel where it applies, else bf16 with stochastic rounding.

The states are torch's (`step`, `exp_avg`, `exp_avg_sq`), so a checkpoint of torch.optim.AdamW goes on here.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from forgather.optim.partwise import Groups, Part, PartwiseOptimizer, StateDtype, count_step, pieces
from forgather.tensor_boxes import local_part


class AdamW(PartwiseOptimizer):
    """Adam with decoupled weight decay.

    Parameters in float32 are updated by torch's fused kernel. Those in bfloat16 are computed in float32 and rounded
    stochastically, unless `stochastic_rounding` is false; their moments are float32, or with `state_dtype: parameter`
    bfloat16, rounded in the same way.
    """

    def __init__(
        self,
        params: Groups,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        *,
        stochastic_rounding: bool = True,
        seed: int = 0,
        state_dtype: StateDtype = "fp32",
    ) -> None:
        defaults = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults, stochastic_rounding=stochastic_rounding, seed=seed, state_dtype=state_dtype)
        for group in self.param_groups:
            # Whoever sees `fused` may set `found_inf` instead of waiting for its own verdict, as with torch's.
            group["fused"] = all(parameter.dtype == torch.float32 for parameter in group["params"])

    def new_state(self, group: Mapping[str, Any], parameter: Tensor) -> dict[str, Any]:
        return new_adamw_state(self, parameter, group["fused"])

    def update_group(self, group: dict[str, Any], parts: list[Part]) -> None:
        update_adamw(self, group, parts, fused=group["fused"])


def new_adamw_state(optimizer: PartwiseOptimizer, parameter: Tensor, fused: bool) -> dict[str, Any]:
    """`step`, `exp_avg` and `exp_avg_sq` of a parameter before its first step."""
    device = local_part(parameter).device if fused else None
    step = torch.zeros((), dtype=torch.float32, device=device)
    return {"step": step, "exp_avg": optimizer.like(parameter), "exp_avg_sq": optimizer.like(parameter)}


def update_adamw(optimizer: PartwiseOptimizer, group: Mapping[str, Any], parts: Sequence[Part], *, fused: bool) -> None:
    """One step of AdamW with the options of `group`; with `fused` by torch's kernel, else a piece at a time."""
    if fused:
        _update_fused(optimizer, group, parts)
        return
    for part in parts:
        _update_in_pieces(optimizer, group, part)


def _update_fused(optimizer: PartwiseOptimizer, group: Mapping[str, Any], parts: Sequence[Part]) -> None:
    found_inf = getattr(optimizer, "found_inf", None)
    beta1, beta2 = group["betas"]
    held = [part for part in parts if part.local_value.numel() > 0]
    for part in parts:
        if part.local_value.numel() == 0:  # the kernel takes no empty tensors, but steps are counted on every rank
            part.state["step"] += 1 if found_inf is None else 1 - found_inf
    if not held:
        return
    adamw(
        [part.local_value for part in held],
        [part.local_gradient for part in held],
        [part.local_state("exp_avg") for part in held],
        [part.local_state("exp_avg_sq") for part in held],
        [],
        [part.state["step"] for part in held],
        fused=True,
        grad_scale=getattr(optimizer, "grad_scale", None),
        found_inf=found_inf,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )


def _update_in_pieces(optimizer: PartwiseOptimizer, group: Mapping[str, Any], part: Part) -> None:
    beta1, beta2 = group["betas"]
    lr, step = group["lr"], count_step(part.state)
    averages, squares = part.flat_state("exp_avg"), part.flat_state("exp_avg_sq")
    values, gradients = part.value, part.gradient
    write_value = optimizer.rounding(part, step)
    write_average = optimizer.rounding(part, step, "exp_avg")
    write_square = optimizer.rounding(part, step, "exp_avg_sq")
    step_size = lr / (1 - beta1**step)
    root_of_correction = math.sqrt(1 - beta2**step)
    for piece in pieces(part):
        value, gradient = values[piece].float(), gradients[piece].float()
        average, square = averages[piece].float(), squares[piece].float()
        value.mul_(1 - lr * group["weight_decay"])
        average.lerp_(gradient, 1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        value.addcdiv_(average, (square.sqrt() / root_of_correction).add_(group["eps"]), value=-step_size)
        write_value.write(values[piece], value, piece.start)
        write_average.write(averages[piece], average, piece.start)
        write_square.write(squares[piece], square, piece.start)
