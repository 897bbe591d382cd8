"""Training microbatches through the stages in the order of a schedule of torch.distributed.pipelining."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.distributed.pipelining import PipelineStage

from forgather.distributed.pipeline import Pipeline, Stage


class ScheduledRun:
    """Forward and backward of microbatches of B rows of L tokens each, over all ranks of the pipeline.

    What passes between stages is known before the first microbatch, so none is run for its shapes.
    """

    def __init__(self, pipeline: Pipeline, rows: int, length: int) -> None:
        self.pipeline = pipeline
        self.shape = (rows, length)
        self._scale: Callable[[Tensor], Tensor] = _unchanged
        stages = [self._make_stage(stage) for stage in pipeline.stages]
        schedule = pipeline.plan.schedule
        self._schedule = schedule.make(
            stages[0] if schedule.takes_one_stage else stages,
            n_microbatches=pipeline.plan.microbatches,
            loss_fn=lambda loss, _: self._scale(loss),
            scale_grads=False,
        )

    def __call__(
        self,
        input_ids: Sequence[Tensor],
        position_ids: Sequence[Tensor],
        targets: Sequence[Tensor],
        scale: Callable[[Tensor], Tensor],
    ) -> None:
        """Add up the gradients of all microbatches, [B, L] each.

        On the rank that has the last stage, `scale` is called with each loss and gives what backward begins from.
        """
        self._scale = scale
        self.pipeline.ties.copy_values()
        targets_MBL = torch.cat(list(targets))
        self._schedule.step(
            torch.cat(list(input_ids)),
            position_ids=torch.cat(list(position_ids)),
            targets=targets_MBL,
            target=targets_MBL,  # the schedule wants some; the last stage has computed the loss already
            return_outputs=False,
        )

    def _make_stage(self, stage: Stage) -> PipelineStage:
        tokens = torch.empty(self.shape, dtype=torch.int64, device="meta")
        hidden = self.pipeline.room_for_hidden(*self.shape, device="meta").requires_grad_()
        return PipelineStage(
            stage.model,
            stage.index,
            self.pipeline.plan.num_stages,
            self.pipeline.device,
            input_args=tokens if stage.part.is_first else hidden,
            output_args=torch.empty((), device="meta", requires_grad=True) if stage.part.is_last else hidden,
            group=self.pipeline.group,
        )


def _unchanged(loss: Tensor) -> Tensor:
    return loss
