"""The factor that keeps fp16's small gradients from vanishing, and its search for the largest that fits.

Micikevicius et al. 2018, "Mixed Precision Training", arXiv:1710.03740, section 3.2; growth and back-off as in torch's
GradScaler. Unlike that one it knows shards: the verdict comes from a norm over all ranks, so all scale alike.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from forgather.errors import ConfigError
from forgather.tensor_boxes import local_part


class LossScale:
    """Multiplies losses by a power of two and divides gradients by it; halves at an overflow, doubles when all is calm.

    The factor stays on `device`: neither using nor changing it waits for anything. It begins at `initial`, is doubled
    after `growth_every` sound steps in a row, and never falls below 1.
    """

    def __init__(self, device: torch.device, initial: float = 65536.0, *, growth_every: int = 2000) -> None:
        if initial < 1:
            raise ConfigError(f"loss_scale is {initial}", fix="begin with a power of two from 1, such as 65536")
        self.factor = torch.full((), float(initial), device=device)
        self.growth_every = growth_every
        self._sound_steps = torch.zeros((), dtype=torch.int32, device=device)

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss whose gradients are `factor` times as large."""
        return loss * self.factor

    def unscale(self, gradients: Iterable[Tensor]) -> None:
        """Divide gradients by the factor, in place; plain tensors and DTensors may be mixed."""
        local = [local_part(gradient) for gradient in gradients]
        if local:
            torch._foreach_mul_(local, self.factor.reciprocal())

    def adapt(self, is_overflow: Tensor) -> None:
        """Choose the factor of the next step; `is_overflow` is 0-d, the same on all ranks."""
        torch._amp_update_scale_(self.factor, self._sound_steps, is_overflow.float(), 2.0, 0.5, self.growth_every)
        self.factor.clamp_(min=1.0)

    def state_dict(self) -> dict[str, Any]:
        return {"factor": self.factor.item(), "sound_steps": int(self._sound_steps.item())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.factor.fill_(float(state["factor"]))
        self._sound_steps.fill_(int(state["sound_steps"]))
