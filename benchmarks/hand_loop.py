"""The training loop that a person writes by hand in an afternoon: what `overhead.py` measures ours against.

Nothing of Forgather's trainer is used here, and nothing is left out that the run needs: accumulation, a loss divided by
the target tokens of the whole batch, clipping, fused AdamW, a schedule, FSDP2 on more than one process. Its batches lie
in memory, and the loss is looked at when it is logged, every tenth step.
"""

import time
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from forgather.data.batch import Batch

LR, WEIGHT_DECAY, MAX_NORM, LOG_EVERY = 1e-3, 0.1, 1.0, 10


def shard_by_hand(model: nn.Module) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


class HandLoop:
    """`segment(n)` makes n steps and gives the seconds of the last n - 1, and the losses of all."""

    name = "hand-written loop"

    def __init__(self, model: nn.Module, batches: Sequence[list[Batch]]) -> None:
        self.model = model
        self.batches: Iterator[list[Batch]] = iter(batches)
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        if self.world_size > 1:
            shard_by_hand(model)
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY, fused=True
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda _: 1.0)
        self.steps_done = 0
        self.log: list[str] = []
        model.train()

    def segment(self, steps: int) -> tuple[float, list[float]]:
        losses = []
        for number in range(steps):
            if number == 1:
                start = time.perf_counter()
            losses.append(self.step(next(self.batches)))
            self.steps_done += 1
            if self.steps_done % LOG_EVERY == 0:
                self.log.append(f"step {self.steps_done}: loss {losses[-1].item():.4f}")
        elapsed = time.perf_counter() - start
        return elapsed, [loss.item() for loss in losses]

    def step(self, microbatches: list[Batch]) -> torch.Tensor:
        num_targets = torch.tensor(sum(batch.num_targets for batch in microbatches))
        if self.world_size > 1:
            dist.all_reduce(num_targets)
        loss_sum = torch.zeros(())
        for number, batch in enumerate(microbatches):
            if self.world_size > 1:
                self.model.set_requires_gradient_sync(number == len(microbatches) - 1)
            loss = self.loss(batch) / num_targets
            (loss * self.world_size).backward()  # FSDP takes the mean over the ranks
            loss_sum += loss.detach()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_NORM)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        return loss_sum

    def loss(self, batch: Batch) -> torch.Tensor:
        logits = self.model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="sum")
