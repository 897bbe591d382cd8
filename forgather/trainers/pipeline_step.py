"""The step of a pipelined run: the microbatches of one global batch through the stages, and the update.

`PipelineStep` has the signature of `trainers.step.LocalStep`. All ranks of a pipeline are given the same rows. Shapes:
B rows, L tokens.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from forgather.data.batch import Batch
from forgather.distributed.blocks import describe_blocks
from forgather.distributed.collectives import sum_ranks
from forgather.distributed.fsdp import describe_spread
from forgather.distributed.mesh import Mesh
from forgather.distributed.pipeline import Pipeline
from forgather.distributed.pipeline_schedule import ScheduledRun
from forgather.metrics.step_result import StepResult
from forgather.trainers.pipeline_loss import PipelineLoss
from forgather.trainers.step import count_targets, reseed, stream
from forgather.trainers.update import Update


class PipelineStep:
    """Runs microbatches through a pipeline's schedule and applies one optimizer step.

    Loss and gradients are those of `LocalStep` on the same rows. What the stages draw at random (dropout) is a function
    of `(seed, step, rank)`; it is not what one process would draw.
    """

    def __init__(self, pipeline: Pipeline, loss: PipelineLoss, update: Update, mesh: Mesh, *, seed: int = 0) -> None:
        self.pipeline = pipeline
        self.loss = loss
        self.update = update
        self.mesh = mesh
        self.seed = seed
        self.device = mesh.environment.device
        self._run: ScheduledRun | None = None

    def __call__(self, step: int, batches: Sequence[Batch]) -> StepResult:
        """Make step number `step` (from 0) with this rank's microbatches, all of one shape; all ranks call it."""
        # Neighbouring stages draw other numbers, or their dropout would have one pattern.
        place = self.mesh.data_rank + self.mesh.data_ranks * self.mesh.coordinate("pipeline")
        reseed(stream(self.seed, step, place), self.device)
        num_targets = count_targets(batches, self.mesh)
        losses: list[Tensor] = []

        def scale(loss_sum: Tensor) -> Tensor:
            loss = loss_sum / num_targets
            losses.append(loss.detach())
            return self.update.scaled(loss)

        on_device = [batch.to(self.device) for batch in batches]
        self._run_for(on_device[0])(
            [batch.input_ids for batch in on_device],
            [batch.position_ids for batch in on_device],
            [batch.targets for batch in on_device],
            scale,
        )
        self.pipeline.ties.sum_gradients()
        return self.update(step, batches, losses, num_targets)

    def rehearse(self, batches: Sequence[Batch]) -> float:
        """The loss of a global batch, in nats a token, without learning from it; all ranks call it."""
        total = self.loss.total(batches)
        if self.mesh.coordinate("tensor") > 0:
            total.zero_()  # another rank has the same
        return float(sum_ranks(total) / count_targets(batches, self.mesh))

    def describe(self) -> list[str]:
        """Lines for the person who starts the run: what the parts of the step became."""
        model: Any = self.pipeline.stages[0].model
        return [
            f"model: {type(self.pipeline.whole).__name__}, {describe_spread(model)}",
            *describe_blocks(model),
            f"pipeline: {self.pipeline.describe()}",
            f"loss: {self.loss.describe()}",
            *self.update.describe(),
        ]

    def settle(self) -> None:
        """Make sure that the last step was sound; called before its result is shown or kept."""
        self.update.settle()

    def _run_for(self, batch: Batch) -> ScheduledRun:
        """The schedule for batches of this shape, which all steps of a run have."""
        rows, length = batch.input_ids.shape
        if self._run is None or self._run.shape != (rows, length):
            self._run = ScheduledRun(self.pipeline, rows, length)
        return self._run
