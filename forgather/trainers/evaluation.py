"""The loss on data that is not trained on: the sum of loss over the sum of target tokens, whatever the batches."""

import math
from collections.abc import Iterable

import torch

from forgather.data.batch import Batch
from forgather.distributed.collectives import sum_ranks
from forgather.distributed.fsdp import reshard
from forgather.distributed.mesh import Mesh
from forgather.errors import DataError
from forgather.generation.sample import evaluating
from forgather.trainers.loss import CausalLoss


class Evaluation:
    """`evaluation()` is the mean loss over all of `data`, the same on every rank; it changes nothing of the run.

    All ranks call it, and each has the same number of batches: a sharded forward needs all of them. One reduction.
    """

    def __init__(self, loss: CausalLoss, data: Iterable[Batch], mesh: Mesh) -> None:
        self.loss = loss
        self.data = data
        self.mesh = mesh

    def __call__(self) -> dict[str, float]:
        """The metrics `loss` (nats a token), `perplexity` and `targets`; DataError when there is no target at all."""
        model = self.loss.model
        device = self.mesh.environment.device
        totals = torch.zeros(2, dtype=torch.float64, device=device)  # loss, target tokens
        with torch.no_grad(), evaluating(model):
            for batch in self.data:
                totals[0] += self.loss(batch.to(device))
                totals[1] += batch.num_targets
        reshard(model)
        loss_sum, num_targets = sum_ranks(totals, self.mesh.data_group).tolist()
        if num_targets == 0:
            raise DataError("the validation data has no target token", fix="use longer documents or more of them")
        mean = loss_sum / num_targets
        perplexity = math.exp(mean) if mean < 700 else math.inf  # beyond that a double cannot hold it
        return {"loss": mean, "perplexity": perplexity, "targets": num_targets}
