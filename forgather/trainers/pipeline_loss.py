"""The loss of a model that is cut into stages: the last one computes it, in training and in evaluation."""

from collections.abc import Iterable, Iterator
from itertools import islice

import torch
from torch import Tensor
from transformers import PreTrainedModel

from forgather.data.batch import Batch
from forgather.distributed.pipeline import Pipeline
from forgather.distributed.pipeline_chain import Rows, run_chain
from forgather.trainers.loss import CausalLoss


class PipelineLoss:
    """The sum of cross-entropy over target tokens, on the rank of each pipeline that has the last stage.

    `model` is the rank's union of stages. Which way the loss is computed is decided on the whole model, alike on all
    ranks.
    """

    def __init__(self, model: PreTrainedModel, pipeline: Pipeline, chunk_rows: int | None = 512) -> None:
        self.model = model
        self.pipeline = pipeline
        last = pipeline.last_stage
        self._causal = CausalLoss(pipeline.whole if last is None else last.model, chunk_rows, inspected=pipeline.whole)
        if last is not None:
            last.loss_of = self._causal.of

    def describe(self) -> str:
        return self._causal.describe()

    def total(self, batches: Iterable[Batch]) -> Tensor:
        """The sum over several batches where the last stage is, and 0 on the other ranks.

        All ranks call it with equally many. For what is not trained on: it goes forward only.
        """
        total = torch.zeros((), dtype=torch.float64, device=self.pipeline.device)
        # Enough at once to keep every stage busy, and no more than must be held.
        for together in _groups(batches, 2 * self.pipeline.plan.num_ranks):
            for loss in run_chain(self.pipeline, [self._rows(batch) for batch in together]):
                total += loss
        return total

    def _rows(self, batch: Batch) -> Rows:
        batch = batch.to(self.pipeline.device)
        return Rows(batch.input_ids, batch.position_ids, batch.targets)


def _groups(batches: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    remaining = iter(batches)
    while together := list(islice(remaining, size)):
        yield together
