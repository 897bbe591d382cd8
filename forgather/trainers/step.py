"""The step of a run that is not pipelined: forward, backward and update of one global batch.

Called by `trainers.trainer`. Shapes: B rows, L tokens.
"""

import hashlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from forgather.data.batch import Batch
from forgather.distributed.blocks import describe_blocks
from forgather.distributed.collectives import sum_ranks
from forgather.distributed.fsdp import describe_spread, mark_microbatch
from forgather.distributed.mesh import Mesh
from forgather.metrics.step_result import StepResult
from forgather.trainers.loss import CausalLoss
from forgather.trainers.update import Update


class LocalStep:
    """Runs microbatches through the model and applies one optimizer step.

    The loss of the step is the sum over target tokens divided by their global number, so any split of the same batch
    over microbatches and ranks gives the same gradient. What the step draws at random (dropout) is a function of
    `(seed, step, rank)`: neither evaluation nor an interruption changes it.
    """

    def __init__(self, model: nn.Module, loss: CausalLoss, update: Update, mesh: Mesh, *, seed: int = 0) -> None:
        self.model = model
        self.loss = loss
        self.update = update
        self.mesh = mesh
        self.seed = seed
        self.device = mesh.environment.device

    def __call__(self, step: int, batches: Sequence[Batch]) -> StepResult:
        """Make step number `step` (from 0) with this rank's microbatches; all ranks call it with equally many."""
        reseed(stream(self.seed, step, self.mesh.data_rank), self.device)
        num_targets = count_targets(batches, self.mesh)  # before backward: it is the divisor
        losses = []
        for batch, is_last in mark_last(batches):
            mark_microbatch(self.model, is_last)  # reduce once a step, not once a microbatch
            loss = self.loss(batch.to(self.device)) / num_targets
            self.update.backward(step, loss)
            losses.append(loss.detach())
        return self.update(step, batches, losses, num_targets)

    def rehearse(self, batches: Sequence[Batch]) -> float:
        """The loss of a global batch, in nats a token, without learning from it; all ranks call it."""
        with torch.no_grad():
            total = self.loss.total(batches)
        return float(sum_ranks(total, self.mesh.data_group) / count_targets(batches, self.mesh))

    def describe(self) -> list[str]:
        """Lines for the person who starts the run: what the parts of the step became."""
        return [
            f"model: {type(self.model).__name__.removeprefix('FSDP')}, {describe_spread(self.model)}",
            *describe_blocks(self.model),
            f"loss: {self.loss.describe()}",
            *self.update.describe(),
        ]

    def settle(self) -> None:
        """Make sure that the last step was sound; called before its result is shown or kept."""
        self.update.settle()


def count_targets(batches: Sequence[Batch], mesh: Mesh) -> Tensor:
    """Target tokens of the whole global batch; at least 1, so that a batch without any has loss 0."""
    mine = sum(batch.num_targets for batch in batches)
    count = torch.full((), mine, dtype=torch.int64, device=mesh.environment.device)
    return sum_ranks(count, mesh.data_group).clamp_(min=1)


def mark_last(batches: Sequence[Batch]) -> Iterator[tuple[Batch, bool]]:
    """Each batch, and whether it is the last."""
    return ((batch, number == len(batches)) for number, batch in enumerate(batches, start=1))


def reseed(seed: int, device: torch.device) -> None:
    """Start torch's streams of random numbers anew, the CPU's and that of `device`.

    torch.manual_seed asks every kind of accelerator there could be, which took 0.2 to 0.5 ms of each step here.
    """
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


def stream(seed: int, step: int, rank: int) -> int:
    """A seed for one rank's random draws of one step, unrelated to its neighbours'."""
    return int.from_bytes(hashlib.blake2b(f"step {seed} {step} {rank}".encode(), digest_size=7).digest(), "big")
