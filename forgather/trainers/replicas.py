"""Checks that what several ranks hold twice is the same on all of them, bit for bit.

A replica that has gone its own way (a bit flipped in memory, an operation that is not deterministic on one device, a
rank that missed a collective) trains on without a word. Every rank hashes its part of each parameter and of the
optimizer's state; two ranks that hold the same part of the same tensor must come to the same hash. Which ranks those
are is asked of the tensors, so it holds on any mesh: replicas, tensor-parallel ranks that share a norm, DDP.
"""

from collections.abc import Iterator

import torch
import xxhash
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from forgather.checkpoint.state import TrainState
from forgather.distributed.collectives import gather_objects, world_size
from forgather.errors import TrainingError
from forgather.metrics.meter import Meter
from forgather.tensor_boxes import Box, local_box, local_part
from forgather.trainers.events import Finished, Outcome, StepEnded
from forgather.trainers.interval import Interval

_SHOWN = 5
_Key = tuple[str, Box]


class ReplicaCheck:
    """A hook that compares replicas every `every` steps and after the run's last; TrainingError names what differs.

    Reads all parameters and optimizer state once, which takes about 0.1 s a GB on a CPU, plus the copy from a device.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, meter: Meter, *, every: int | None = 100) -> None:
        self.state = TrainState(model, optimizer)
        self.meter = meter
        self.interval = Interval("every of the replica check", every)
        self._last: int | None = None

    def on_step_end(self, event: StepEnded) -> None:
        if self.interval.is_due(event.step):
            self.check(event.step)

    def on_finish(self, event: Finished) -> None:
        if event.outcome is Outcome.FINISHED and self._last != event.step:
            self.check(event.step)

    def check(self, step: int) -> None:
        """Compare now; all ranks call it."""
        self._last = step
        if world_size() == 1:
            return
        with self.meter.doing("inspection"):
            differing = compare(dict(self._hashes()))
        if differing:
            shown = "; ".join(differing[:_SHOWN])
            more = f"; and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
            raise TrainingError(
                f"after step {step} replicas differ: {shown}{more}",
                fix="go on from the last checkpoint; if it happens again on one host, suspect its memory or device",
            )

    def _hashes(self) -> Iterator[tuple[_Key, int]]:
        weights = self.state.weights()
        for name, tensor in weights.items():
            yield (name, local_box(tensor)), hash_tensor(tensor)
            for key, part in self.state.optimizer.state.get(tensor, {}).items():
                if isinstance(part, Tensor):
                    # State of a parameter's shape has its part; a step count belongs to the part that it counts for.
                    box = local_box(part) if isinstance(part, DTensor) else local_box(tensor)
                    yield (f"{key} of {name}", box), hash_tensor(part)


def compare(hashes: dict[_Key, int]) -> list[str]:
    """One line for each tensor of which two ranks hold the same part with other values. Collective."""
    held: dict[_Key, dict[int, list[int]]] = {}
    for rank, mine in enumerate(gather_objects(hashes)):
        for key, value in mine.items():
            held.setdefault(key, {}).setdefault(value, []).append(rank)
    lines: dict[str, str] = {}
    for (name, _), ranks in held.items():
        if len(ranks) > 1:
            sides = " from ".join(_words(group) for group in sorted(ranks.values()))
            lines.setdefault(name, f"{name} ({sides})")
    return list(lines.values())


def hash_tensor(tensor: Tensor) -> int:
    """A hash of the bits of this rank's part of `tensor`."""
    on_host = local_part(tensor).detach().cpu().contiguous()
    return xxhash.xxh3_64_intdigest(on_host.reshape(-1).view(torch.uint8).numpy().data)


def _words(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
