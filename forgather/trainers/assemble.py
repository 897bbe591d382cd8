"""The one visible order in which a model becomes trainable."""

from typing import Literal, Protocol

import torch
from transformers import PreTrainedModel

from forgather.distributed.fsdp import FSDP_DEFAULTS, FsdpOptions, apply_fsdp
from forgather.distributed.mesh import Mesh
from forgather.distributed.mixed_precision import COMPUTE_DTYPE, Precision
from forgather.distributed.pipeline_plan import PipelinePlan
from forgather.distributed.tensor_parallel import apply_tensor_parallel
from forgather.errors import ConfigError
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
    parameter_dtype: Literal["fp32", "bf16"] = "fp32",
    seed: int = 0,
    sequence_parallel: bool = True,
    fsdp: FsdpOptions = FSDP_DEFAULTS,
) -> PreTrainedModel:
    """A model spread over `mesh`, initialised from `seed`, ready for an optimizer.

    No rank ever holds the whole model, and any mesh gives the same values: each parameter is drawn by its name. A mesh
    with a pipeline needs its plan. `sequence_parallel` is that of `apply_tensor_parallel`. Parameters in bf16 take half
    the memory; computing is then in bf16 too, and an optimizer should round them stochastically (`optim.rounding`).
    """
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[parameter_dtype]
    if parameter_dtype == "bf16" and precision != "bf16":
        raise ConfigError(
            f"parameters in bf16 cannot compute in {precision}", fix="set precision bf16, or parameter_dtype fp32"
        )

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
        return assemble_stages(
            source.construct, pipeline, make_trainable, parameter_dtype=dtype, compute_dtype=COMPUTE_DTYPE[precision]
        )
    model = source.construct(device="meta", dtype=dtype)  # shapes only, so a model of any size
    make_trainable(model)
    return model.train()
