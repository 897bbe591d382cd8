"""What is divided by what: epochs, the mean of an evaluation, target tokens."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from forgather.data.batch import Batch
from forgather.data.loader import EvaluationLoader, Loader
from forgather.data.order import Permutation
from forgather.distributed.environment import Environment
from forgather.distributed.mesh import Mesh
from forgather.trainers.evaluation import Evaluation


class Packed(NamedTuple):
    input_ids: np.ndarray
    targets: np.ndarray
    position_ids: np.ndarray


class Blocks:
    """Rows whose targets are given, as `PackedBlocks` hands them out."""

    def __init__(self, targets: list[list[int]]) -> None:
        self.targets = np.array(targets)
        self.block_length = self.targets.shape[1]

    def __len__(self) -> int:
        return len(self.targets)

    def gather(self, indices: np.ndarray) -> Packed:
        targets = self.targets[indices]
        return Packed(np.zeros_like(targets), targets, np.zeros_like(targets))


class MeanLoss:
    """A loss that a row has for each of its targets, by its place in the evaluation."""

    def __init__(self, means: list[float]) -> None:
        self.model = nn.Linear(1, 1)
        self.means = means

    def total(self, batches) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for batch in batches:
            total += sum(self.means[sample] for sample in batch.samples) * batch.num_targets / len(batch.samples)
        return total


def evaluate(data, means: list[float]) -> dict[str, float]:
    return Evaluation(MeanLoss(means), data, Mesh(Environment(device="cpu")))()


@pytest.mark.training_case(8)
def test_an_epoch_counts_what_accumulation_has_consumed():
    blocks = Blocks([[1, 2]] * 100)
    loader = Loader(blocks, Permutation(100, 0), rows_per_step=4, rows_per_forward=1)
    assert loader.num_microbatches == 4
    for _ in range(12):
        assert len(loader.take()) == 4
    assert loader.epoch == 0.48
    loader.close()


@pytest.mark.training_case(9)
def test_a_limited_evaluation_divides_by_what_it_has_evaluated():
    blocks = Blocks([[1, 2, 3]] * 3)
    metrics = evaluate(EvaluationLoader(blocks, rows_per_forward=1, limit=2), [1.0, 3.0, 100.0])
    assert metrics["loss"] == 2.0
    assert metrics["targets"] == 6


@pytest.mark.training_case(10)
def test_an_evaluation_weighs_batches_by_their_targets():
    def batch(sample: int, num_targets: int) -> Batch:
        tokens = torch.zeros(1, 1000, dtype=torch.int64)
        return Batch(tokens, tokens, tokens, num_targets, (sample,))

    metrics = evaluate([batch(0, 10), batch(1, 990)], [1.0, 3.0])
    assert metrics["loss"] == pytest.approx(2.98)
    assert metrics["perplexity"] == pytest.approx(np.exp(2.98))


@pytest.mark.training_case(45)
def test_what_has_no_target_is_not_counted():
    blocks = Blocks([[5, -100, 7, -100]])
    loader = Loader(blocks, Permutation(1, 0), rows_per_step=1, rows_per_forward=1)
    (batch,) = loader.take()
    assert batch.num_targets == 2
    loader.close()
    (batch,) = EvaluationLoader(blocks, rows_per_forward=1)
    assert batch.num_targets == 2
