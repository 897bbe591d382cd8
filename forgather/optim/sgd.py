"""SGD with momentum: torch's fused kernel where it applies, and bf16 parameters with stochastic rounding."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.sgd import sgd

from forgather.optim.partwise import Groups, Part, PartwiseOptimizer, StateDtype, count_step, pieces


class SGD(PartwiseOptimizer):
    """Gradient descent with momentum, Nesterov's where asked for, and `weight_decay` as a part of the gradient.

    Parameters in float32 are updated by torch's fused kernel, those in bfloat16 as by `optim.adamw.AdamW`.
    """

    def __init__(
        self,
        params: Groups,
        lr: float = 1e-2,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        stochastic_rounding: bool = True,
        seed: int = 0,
        state_dtype: StateDtype = "fp32",
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov}
        super().__init__(params, defaults, stochastic_rounding=stochastic_rounding, seed=seed, state_dtype=state_dtype)
        for group in self.param_groups:
            group["fused"] = all(parameter.dtype == torch.float32 for parameter in group["params"])

    def new_state(self, group: Mapping[str, Any], parameter: Tensor) -> dict[str, Any]:
        state: dict[str, Any] = {} if group["fused"] else {"step": torch.zeros((), dtype=torch.float32)}
        return state | ({"momentum_buffer": self.like(parameter)} if group["momentum"] else {})

    def update_group(self, group: dict[str, Any], parts: list[Part]) -> None:
        if not group["fused"]:
            for part in parts:
                self._update_in_pieces(group, part)
            return
        held = [part for part in parts if part.local_value.numel() > 0]
        if held:
            sgd(
                [part.local_value for part in held],
                [part.local_gradient for part in held],
                [part.local_state("momentum_buffer") if group["momentum"] else None for part in held],
                fused=True,
                grad_scale=getattr(self, "grad_scale", None),
                found_inf=getattr(self, "found_inf", None),
                weight_decay=group["weight_decay"],
                momentum=group["momentum"],
                lr=group["lr"],
                dampening=0.0,
                nesterov=group["nesterov"],
                maximize=False,
            )

    def _update_in_pieces(self, group: Mapping[str, Any], part: Part) -> None:
        momentum, step = group["momentum"], count_step(part.state)
        values, gradients = part.value, part.gradient
        write_value = self.rounding(part, step)
        write_buffer = self.rounding(part, step, "momentum_buffer")
        for piece in pieces(part):
            value, update = values[piece].float(), gradients[piece].float()
            update.add_(value, alpha=group["weight_decay"])
            if momentum:
                stored = part.flat_state("momentum_buffer")[piece]
                buffer = stored.float().mul_(momentum).add_(update)
                write_buffer.write(stored, buffer, piece.start)
                update = update.add_(buffer, alpha=momentum) if group["nesterov"] else buffer
            write_value.write(values[piece], value.add_(update, alpha=-group["lr"]), piece.start)
