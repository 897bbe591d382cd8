"""Lets people and job systems stop, save and steer a run: signals and commands, agreed on by all ranks.

A wish may reach any rank (a signal) or rank 0 alone (the socket). What any rank has received before a step begins is
put into one small reduction on the CPU, which runs beside the step and is waited for at its end. So all ranks obey at
the end of the same step, the device never waits, and a world of one reduces nothing.
"""

from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist

from forgather.distributed.collectives import rank, world_size
from forgather.trainers.commands import Command, Orders
from forgather.trainers.signals import StopSignals


class Control:
    """Receives commands for a run; the loop asks it around every step.

    control.begin_step()
    ...                             # the step
    orders = control.end_step()  # the same on every rank

    """

    def __init__(self, *, signals: bool = True) -> None:
        self._signals = StopSignals(say=rank() == 0) if signals else None
        self._agreement: tuple[torch.Tensor, Any] | None = None

    def begin_step(self) -> None:
        """Send what was asked for so far on its way to the other ranks; all ranks call it."""
        if world_size() == 1:
            return
        wished = self._wishes()
        asked = torch.tensor([command in wished for command in Command], dtype=torch.uint8)
        self._agreement = asked, dist.all_reduce(asked, dist.ReduceOp.MAX, async_op=True)

    def end_step(self) -> Orders:
        """What all ranks do now that the step is made."""
        if self._agreement is None:
            agreed = self._wishes()
        else:
            asked, work = self._agreement
            self._agreement = None
            work.wait()
            agreed = {command for command, is_asked in zip(Command, asked.tolist(), strict=True) if is_asked}
        return Orders.of(agreed)

    def _wishes(self) -> set[Command]:
        wishes = set()
        if self._signals is not None and self._signals.received is not None:
            wishes.add(Command.STOP)
        return wishes

    def __enter__(self) -> Self:
        if self._signals is not None:
            self._signals.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        if self._signals is not None:
            self._signals.__exit__(kind, value, tb)
