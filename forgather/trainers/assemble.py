"""The one visible order in which a model becomes trainable."""

from typing import Protocol

import torch
from transformers import PreTrainedModel

from forgather.distributed.fsdp import apply_fsdp
from forgather.distributed.mesh import Mesh
from forgather.distributed.mixed_precision import Precision
from forgather.models.initialize import InitRules, initialize


class ModelSource(Protocol):
    """Where a model comes from: `forgather.models.package.Package`, or anything with these two."""

    @property
    def init_rules(self) -> InitRules: ...

    def construct(self, device: str = "meta", *, dtype: torch.dtype | None = None) -> PreTrainedModel: ...


def assemble(
    source: ModelSource,
    mesh: Mesh,
    *,
    precision: Precision = "fp32",
    seed: int = 0,
    reshard_after_forward: bool = True,
) -> PreTrainedModel:
    """A model spread over `mesh`, initialised from `seed`, ready for an optimizer; its parameters are fp32.

    No rank ever holds the whole model, and any mesh gives the same values: each parameter is drawn by its name.
    """
    model = source.construct(device="meta", dtype=torch.float32)  # shapes only, so a model of any size
    apply_fsdp(
        model, mesh, precision, reshard_after_forward=reshard_after_forward
    )  # cut while there is nothing to move
    model.to_empty(device=mesh.environment.device)  # memory for this rank's shards only
    initialize(model, source.init_rules, seed)  # draws shards, re-makes ties, recomputes buffers outside the state dict
    return model.train()
