"""The one visible order in which a model becomes trainable."""

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, Protocol

import torch
from transformers import PreTrainedModel

from forgather.distributed.compilation import apply_compile
from forgather.distributed.fsdp import FSDP_DEFAULTS, FsdpOptions, apply_fsdp
from forgather.distributed.mesh import Mesh
from forgather.distributed.mixed_precision import COMPUTE_DTYPE, Precision
from forgather.distributed.offload import apply_offload, require_device
from forgather.distributed.pipeline_plan import PipelinePlan
from forgather.distributed.recompute import SELECTIVE, apply_recompute
from forgather.distributed.tensor_parallel import apply_tensor_parallel
from forgather.errors import ConfigError, DistributedError
from forgather.models.initialize import InitRules, initialize
from forgather.trainers.pipeline_assemble import assemble_stages


class ModelSource(Protocol):
    """Where a model comes from: `forgather.models.package.Package`, or anything with these two."""

    @property
    def init_rules(self) -> InitRules: ...

    def construct(
        self, device: str = "meta", *, dtype: torch.dtype | None = None, attn_implementation: str | None = None
    ) -> PreTrainedModel: ...


def assemble(
    source: ModelSource,
    mesh: Mesh,
    *,
    pipeline: PipelinePlan | None = None,
    precision: Precision = "fp32",
    parameter_dtype: Literal["fp32", "bf16"] = "fp32",
    attention: str | None = None,
    recompute: str | int = "none",
    compile: bool | Mapping[str, Any] = False,
    offload_activations: bool = False,
    seed: int = 0,
    sequence_parallel: bool = True,
    fsdp: FsdpOptions = FSDP_DEFAULTS,
) -> PreTrainedModel:
    """A model spread over `mesh`, initialised from `seed`, ready for an optimizer.

    No rank ever holds the whole model, and any mesh gives the same values: each parameter is drawn by its name. A mesh
    with a pipeline needs its plan. `sequence_parallel` is that of `apply_tensor_parallel`. Parameters in bf16 take half
    the memory; computing is then in bf16 too, and an optimizer should round them stochastically (`optim.rounding`).

    `attention` is transformers' name of an implementation, null the model's own choice. `recompute`, `compile` and
    `offload_activations` are those of `apply_recompute`, `apply_compile` and `apply_offload`.
    """
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[parameter_dtype]
    if parameter_dtype == "bf16" and precision != "bf16":
        raise ConfigError(
            f"parameters in bf16 cannot compute in {precision}", fix="set precision bf16, or parameter_dtype fp32"
        )

    if offload_activations:
        require_device(mesh.environment.device)
    if attention == "flex_attention" and mesh.environment.device.type == "cpu":
        raise ConfigError("attention is flex_attention, which has no backward on the CPU", fix="use sdpa or eager")
    options: dict[str, Any] = {} if attention is None else {"attn_implementation": attention}
    construct = partial(source.construct, **options)

    def make_trainable(model: PreTrainedModel, whole: PreTrainedModel | None = None) -> None:
        # All of this while there is nothing to move. Matrices are split before rows are, so that FSDP cuts what a rank
        # has of them.
        apply_tensor_parallel(model, mesh, sequence_parallel=sequence_parallel)
        # Each inside the next: what is recomputed is compiled too, what is left to keep is offloaded, and the gathering
        # of FSDP is outside of all, so that it happens once and is not compiled.
        apply_recompute(model, recompute)
        apply_compile(model, compile)
        if offload_activations:
            apply_offload(model, mesh.environment.device)
        apply_fsdp(model, mesh, precision, fsdp)
        model.to_empty(device=mesh.environment.device)  # memory for this rank's shards only
        # draws shards, re-makes ties, recomputes buffers outside the state dict
        initialize(model, source.init_rules, seed, whole=whole)

    if mesh.pipeline > 1:
        assert pipeline is not None, "a mesh with a pipeline needs its plan"
        if pipeline.schedule.splits_backward:
            frees = mesh.shard > 1 and fsdp.reshard_after_forward is True
            _refuse_unfit(pipeline.schedule.name, recompute, frees=frees, compiles=bool(compile))
        return assemble_stages(
            construct, pipeline, make_trainable, parameter_dtype=dtype, compute_dtype=COMPUTE_DTYPE[precision]
        )
    model = construct(device="meta", dtype=dtype)  # shapes only, so a model of any size
    make_trainable(model)
    return model.train()


def _refuse_unfit(schedule: str, recompute: str | int, *, frees: bool, compiles: bool) -> None:
    """Refuse what cannot be where the backward of a block is made in two parts."""
    other = "or a schedule without zero bubble"
    if frees:
        raise DistributedError(
            f"schedule {schedule} makes gradients of weights when their blocks would have been freed",
            fix=f"use model.fsdp.reshard_after_forward auto or false, {other}",
        )
    if compiles:
        raise DistributedError(
            f"schedule {schedule} makes two backwards over a block, and a compiled block has one that does all",
            fix=f"use compile false, {other}",
        )
    if recompute == SELECTIVE:
        raise DistributedError(
            f"schedule {schedule} makes two backwards over a block, and what is selectively kept is there for one",
            fix=f"use recompute full, which computes it again for each, {other}",
        )
