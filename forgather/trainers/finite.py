"""Stops a run at the first step whose loss or gradient is not finite, before that step changes a parameter.

Both numbers are sums over all ranks, so every rank comes to the same verdict with no word more between them.
"""

import math

import torch
from torch import Tensor
from torch.optim import Optimizer

from forgather.errors import TrainingError


class FiniteWatch:
    """Judges each step by its loss and gradient norm; raises TrainingError naming the step that is not finite.

    On a CPU a look at the numbers costs nothing, so the verdict comes at once. On a device a look would wait for all
    work in flight. There the flag stays on the device: a fused optimizer reads it (`found_inf`) and leaves parameters
    and its own state alone, from the first bad step on; the host looks one step late, while the next is queued. An
    optimizer that cannot read the flag is waited for.
    """

    def __init__(self, optimizer: Optimizer, device: torch.device, *, deferred: bool | None = None) -> None:
        reads_flag = all(group.get("fused") for group in optimizer.param_groups)
        self.deferred = (device.type != "cpu" and reads_flag) if deferred is None else deferred
        self._pending: _Verdict | None = None
        if self.deferred:
            self._bad = torch.zeros((), device=device)
            optimizer.found_inf = self._bad  # type: ignore[attr-defined]  # the place where torch's GradScaler puts it

    def observe(self, step: int, loss: Tensor, grad_norm: Tensor) -> None:
        """Judge `step`, before its update: both numbers are 0-d and the same on all ranks."""
        if not self.deferred:
            _raise_unless_finite(step, loss.item(), grad_norm.item())
            return
        previous, self._pending = self._pending, None
        numbers = torch.stack([loss, grad_norm]).float()
        self._bad.logical_or_(numbers.isfinite().all().logical_not())  # sticky: no later step mends the run
        self._pending = _Verdict(step, numbers)
        if previous is not None:
            previous.settle()

    def settle(self) -> None:
        """Wait for the verdict on the last step; called before anything of it is shown or kept."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.settle()


class _Verdict:
    """The numbers of one step on their way to the host."""

    def __init__(self, step: int, numbers: Tensor) -> None:
        self.step = step
        self.on_host = torch.empty(numbers.shape, pin_memory=numbers.is_cuda).copy_(numbers, non_blocking=True)
        self.copied = torch.cuda.Event() if numbers.is_cuda else None  # type: ignore[no-untyped-call]
        if self.copied is not None:
            self.copied.record()

    def settle(self) -> None:
        if self.copied is not None:
            self.copied.synchronize()
        loss, grad_norm = self.on_host.tolist()
        _raise_unless_finite(self.step, loss, grad_norm)


def _raise_unless_finite(step: int, loss: float, grad_norm: float) -> None:
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise TrainingError(
            f"step {step + 1}: loss {loss} and gradient norm {grad_norm} are not both finite; the step was not applied",
            fix="lower the learning rate, lengthen the warm-up, or look at the samples of this step",
        )
