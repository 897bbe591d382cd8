"""The step of a run that is not pipelined: forward, backward and update of one global batch.

Called by `trainers.trainer`. Shapes: B rows, L tokens.
"""

import hashlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from forgather.data.batch import Batch
from forgather.distributed.collectives import sum_ranks
from forgather.distributed.fsdp import describe_spread, mark_microbatch, reshard
from forgather.distributed.mesh import Mesh
from forgather.metrics.step_result import StepResult
from forgather.optim.clip import GradientClip
from forgather.optim.groups import describe_groups
from forgather.optim.schedules import Schedule
from forgather.trainers.finite import FiniteWatch
from forgather.trainers.loss import CausalLoss


class LocalStep:
    """Runs microbatches through the model and applies one optimizer step.

    The loss of the step is the sum over target tokens divided by their global number, so any split of the same batch
    over microbatches and ranks gives the same gradient. What the step draws at random (dropout) is a function of
    `(seed, step, rank)`: neither evaluation nor an interruption changes it.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: CausalLoss,
        optimizer: Optimizer,
        schedule: Schedule,
        mesh: Mesh,
        *,
        max_grad_norm: float | None = 1.0,
        seed: int = 0,
    ) -> None:
        self.model = model
        self.loss = loss
        self.optimizer = optimizer
        self.schedule = schedule
        self.mesh = mesh
        self.seed = seed
        self.device = mesh.environment.device
        # Taken now, before a checkpoint is loaded: on a resume the config's learning rate wins.
        self.peak_lrs = [float(group["lr"]) for group in optimizer.param_groups]
        self.lr = float(optimizer.defaults["lr"])
        schedule(0)  # one that has no room for its parts says so here, not when the run has begun
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.clip = GradientClip(parameters, max_grad_norm)
        self.watch = FiniteWatch(optimizer, self.device)

    def __call__(self, step: int, batches: Sequence[Batch]) -> StepResult:
        """Make step number `step` (from 0) with this rank's microbatches; all ranks call it with equally many."""
        reseed(_stream(self.seed, step, self.mesh.data_rank), self.device)
        factor = self.schedule(step)
        num_targets = self.count_targets(batches)  # before backward: it is the divisor
        loss_sum = torch.zeros((), device=self.device)
        for batch, is_last in mark_last(batches):
            mark_microbatch(self.model, is_last)  # reduce once a step, not once a microbatch
            loss = self.loss(batch.to(self.device)) / num_targets
            loss.backward()  # type: ignore[no-untyped-call]
            loss_sum += loss.detach()
        grad_norm = self.update(step, factor, loss_sum)
        tokens = sum(batch.input_ids.numel() for batch in batches)
        return StepResult(loss_sum, num_targets, grad_norm, self.lr * factor, tokens)

    def count_targets(self, batches: Sequence[Batch]) -> Tensor:
        """Target tokens of the whole global batch; at least 1, so that a batch without any has loss 0."""
        count = torch.full((), sum(batch.num_targets for batch in batches), dtype=torch.int64, device=self.device)
        return sum_ranks(count, self.mesh.data_group).clamp_(min=1)

    def update(self, step: int, factor: float, loss_sum: Tensor) -> Tensor:
        """Clip, check and apply the gradients; returns their norm before clipping."""
        grad_norm, loss = self.clip.norm(riding=loss_sum)
        self.watch.observe(step, loss, grad_norm)
        self.clip.scale(grad_norm)
        for group, peak in zip(self.optimizer.param_groups, self.peak_lrs, strict=True):
            group["lr"] = peak * factor
        self.optimizer.step()
        self.optimizer.zero_grad()
        return grad_norm

    def rehearse(self, batches: Sequence[Batch]) -> float:
        """The loss of a global batch, in nats a token, without learning from it; all ranks call it."""
        num_targets = self.count_targets(batches)
        with torch.no_grad():
            total = sum((self.loss(batch.to(self.device)) for batch in batches), torch.zeros((), device=self.device))
        reshard(self.model)
        return float(sum_ranks(total / num_targets, self.mesh.data_group))

    def describe(self) -> list[str]:
        """Lines for the person who starts the run: what the parts of the step became."""
        limit = "not clipped" if self.clip.max_norm is None else f"clipped to norm {self.clip.max_norm:g}"
        return [
            f"model: {type(self.model).__name__.removeprefix('FSDP')}, {describe_spread(self.model)}",
            f"loss: {self.loss.describe()}",
            f"optimizer: {type(self.optimizer).__name__}, peak lr {self.lr:g}, gradients {limit}",
            f"groups: {describe_groups(self.optimizer)}",
        ]

    def settle(self) -> None:
        """Make sure that the last step was sound; called before its result is shown or kept."""
        self.watch.settle()


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


def _stream(seed: int, step: int, rank: int) -> int:
    """A seed for one rank's random draws of one step, unrelated to its neighbours'."""
    return int.from_bytes(hashlib.blake2b(f"step {seed} {step} {rank}".encode(), digest_size=7).digest(), "big")
