"""The one visible order in which a model becomes trainable."""

from typing import Protocol

import torch
from transformers import PreTrainedModel

from forgather.distributed.fsdp import FSDP_DEFAULTS, FsdpOptions, apply_fsdp
from forgather.distributed.mesh import Mesh
from forgather.distributed.mixed_precision import COMPUTE_DTYPE, Precision
from forgather.distributed.pipeline_plan import PipelinePlan
from forgather.distributed.tensor_parallel import apply_tensor_parallel
from forgather.models.initialize import InitRules, initialize
from forgather.trainers.pipeline_assemble import assemble_stages


class ModelSource(Protocol):
    """Where a model comes from: `forgather.models.package.Package`, or anything with these two."""

    @property
    def init_rules(self) -> InitRules: ...

    def construct(self, device: str = "meta", *, dtype: torch.dtype | None = None) -> PreTrainedModel: ...


def assemble(
    source: ModelSource,
    mesh: Mesh,
    *,
    pipeline: PipelinePlan | None = None,
    precision: Precision = "fp32",
    seed: int = 0,
    sequence_parallel: bool = True,
    fsdp: FsdpOptions = FSDP_DEFAULTS,
) -> PreTrainedModel:
    """A model spread over `mesh`, initialised from `seed`, ready for an optimizer; its parameters are fp32.

    No rank ever holds the whole model, and any mesh gives the same values: each parameter is drawn by its name. A mesh
    with a pipeline needs its plan. `sequence_parallel` is that of `apply_tensor_parallel`.
    """

    def make_trainable(model: PreTrainedModel, whole: PreTrainedModel | None = None) -> None:
        # All of this while there is nothing to move. Matrices are split before rows are, so that FSDP cuts what a rank
        # has of them.
        apply_tensor_parallel(model, mesh, sequence_parallel=sequence_parallel)
        apply_fsdp(model, mesh, precision, fsdp)
        model.to_empty(device=mesh.environment.device)  # memory for this rank's shards only
        # draws shards, re-makes ties, recomputes buffers outside the state dict
        initialize(model, source.init_rules, seed, whole=whole)

    if mesh.pipeline > 1:
        assert pipeline is not None, "a mesh with a pipeline needs its plan"
        return assemble_stages(source.construct, pipeline, make_trainable, compute_dtype=COMPUTE_DTYPE[precision])
    model = source.construct(device="meta", dtype=torch.float32)  # shapes only, so a model of any size
    make_trainable(model)
    return model.train()
