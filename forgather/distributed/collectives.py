"""Small agreements between ranks, which also work where there is no process group.

All of them are collective: every rank calls them, in the same order. A world of one answers at once. They move a few
bytes; parameters and gradients travel elsewhere.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist

from forgather.errors import DistributedError

T = TypeVar("T")


def rank() -> int:
    """This process's number, 0 where there is no group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes there are, 1 where there is no group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Return when every rank has called it."""
    # A reduction of one CPU number instead of dist.barrier: NCCL's would synchronise the device.
    sum_ranks(torch.zeros(1))


def agree(ok: bool) -> bool:
    """Whether `ok` is true on every rank."""
    return int(sum_ranks(torch.tensor(0 if ok else 1))) == 0


def sum_ranks(tensor: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """Sum `tensor` over the ranks, in place, and return it."""
    if world_size() > 1:
        dist.all_reduce(tensor, dist.ReduceOp.SUM, group=group)
    return tensor


def max_ranks(number: int) -> int:
    """The largest `number` that any rank passed."""
    if world_size() == 1:
        return number
    box = torch.tensor(number)
    dist.all_reduce(box, dist.ReduceOp.MAX)
    return int(box)


def broadcast_object(value: T, source: int = 0) -> T:
    """The value that rank `source` passed, on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=source)
    return box[0]


def gather_objects(value: T) -> list[T]:
    """Every rank's value, in order of rank, on every rank."""
    if world_size() == 1:
        return [value]
    values: list[T | None] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]  # all_gather_object has filled every place


@contextmanager
def failing_together() -> Iterator[None]:
    """A block without collectives that fails on every rank when it fails on one, so that nobody waits for who is gone.

    The failing rank raises its own error, the others a DistributedError that names it.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:  # noqa: BLE001  raised below, by all
        failure = error
    if not agree(failure is None):  # one number, which is much less than the words that are there only then
        raise_together(failure, gather_objects(None if failure is None else str(failure) or type(failure).__name__))


def raise_together(failure: Exception | None, causes: Sequence[str | None]) -> None:
    """Raise on every rank when one has failed: there its own error, elsewhere one that names it.

    `causes` are all ranks' in order, None for one that has not failed. For those who have told them with other things.
    """
    if failure is not None:
        raise failure
    for number, cause in enumerate(causes):
        if cause is not None:
            raise DistributedError(f"rank {number} failed ({cause})")


def require_equal(
    what: str, value: str, *, fix: str = "start every rank with the same command, project files and environment"
) -> None:
    """Raise DistributedError on every rank unless all pass the same `value`; the error names who differs."""
    values = gather_objects(value)
    differing = [number for number, other in enumerate(values) if other != values[0]]
    if differing:
        shown = ", ".join(f"rank {number}: {values[number]}" for number in [0, *differing[:4]])
        raise DistributedError(f"{what} is not the same on all ranks ({shown})", fix=fix)
