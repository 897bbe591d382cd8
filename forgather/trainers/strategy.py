"""Which loss and which step a run has: those of a whole model, or of a pipeline where the mesh has one."""

from typing import Any

from transformers import PreTrainedModel

from forgather.distributed.mesh import Mesh
from forgather.distributed.pipeline import pipeline_of
from forgather.trainers.loss import CausalLoss
from forgather.trainers.pipeline_loss import PipelineLoss
from forgather.trainers.pipeline_step import PipelineStep
from forgather.trainers.step import LocalStep
from forgather.trainers.update import Update


def build_loss(model: PreTrainedModel, chunk_rows: int | None = 512) -> CausalLoss | PipelineLoss:
    """The loss of `model`: `PipelineLoss` for this rank's stages of one, else `CausalLoss`."""
    pipeline = pipeline_of(model)
    return CausalLoss(model, chunk_rows) if pipeline is None else PipelineLoss(model, pipeline, chunk_rows)


def build_step(model: PreTrainedModel, loss: Any, update: Update, mesh: Mesh, *, seed: int = 0) -> Any:
    """The step of a run over `model`: `PipelineStep` for this rank's stages of one, else `LocalStep`."""
    pipeline = pipeline_of(model)
    if pipeline is None:
        return LocalStep(model, loss, update, mesh, seed=seed)
    return PipelineStep(pipeline, loss, update, mesh, seed=seed)
