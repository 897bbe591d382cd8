"""Lets people and job systems stop, save and steer a run: signals and commands, agreed on by all ranks.

A wish may reach any rank (a signal) or rank 0 alone (the socket). What any rank has received before a step begins is
put into one small reduction on the CPU, which runs beside the step and is waited for at its end. So all ranks obey at
the end of the same step, the device never waits, and a world of one reduces nothing.
"""

import os
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from datetime import datetime
from types import TracebackType
from typing import Any, Protocol, Self

import torch
import torch.distributed as dist

from forgather.checkpoint.run_folder import RunFolder
from forgather.distributed.collectives import rank, world_size
from forgather.distributed.failure import FOLDER_VARIABLE
from forgather.trainers.commands import Command, Orders
from forgather.trainers.control_server import ControlServer
from forgather.trainers.events import Evaluated, Finished, Logged, Outcome, Saved, StepEnded
from forgather.trainers.signals import StopSignals

_PACE_STEPS = 20  # over which the pace that `status` tells is measured


class Steered(Protocol):
    """What is told of a run: `trainers.trainer.Trainer` is one."""

    steps_done: int
    saved_at: int | None

    @property
    def steps(self) -> int: ...


class Control:
    """Receives commands for a run; the loop asks it around every step.

        control.steer(trainer)
        with control:
            control.begin_step()
            ...                          # the step
            orders = control.end_step()  # the same on every rank

    With `run`, rank 0 listens in its folder for `forgather control`. `schedule` is asked what it says to `decay`.
    It is a hook of the run, too: what it is told of the run is what `status` tells.
    """

    def __init__(
        self,
        run: RunFolder | None = None,
        schedule: Callable[[int], float] | None = None,
        mesh: Mapping[str, int] | None = None,
        *,
        signals: bool = True,
    ) -> None:
        # Our launcher has said it already.
        says = rank() == 0 and FOLDER_VARIABLE not in os.environ
        self._signals = StopSignals(say=says) if signals else None
        self._run = run
        self._mesh = dict(mesh or {})
        self._refuses: Callable[[str], str | None] | None = getattr(schedule, "refusal", None)
        self._server: ControlServer | None = None
        self._steered: Steered | None = None
        self._agreement: tuple[torch.Tensor, Any] | None = None
        self._state = "starting"
        self._ended = "the run failed"
        self._begun = datetime.now().astimezone()
        self._times: deque[float] = deque(maxlen=_PACE_STEPS + 1)
        self._metrics: dict[str, Mapping[str, float]] = {}

    def steer(self, run: Steered) -> None:
        """Name whose steps these are."""
        self._steered = run

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
        orders = Orders.of(agreed)
        if self._server is not None and self._steered is not None and agreed:
            self._server.obeyed(self._steered.steps_done, agreed)
        if orders.stop or orders.abort:
            self._state = "stopping"
        return orders

    def is_asked_to_end(self) -> bool:
        """Whether this rank was asked to stop or abort the run; for whoever waits within a step."""
        if self._signals is not None and self._signals.received is not None:
            return True
        return self._server is not None and self._server.has(Command.STOP, Command.ABORT)

    def status(self) -> dict[str, Any]:
        """What `forgather control status` prints: numbers of the run as far as they are known."""
        known = self._steered
        steps_per_s = self._pace()
        left = None if known is None or steps_per_s is None else (known.steps - known.steps_done) / steps_per_s
        train = self._metrics.get("train", {})
        return {
            "run": None if self._run is None else str(self._run.dir),
            "state": self._state,
            "step": None if known is None else known.steps_done,
            "steps": None if known is None else known.steps,
            "saved_step": None if known is None else known.saved_at,
            "loss": train.get("loss"),
            "tokens_per_s": train.get("tokens_per_s"),
            "steps_per_s": steps_per_s,
            "left_s": left,
            "metrics": self._metrics,
            "mesh": self._mesh,
            "ranks": world_size(),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "begun": self._begun.isoformat(timespec="seconds"),
        }

    def on_step_end(self, event: StepEnded) -> None:  # noqa: ARG002  a hook is told of events
        self._times.append(time.monotonic())
        if self._state == "starting":
            self._state = "training"

    def on_logged(self, event: Logged) -> None:
        self._metrics["train"] = dict(event.metrics)

    def on_evaluated(self, event: Evaluated) -> None:
        self._metrics["evaluation"] = dict(event.metrics)

    def on_saved(self, event: Saved) -> None:
        if self._server is not None:
            self._server.saved(event.step, event.path)

    def on_finish(self, event: Finished) -> None:
        did = {Outcome.FINISHED: "finished", Outcome.STOPPED: "was stopped", Outcome.ABORTED: "was aborted"}
        self._ended = f"the run {did.get(event.outcome, 'ended')} after step {event.step}"

    def _pace(self) -> float | None:
        """Steps a second of late."""
        if len(self._times) < 2:
            return None
        return (len(self._times) - 1) / max(1e-9, self._times[-1] - self._times[0])

    def _wishes(self) -> set[Command]:
        wishes = set() if self._server is None else self._server.take()
        if self._signals is not None and self._signals.received is not None:
            wishes.add(Command.STOP)
        return wishes

    def _refusal(self, command: Command) -> str | None:
        if self._state == "stopping":
            return f"the run ends after this step, and takes no `{command.value}`"
        if command is not Command.DECAY:
            return None
        if self._refuses is None:
            return "the schedule of this run has no decay to begin; warmup_stable_decay and infinite have one"
        return self._refuses(command.value)

    def __enter__(self) -> Self:
        self._state = "starting"
        if self._signals is not None:
            self._signals.__enter__()
        if self._run is not None and rank() == 0:
            server = ControlServer(self._run.dir, status=self.status, refuse=self._refusal)
            try:
                server.start()
            except OSError as error:
                print(f"warning: no commands for this run: {error.strerror or error}", file=sys.stderr)
            else:
                self._server = server
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        if self._server is not None:
            self._server.close(self._ended)
            self._server = None
        if self._signals is not None:
            self._signals.__exit__(kind, value, tb)
