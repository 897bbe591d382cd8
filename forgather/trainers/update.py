"""The end of every step, however its gradients came about: clip, check, apply.

`LocalStep` and the pipelined step both end in it, so what a step of a given norm does is said once.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from forgather.data.batch import Batch
from forgather.distributed.mesh import Mesh
from forgather.metrics.step_result import StepResult
from forgather.optim.clip import GradientClip
from forgather.optim.groups import describe_groups
from forgather.optim.schedules import Schedule
from forgather.trainers.finite import FiniteWatch


class Update:
    """`update(step, batches, losses, num_targets)` applies the gradients that the parameters of `optimizer` hold.

    They are clipped to `max_grad_norm` (null: measured only) and applied with the learning rate of `schedule`; the
    gradients are then gone. TrainingError, on all ranks, when loss or norm is not finite: nothing was changed then.
    """

    def __init__(
        self, optimizer: Optimizer, schedule: Schedule, mesh: Mesh, *, max_grad_norm: float | None = 1.0
    ) -> None:
        self.optimizer = optimizer
        self.schedule = schedule
        self.mesh = mesh
        self.device = mesh.environment.device
        # Taken now, before a checkpoint is loaded: on a resume the config's learning rate wins.
        self.peak_lrs = [float(group["lr"]) for group in optimizer.param_groups]
        self.lr = float(optimizer.defaults["lr"])
        schedule(0)  # one that has no room for its parts says so here, not when the run has begun
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.clip = GradientClip(parameters, max_grad_norm)
        self.watch = FiniteWatch(optimizer, self.device)

    def __call__(
        self, step: int, batches: Sequence[Batch], losses: Sequence[Tensor], num_targets: Tensor
    ) -> StepResult:
        """End step number `step` (from 0); all ranks call it, and the result's norm is the same on each.

        `batches` are the microbatches whose rows this rank was given, `losses` those of them that it has computed: 0-d,
        detached, divided by `num_targets`. Ranks that see the same rows as others give what they have; it counts once.
        """
        factor = self.schedule(step)
        loss_sum = self._add_up(losses)
        grad_norm, loss = self.clip.norm(riding=loss_sum)
        self.watch.observe(step, loss, grad_norm)
        self.clip.scale(grad_norm)
        for group, peak in zip(self.optimizer.param_groups, self.peak_lrs, strict=True):
            group["lr"] = peak * factor
        self.optimizer.step()
        self.optimizer.zero_grad()
        return StepResult(loss_sum, num_targets, grad_norm, self.lr * factor, self._count_tokens(batches))

    def settle(self) -> None:
        """Make sure that the last step was sound; called before its result is shown or kept."""
        self.watch.settle()

    def describe(self) -> list[str]:
        """Lines for the person who starts the run: optimizer and groups."""
        limit = "not clipped" if self.clip.max_norm is None else f"clipped to norm {self.clip.max_norm:g}"
        return [
            f"optimizer: {type(self.optimizer).__name__}, peak lr {self.lr:g}, gradients {limit}",
            f"groups: {describe_groups(self.optimizer)}",
        ]

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
