"""The stages of a pipeline that this rank has, and the one model as which the rest of a run sees them.

A `Stage` is a whole model of which most is absent (`pipeline_cut`), run by its own forward. The union of a rank's
stages has their modules under the names of the whole model: optimizer, checkpoints and parameter groups need not know
that there is a pipeline. Calling the union runs the whole pipeline, on all its ranks.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from forgather.distributed.pipeline_anatomy import Anatomy
from forgather.distributed.pipeline_cut import Absent, Entrance, Exit, Part
from forgather.distributed.pipeline_plan import PipelinePlan
from forgather.distributed.pipeline_ties import Ties

_PIPELINE = "_forgather_pipeline"  # the attribute of a union that holds its Pipeline

LossOf = Callable[[Tensor, Callable[[], Tensor]], Tensor]


class Stage:
    """One stage: `stage.model(inputs, position_ids=..., targets=...)` is what the next is to be given.

    `inputs` are token ids [B, L] for the first stage and hidden states [B, L, D] for the others. The last stage gives
    the loss by `loss_of` where there are targets, and else the logits.
    """

    def __init__(self, model: Any, part: Part, entrance: Entrance | None, exit_: Exit | None) -> None:
        self.model = model
        self.part = part
        self.loss_of: LossOf | None = None
        self._entrance = entrance
        self._exit = exit_
        self._own_forward = model.forward
        # On the instance, so that hooks (FSDP's, those of lent copies) see the stage's inputs and outputs.
        model.__dict__["forward"] = self.forward

    @property
    def index(self) -> int:
        return self.part.stage

    def forward(
        self,
        inputs: Tensor,
        position_ids: Tensor | None = None,
        targets: Tensor | None = None,
        logits_to_keep: int = 0,
    ) -> Tensor:
        if not self.part.is_last:
            return self._run_to_exit(inputs, position_ids)
        if targets is None:
            return self._logits(inputs, position_ids, logits_to_keep)
        assert self.loss_of is not None, "the last stage has been given no loss"
        return self.loss_of(targets, lambda: self._logits(inputs, position_ids, 0))

    def _run_to_exit(self, inputs: Tensor, position_ids: Tensor | None) -> Tensor:
        assert self._exit is not None
        self._logits(inputs, position_ids, 0)
        hidden, self._exit.kept = self._exit.kept, None
        assert hidden is not None, "the forward of a stage has passed its exit by"
        return hidden.contiguous()

    def _logits(self, inputs: Tensor, position_ids: Tensor | None, logits_to_keep: int) -> Tensor:
        kwargs = {"position_ids": position_ids, "use_cache": False, "logits_to_keep": logits_to_keep}
        if self.part.is_first:
            logits: Tensor = self._own_forward(input_ids=inputs, **kwargs).logits
            return logits
        assert self._entrance is not None
        self._entrance.received = inputs
        try:
            # What happens to the embeddings before the blocks is of no account, so it has no gradient.
            logits = self._own_forward(inputs_embeds=inputs.detach(), **kwargs).logits
        finally:
            self._entrance.received = None
        return logits


class Pipeline:
    """What a rank has of a pipeline: its `stages`, and `whole`, the uncut model on meta."""

    def __init__(
        self, plan: PipelinePlan, anatomy: Anatomy, parts: Sequence[Part], whole: Any, stages: Sequence[Stage]
    ) -> None:
        self.plan = plan
        self.anatomy = anatomy
        self.parts = list(parts)
        self.whole = whole
        self.stages = list(stages)
        self.group = plan.mesh.pipeline_mesh.get_group() if plan.mesh.pipeline_mesh is not None else None
        self.backward_group = _second_group(plan, self.group)
        self.rank = plan.mesh.coordinate("pipeline")
        self.device = plan.mesh.environment.device
        first = next((stage for stage in self.stages if stage.part.is_first), None)
        last = self.last_stage
        self.ties = Ties(
            whole,
            anatomy,
            first=None if first is None else first.model,
            last=None if last is None else last.model,
            first_rank=plan.rank_of(0),
            last_rank=plan.last_rank,
            group=self.group,
        )

    @property
    def last_stage(self) -> Stage | None:
        """The stage with the head, where this rank has it."""
        return next((stage for stage in self.stages if stage.part.is_last), None)

    def room_for_hidden(self, rows: int, length: int, device: torch.device | str | None = None) -> Tensor:
        """An empty tensor for the hidden states that pass between two stages."""
        like = self.anatomy.hidden
        return torch.empty((rows, length, *like.shape[2:]), dtype=like.dtype, device=device or self.device)

    def describe(self) -> str:
        plan = self.plan
        stages = " | ".join(part.describe() for part in self.parts)
        return (
            f"{plan.schedule.name}, {plan.num_stages} stages over {plan.num_ranks} ranks ({stages}), "
            f"{plan.microbatches} microbatches of {plan.rows_per_microbatch} rows"
        )


def _second_group(plan: PipelinePlan, group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """The group for what goes from the last rank to the first; another than `group` where both send to each other.

    That is so in a loop over two ranks. NCCL takes the sends and receives between two ranks of a group one after the
    other, and there the two would come to wait for each other's next.
    """
    if group is None or plan.num_ranks != 2 or plan.stages_per_rank == 1 or plan.schedule.is_v:
        return group
    ranks = dist.get_process_group_ranks(group)
    second: dist.ProcessGroup = dist.new_group(ranks, use_local_synchronization=True)
    return second


def unite(pipeline: Pipeline, union: Any, forward: Callable[..., Any]) -> None:
    """Make `union`, cut to hold all stages of this rank, hold their very modules; calling it calls `forward`."""
    for name, module in _leaves(union):
        if isinstance(module, Absent):
            continue
        holder = next(
            (stage for stage in pipeline.stages if not isinstance(stage.model.get_submodule(name), Absent)), None
        )
        assert holder is not None, f"no stage of this rank has {name}"
        union.set_submodule(name, holder.model.get_submodule(name))
    _show_first_holders(union, pipeline.ties)
    union.__dict__["forward"] = forward
    union.__dict__[_PIPELINE] = pipeline
    shared = {id(module) for module in union.modules()}
    for stage in pipeline.stages:
        # Modules around the shared ones, which `union.train()` and `eval()` do not reach.
        shells = [m for m in stage.model.modules() if id(m) not in shared and not isinstance(m, Absent)]
        stage.model.register_forward_pre_hook(_follow_mode(union, shells))


def _show_first_holders(union: nn.Module, ties: Ties) -> None:
    """Where this rank has both holders of a tied parameter, let `union` have the first in both places."""
    for tie in ties.ties:
        if tie.first is None or tie.last is None:
            continue
        for name, module in list(union.named_modules()):
            if any(parameter is tie.last for parameter in module._parameters.values()):
                # Another module in the union alone: that of the last stage computes with the parameter that it has.
                shown = copy.copy(module)
                shown.__dict__["_parameters"] = {
                    key: tie.first if parameter is tie.last else parameter
                    for key, parameter in module._parameters.items()
                }
                union.set_submodule(name, shown)


def pipeline_of(model: nn.Module) -> Pipeline | None:
    """The pipeline that `model` is this rank's part of, or None for a model that is whole."""
    return model.__dict__.get(_PIPELINE)


def whole_of(model: Any) -> Any:
    """The model that `model` is this rank's part of, on meta; a model that is no part is itself."""
    pipeline = pipeline_of(model)
    return model if pipeline is None else pipeline.whole


def _leaves(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The blocks, as a whole, and other modules without children, by name."""
    blocks = set(getattr(model, "_no_split_modules", None) or ())

    def below(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
        for name, child in module.named_children():
            if isinstance(child, Absent) or type(child).__name__ in blocks or not any(child.children()):
                yield f"{prefix}{name}", child
            else:
                yield from below(child, f"{prefix}{name}.")

    return below(model, "")


def _follow_mode(union: nn.Module, shells: Sequence[nn.Module]) -> Callable[..., None]:
    def follow(_model: nn.Module, _args: Any) -> None:
        for shell in shells:
            shell.training = union.training

    return follow
