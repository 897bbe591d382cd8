"""A model cut into the stages of a pipeline: each is made on meta, cut, and then made trainable like any model."""

from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from forgather.distributed.pipeline import Pipeline, Stage, unite
from forgather.distributed.pipeline_anatomy import examine
from forgather.distributed.pipeline_chain import ChainForward
from forgather.distributed.pipeline_cut import choose_parts, cut
from forgather.distributed.pipeline_plan import PipelinePlan


class Construct(Protocol):
    def __call__(self, device: str = "meta", *, dtype: torch.dtype | None = None) -> PreTrainedModel: ...


class MakeTrainable(Protocol):
    """Spreads, materialises and initialises `model` in place; it may be a part of `whole`, which is on meta."""

    def __call__(self, model: PreTrainedModel, whole: PreTrainedModel | None = None) -> None: ...


def assemble_stages(
    construct: Construct,
    plan: PipelinePlan,
    make_trainable: MakeTrainable,
    *,
    parameter_dtype: torch.dtype = torch.float32,
    compute_dtype: torch.dtype | None = None,
) -> PreTrainedModel:
    """This rank's stages as one model, whose names are those of the whole; calling it runs the whole pipeline.

    Raises DistributedError for more stages than blocks, and ModelError for a model that cannot be cut.
    """

    def make() -> Any:
        return construct(device="meta", dtype=parameter_dtype)

    whole = make()
    anatomy = examine(whole, plan.length, compute_dtype)
    parts = choose_parts(anatomy, plan.num_stages, plan.cuts)
    stages = []
    for index in plan.local_stages:
        model = make()
        entrance, exit_ = cut(model, anatomy, [parts[index]])
        make_trainable(model, whole)
        stages.append(Stage(model.train(), parts[index], entrance, exit_))
    pipeline = Pipeline(plan, anatomy, parts, whole, stages)
    union = make()
    cut(union, anatomy, [parts[index] for index in plan.local_stages])
    unite(pipeline, union, ChainForward(pipeline))
    united: PreTrainedModel = union.train()
    return united
