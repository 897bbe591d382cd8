"""Judges each step before its update: one whose loss or gradient is not finite changes no parameter.

Both numbers are sums over all ranks, so every rank comes to the same verdict with no word more between them. What
follows is a stop, or, where `on_non_finite: skip` asks for it, a step left out. With a loss scale (fp16) a gradient
that overflows is no failure as long as a smaller scale is left to try.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from forgather.data.batch import Batch
from forgather.distributed.collectives import gather_objects
from forgather.errors import ConfigError, TrainingError
from forgather.metrics.step_result import StepResult
from forgather.trainers.loss_scale import LossScale

OnNonFinite = Literal["stop", "skip"]


@dataclass(frozen=True)
class Evidence:
    """What is needed to name the rows of a step that went wrong: this rank's microbatches and their losses.

    `losses` may be fewer, where another rank has computed them.
    """

    step: int
    batches: Sequence[Batch]
    losses: Sequence[Tensor]

    def suspects(self) -> list[int]:
        """The samples of this rank whose loss is not finite, as far as losses tell them apart."""
        if len(self.losses) != len(self.batches):
            sound = all(bool(loss.isfinite()) for loss in self.losses)
            return [] if sound else [sample for batch in self.batches for sample in batch.samples]
        pairs = zip(self.batches, self.losses, strict=True)
        return [sample for batch, loss in pairs if not loss.isfinite() for sample in batch.samples]


class FiniteWatch:
    """Judges each step by its loss and gradient norm, and leaves out or stops at the one that is not finite.

    `skip` leaves out up to `max_skips` steps in a row; the next, and with `stop` the first, is a TrainingError on all
    ranks. A step left out is counted in `skipped` and told to `say`.

    On a CPU a look at the numbers costs nothing, so the verdict comes at once. On a device a look would wait for all
    work in flight. There the flag stays on the device: a fused optimizer reads it (`found_inf`) and leaves parameters
    and its own state alone; the host looks one step late, while the next is queued, and before that is applied. An
    optimizer that cannot read the flag is waited for.

    `is_fused` says that gradients are applied before this is asked; only the error tells the difference.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        device: torch.device,
        *,
        on_non_finite: OnNonFinite = "stop",
        max_skips: int = 3,
        scale: LossScale | None = None,
        say: Callable[[str], None] | None = None,
        is_fused: bool = False,
        deferred: bool | None = None,
    ) -> None:
        if on_non_finite not in ("stop", "skip"):
            raise ConfigError(f"on_non_finite is {on_non_finite!r}", fix="use stop or skip")
        self.max_skips = max_skips if on_non_finite == "skip" else 0
        self.scale = scale
        self.say = say
        self.is_fused = is_fused
        self.skipped = 0
        self.skipped_in_a_row = 0
        reads_flag = all(group.get("fused") for group in optimizer.param_groups)
        self.deferred = (device.type != "cpu" and reads_flag) if deferred is None else deferred
        self._pending: _Numbers | None = None
        self._was_sound = True
        self._last_norm = torch.zeros((), device=device)
        self._factor = torch.ones((), device=device) if scale is None else scale.factor
        self.flag = torch.zeros((), device=device) if self.deferred else None
        if self.flag is not None:
            optimizer.found_inf = self.flag  # type: ignore[attr-defined]  # the place where torch's GradScaler puts it

    @property
    def may_skip(self) -> bool:
        return self.max_skips > 0 or self.scale is not None

    def observe(self, evidence: Evidence, loss: Tensor, grad_norm: Tensor) -> bool:
        """Judge a step before its update; both numbers are 0-d and the same on all ranks.

        Returns whether to apply it; where the flag decides, that is to be asked of the optimizer, and it is true.
        """
        self.settle()
        numbers = torch.stack([loss.float(), grad_norm.float(), self._factor])
        self._pending = _Numbers(evidence, numbers)
        is_bad = numbers[:2].isfinite().all().logical_not()
        if self.scale is not None:
            self.scale.adapt(is_bad)
        if self.flag is not None:
            self.flag.copy_(is_bad)
            return True
        return self.settle()

    def count(self, result: StepResult) -> StepResult:
        """`result` as statistics may take it: of a step that is left out, nothing but its tokens counts."""
        if not self.may_skip:
            return result
        device = result.loss_sum.device
        is_bad = torch.tensor(not self._was_sound, device=device) if self.flag is None else self.flag.bool()
        zero = torch.zeros((), dtype=torch.int64, device=device)
        self._last_norm = torch.where(is_bad, self._last_norm, result.grad_norm)
        return replace(
            result,
            loss_sum=torch.where(is_bad, zero, result.loss_sum),
            num_targets=torch.where(is_bad, zero, result.num_targets),
            grad_norm=self._last_norm,
        )

    def settle(self) -> bool:
        """Wait for the verdict on the last step, before anything of it is shown or kept; whether it was sound."""
        self._was_sound = True
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self._was_sound = self._judge(pending.evidence, *pending.wait())
        return self._was_sound

    def _judge(self, evidence: Evidence, loss: float, grad_norm: float, factor: float) -> bool:
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.skipped_in_a_row = 0
            return True
        if math.isfinite(loss) and factor > 1:
            self._skip(f"step {evidence.step + 1}: gradients overflow at loss scale {factor:g}")
            return False
        found = f"step {evidence.step + 1}: loss {loss} and gradient norm {grad_norm} are not both finite"
        found = f"{found}; {_describe_rows(evidence)}"
        if self.skipped_in_a_row >= self.max_skips:
            raise TrainingError(f"{found}; {self._damage(loss)}{self._history()}", fix=_FIX)
        self.skipped_in_a_row += 1
        self._skip(found)
        return False

    def _skip(self, why: str) -> None:
        self.skipped += 1
        if self.say is not None:
            self.say(f"{why}; the step was left out ({self.skipped} so far)")

    def _damage(self, loss: float) -> str:
        if self.is_fused and math.isfinite(loss):
            return "gradients that are finite were applied, as the backward made them; no checkpoint has any of it"
        return "the step was not applied"

    def _history(self) -> str:
        return f", and {self.skipped_in_a_row} before it were left out in a row" if self.skipped_in_a_row else ""


_FIX = "lower the learning rate, lengthen the warm-up, or look at these samples; on_non_finite: skip leaves steps out"


class _Numbers:
    """Loss, gradient norm and loss scale of one step on their way to the host."""

    def __init__(self, evidence: Evidence, numbers: Tensor) -> None:
        self.evidence = evidence
        self.on_host = torch.empty(numbers.shape, pin_memory=numbers.is_cuda).copy_(numbers, non_blocking=True)
        self.copied = torch.cuda.Event() if numbers.is_cuda else None  # type: ignore[no-untyped-call]
        if self.copied is not None:
            self.copied.record()

    def wait(self) -> list[float]:
        if self.copied is not None:
            self.copied.synchronize()
        numbers: list[float] = self.on_host.tolist()
        return numbers


def _describe_rows(evidence: Evidence) -> str:
    """Which rows of all ranks are to blame. All ranks call it: they have come to the same verdict."""
    ranks = gather_objects((evidence.suspects(), [sample for batch in evidence.batches for sample in batch.samples]))
    suspects = sorted({sample for mine, _ in ranks for sample in mine})
    if suspects:
        return f"not finite is the loss of samples {_ranges(suspects)}"
    return (
        f"each loss is finite, a gradient of samples {_ranges(sorted({s for _, all_ in ranks for s in all_}))} is not"
    )


def _ranges(numbers: Sequence[int]) -> str:
    """Sorted numbers with runs drawn together: 3-7, 12."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{first}-{last}" if last > first else f"{first}" for first, last in runs)
