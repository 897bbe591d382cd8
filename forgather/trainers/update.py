"""The end of every step, however its gradients came about: clip, check, apply.

`LocalStep` and the pipelined step both end in it, so what a step of a given norm does is said once.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from forgather.data.batch import Batch
from forgather.distributed.mesh import Mesh
from forgather.distributed.mixed_precision import Precision
from forgather.metrics.step_result import StepResult
from forgather.optim.clip import GradientClip
from forgather.optim.groups import describe_groups
from forgather.optim.schedules import Schedule
from forgather.trainers.finite import Evidence, FiniteWatch, OnNonFinite
from forgather.trainers.fused_backward import FusedBackward, refuse_unfit
from forgather.trainers.loss_scale import LossScale
from forgather.trainers.reports import Reports


class Update:
    """`update(step, batches, losses, num_targets)` applies the gradients that the parameters of `optimizer` hold.

    They are clipped to `max_grad_norm` (null: measured only) and applied with the learning rate of `schedule`; the
    gradients are then gone. A step whose loss or norm is not finite changes nothing: it is left out, or stops all ranks
    with a TrainingError (see `FiniteWatch`). What is left out does not advance the schedule.

    With `precision` fp16 losses are scaled, by `loss_scale` at first, so that small gradients do not vanish. With
    `fuse_optimizer_with_backward` a gradient is applied and freed as soon as the backward has made it; ConfigError
    where that cannot be, as with clipping or several of `num_microbatches`.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        schedule: Callable[[int], float],
        mesh: Mesh,
        *,
        max_grad_norm: float | None = 1.0,
        precision: Precision = "fp32",
        loss_scale: float = 65536.0,
        on_non_finite: OnNonFinite = "stop",
        max_skips: int = 3,
        fuse_optimizer_with_backward: bool = False,
        num_microbatches: int = 1,
        reports: Reports | None = None,
    ) -> None:
        self.optimizer = optimizer
        self.schedule = schedule
        self.schedule_state: Any = schedule if hasattr(schedule, "state_dict") else None  # a function has none
        self.mesh = mesh
        self.device = mesh.environment.device
        # Taken now, before a checkpoint is loaded: on a resume the config's learning rate wins.
        self.peak_lrs = [float(group["lr"]) for group in optimizer.param_groups]
        self.lr = float(optimizer.defaults["lr"])
        schedule(0)  # one that has no room for its parts says so here, not when the run has begun
        self.parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.clip = GradientClip(self.parameters, max_grad_norm, mesh)
        self.scale = LossScale(self.device, loss_scale) if precision == "fp16" else None
        self.watch = FiniteWatch(
            optimizer,
            self.device,
            on_non_finite=on_non_finite,
            max_skips=max_skips,
            scale=self.scale,
            say=None if reports is None else reports.note,
            is_fused=fuse_optimizer_with_backward,
        )
        self.fused: FusedBackward | None = None
        if fuse_optimizer_with_backward:
            refuse_unfit(
                mesh,
                precision=precision,
                max_grad_norm=max_grad_norm,
                num_microbatches=num_microbatches,
                on_non_finite=on_non_finite,
            )
            self.fused = FusedBackward(optimizer, mesh, flag=self.watch.flag)

    def scaled(self, loss: Tensor) -> Tensor:
        """What to call `backward` of in place of `loss`."""
        return loss if self.scale is None else self.scale.scaled(loss)

    def backward(self, step: int, loss: Tensor) -> None:
        """Add the gradients of one microbatch of a step to those that the parameters hold; fused, apply them."""
        if self.fused is not None:
            self._set_rates(step)
            if not self.fused.begin(loss):
                return
        self.scaled(loss).backward()  # type: ignore[no-untyped-call]

    def __call__(
        self, step: int, batches: Sequence[Batch], losses: Sequence[Tensor], num_targets: Tensor
    ) -> StepResult:
        """End step number `step` (from 0); all ranks call it, and the result's norm is the same on each.

        `batches` are the microbatches whose rows this rank was given, `losses` those of them that it has computed: 0-d,
        detached, divided by `num_targets`. Ranks that see the same rows as others give what they have; it counts once.
        """
        loss_sum = self._add_up(losses)
        if self.scale is not None:
            self.scale.unscale(parameter.grad for parameter in self.parameters if parameter.grad is not None)
        grad_norm, loss = (self.fused or self.clip).norm(riding=loss_sum)
        is_sound = self.watch.observe(Evidence(step, batches, losses), loss, grad_norm)
        factor = self._set_rates(step)  # now that it is known whether the step before was left out
        if is_sound and self.fused is None:
            self.clip.scale(grad_norm)
            self.optimizer.step()
        self.optimizer.zero_grad()
        result = StepResult(loss_sum, num_targets, grad_norm, self.lr * factor, self._count_tokens(batches))
        return self.watch.count(result)

    def settle(self) -> None:
        """Make sure that the last step was sound; called before its result is shown or kept."""
        self.watch.settle()

    @property
    def last_step(self) -> int | None:
        """The number of steps after which a decay that a command has begun ends the run, steps left out included."""
        end: int | None = getattr(self.schedule, "end", None)
        return None if end is None else end + self.watch.skipped

    def begin_decay(self) -> str | None:
        """Let the schedule begin its decay with the next step; what is to be said of it."""
        obey: Callable[[str], str | None] | None = getattr(self.schedule, "on_command", None)
        return None if obey is None else obey("decay")

    def metrics(self) -> dict[str, float]:
        """What there is to tell at a log step: steps left out so far, and the loss scale, where these can be."""
        metrics: dict[str, float] = {}
        if self.watch.may_skip:
            metrics["skipped_steps"] = self.watch.skipped
        if self.scale is not None:
            metrics["loss_scale"] = self.scale.factor.item()
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """What decides how the next step is applied, beside optimizer and step number."""
        state: dict[str, Any] = {"skipped": self.watch.skipped, "skipped_in_a_row": self.watch.skipped_in_a_row}
        if self.scale is not None:
            state["loss_scale"] = self.scale.state_dict()
        if self.schedule_state is not None:
            state["schedule"] = self.schedule_state.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.watch.skipped = int(state["skipped"])
        self.watch.skipped_in_a_row = int(state["skipped_in_a_row"])
        if self.scale is not None and "loss_scale" in state:  # a run may have begun in another precision
            self.scale.load_state_dict(state["loss_scale"])
        if self.schedule_state is not None and "schedule" in state:
            self.schedule_state.load_state_dict(state["schedule"])

    def describe(self) -> list[str]:
        """Lines for the person who starts the run: optimizer and groups."""
        limit = "not clipped" if self.clip.max_norm is None else f"clipped to norm {self.clip.max_norm:g}"
        fused = "" if self.fused is None else ", fused with the backward"
        return [
            f"optimizer: {type(self.optimizer).__name__}{fused}, peak lr {self.lr:g}, gradients {limit}",
            f"groups: {describe_groups(self.optimizer)}",
            *([f"schedule: {self.schedule.describe()}"] if isinstance(self.schedule, Schedule) else []),
        ]

    def _set_rates(self, step: int) -> float:
        """Give the optimizer's groups their learning rates; the factor by which they differ from the peak."""
        factor = self.schedule(step - self.watch.skipped)
        for group, peak in zip(self.optimizer.param_groups, self.peak_lrs, strict=True):
            group["lr"] = peak * factor
        return factor

    def _add_up(self, losses: Sequence[Tensor]) -> Tensor:
        total = torch.zeros((), device=self.device)
        if self.mesh.coordinate("tensor") == 0:  # its other ranks have computed the same losses
            for loss in losses:
                total += loss
        return total

    def _count_tokens(self, batches: Sequence[Batch]) -> int:
        if self.mesh.coordinate("tensor") > 0 or self.mesh.coordinate("pipeline") > 0:  # these read the same rows
            return 0
        return sum(batch.input_ids.numel() for batch in batches)
