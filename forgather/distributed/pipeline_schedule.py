"""Training microbatches through the stages in the order of a schedule of torch.distributed.pipelining."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight

from forgather.distributed.fsdp import computed_parameters, copies_held, mark_microbatch, sum_replicas
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
        for stage in self.pipeline.stages:
            mark_microbatch(stage.model, is_last=False)  # the schedule says when the gradients of a stage are complete
        targets_MBL = torch.cat(list(targets))
        with ExitStack() as held:
            for stage in self.pipeline.stages:
                held.enter_context(copies_held(stage.model))
            self._schedule.step(
                torch.cat(list(input_ids)),
                position_ids=torch.cat(list(position_ids)),
                targets=targets_MBL,
                target=targets_MBL,  # the schedule wants some; the last stage has computed the loss already
                return_outputs=False,
            )

    def _make_stage(self, stage: Stage) -> "_ScheduledStage":
        tokens = torch.empty(self.shape, dtype=torch.int64, device="meta")
        hidden = self.pipeline.room_for_hidden(*self.shape, device="meta").requires_grad_()
        return _ScheduledStage(
            stage.model,
            stage.index,
            self.pipeline.plan.num_stages,
            self.pipeline.device,
            input_args=tokens if stage.part.is_first else hidden,
            output_args=torch.empty((), device="meta", requires_grad=True) if stage.part.is_last else hidden,
            group=self.pipeline.group,
        )


class _ScheduledStage(PipelineStage):
    """A stage whose replicas add up their gradients, and that may compute with copies of its parameters."""

    def perform_reduce_grad(self, grad_scale_factor: int) -> None:
        super().perform_reduce_grad(grad_scale_factor)  # FSDP's sums
        sum_replicas(self.submod)

    def backward_maybe_with_nosync(
        self, backward_type: str, bwd_kwargs: dict[str, Any], last_backward: bool = False
    ) -> tuple[tuple[Tensor | None, ...], list[dict[str, Any]] | None]:
        if backward_type == "full" or isinstance(self.submod, FSDPModule):
            return super().backward_maybe_with_nosync(backward_type, bwd_kwargs, last_backward)
        # torch would look for the graph of the module's own parameters, which are not those of lent copies.
        weights = computed_parameters(self.submod)
        if backward_type == "input":
            return stage_backward_input(
                bwd_kwargs["stage_output"], bwd_kwargs["output_grads"], bwd_kwargs["input_values"], iter(weights)
            )
        stage_backward_weight(iter(weights), bwd_kwargs["param_groups"])
        # These gradients have not come by autograd's accumulation, which calls the hooks: lent copies hand over in one.
        for weight in weights:
            if weight.grad is not None:
                for hook in (weight._post_accumulate_grad_hooks or {}).values():
                    hook(weight)
        return (), None


def _unchanged(loss: Tensor) -> Tensor:
    return loss
