"""The loss on data that is not trained on: the sum of loss over the sum of target tokens, whatever the batches."""

import math
from collections.abc import Iterable, Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from forgather.data.batch import Batch
from forgather.distributed.collectives import sum_ranks
from forgather.distributed.mesh import Mesh
from forgather.errors import DataError
from forgather.generation.sample import evaluating


class Loss(Protocol):
    """What evaluation needs of a loss: `trainers.loss.CausalLoss` is one, `PipelineLoss` the other."""

    @property
    def model(self) -> nn.Module: ...

    def total(self, batches: Iterable[Batch]) -> Tensor:
        """The sum of loss over the targets of all batches, fp64; 0 on the stages of a pipeline without the head."""


class Evaluation:
    """`evaluation()` is the mean loss over all of `data`, the same on every rank; it changes nothing of the run.

    All ranks call it, and each has the same number of batches: a sharded forward needs all of them. One reduction.
    """

    def __init__(self, loss: Loss, data: Iterable[Batch], mesh: Mesh) -> None:
        self.loss = loss
        self.data = data
        self.mesh = mesh

    def __call__(self) -> dict[str, float]:
        """The metrics `loss` (nats a token), `perplexity` and `targets`; DataError when there is no target at all."""
        counted = 0

        def count(batches: Iterable[Batch]) -> Iterator[Batch]:
            nonlocal counted
            for batch in batches:
                counted += batch.num_targets
                yield batch

        with torch.no_grad(), evaluating(self.loss.model):
            loss = self.loss.total(count(self.data))
        loss_sum, num_targets = self._over_all_rows(loss, counted).tolist()
        if num_targets == 0:
            raise DataError("the validation data has no target token", fix="use longer documents or more of them")
        mean = loss_sum / num_targets
        perplexity = math.exp(mean) if mean < 700 else math.inf  # beyond that a double cannot hold it
        return {"loss": mean, "perplexity": perplexity, "targets": num_targets}

    def _over_all_rows(self, loss: Tensor, num_targets: int) -> Tensor:
        """Both sums over the ranks. Of those that have read the same rows one adds what it knows."""
        totals = torch.stack([loss, loss.new_tensor(num_targets)])
        if self.mesh.coordinate("tensor") > 0:
            totals.zero_()
        if self.mesh.coordinate("pipeline") > 0:
            totals[1] = 0  # the loss is where the last stage is, and 0 elsewhere
        return sum_ranks(totals)
