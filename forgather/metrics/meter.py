"""Adds up the steps between two log steps on the device, and brings them to the host once.

    meter = Meter(device, flops_per_token=count_flops(model, length).per_token)
    meter.start()
    with meter.doing("data_wait"):
        batches = loader.take()
    with meter.watching():
        result = step(batches)
    meter.add(result)
    with meter.doing("evaluation"):
        evaluate()
    metrics = meter.flush(step_number)      # at a log step only, on all ranks

Between two flushes nothing is copied off the device and no rank waits for another.
"""

import resource
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.distributed as dist

from forgather.distributed.collectives import world_size
from forgather.metrics.clock import Activity, ActivityClock
from forgather.metrics.flops import peak_flops
from forgather.metrics.goodput import Ledger
from forgather.metrics.step_result import StepResult
from forgather.metrics.traffic import Traffic


class Meter:
    """The metrics of a window of steps, the same on every rank, for one collective a flush.

    flops_per_token: what the model needs for one token, forward and backward. With it, and on devices whose peak is
        known, the metrics have `mfu`.
    peak: FLOP/s that each device of the run can do, where the table of `metrics.flops` does not know it.
    ledger: the account of the run's wall time, which the meter keeps; without one, that of this process.
    """

    def __init__(
        self,
        device: torch.device,
        flops_per_token: float | None = None,
        *,
        peak: float | None = None,
        ledger: Ledger | None = None,
    ) -> None:
        self._device = device
        self._flops_per_token = flops_per_token
        self._peak_flops = peak if peak is not None else peak_flops(device)
        self._clock = ActivityClock(device)
        self.ledger = Ledger() if ledger is None else ledger
        self._last: StepResult | None = None
        self._steps_of_process = 0
        self._bytes_sent = 0
        self._begin_window()

    def start(self) -> None:
        """Begin the window now: what was set up since the meter was made is not training time."""
        self.ledger.open(self._clock)
        self._clock.turn_to("training")
        self._begin_window()

    def add(self, result: StepResult) -> None:
        """Account for one step of this rank."""
        # In float64: a window of many steps must not lose the digits that two runs are compared by.
        self._loss_sum += result.loss_sum.detach().double() * result.num_targets
        self._num_targets += result.num_targets
        self._tokens += result.tokens
        self._steps += 1
        self._steps_of_process += 1
        self._last = result
        self.ledger.step_made()

    def watching(self) -> AbstractContextManager[None]:
        """A context for the step: in the third of a process, when all is set up, it counts the bytes sent."""
        return self._counting_traffic() if self._steps_of_process == 2 and world_size() > 1 else nullcontext()

    def doing(self, activity: Activity) -> AbstractContextManager[None]:
        """A context whose time is spent on `activity`. Only `data_wait` is part of the training time."""
        return self._clock.doing(activity)

    def flush(self, step: int) -> dict[str, float]:
        """The window's metrics, and a new window. All ranks call it, at the same step.

        loss: mean over the target tokens of all steps of the window.
        grad_norm, lr: of the window's last step.
        tokens_per_s: input tokens of all ranks, per second of training of the slowest rank.
        step_s: that time, per step. data_wait_s: how much of it the slowest loader kept its rank waiting.
        checkpoint_stall_s: how long the loop stood still for saves in this window, on the slowest rank.
        bytes_sent: what the rank that sends most sends to others in a step; absent in a world of one, and as long as
            this process has not made its third step, whose traffic is counted.
        goodput: the share of the run's wall time so far, on rank 0, that its weights rest on; see `metrics.goodput`.
        peak_memory_bytes: the most since the process started, of the rank that has most; what torch has allocated on
            CUDA, resident memory elsewhere.
        mfu: the share of all ranks' peak that the tokens account for; absent where a peak or the need is not known.
        """
        assert self._last is not None, "a flush needs at least one step in its window"
        on_device = [self._loss_sum, self._num_targets, self._last.grad_norm.detach().double()]
        loss_sum, num_targets, grad_norm = torch.stack(on_device).tolist()  # waits for the window's last step
        spent = self._spent()  # after the wait: queued kernels have run
        mine = {
            "step": step,
            "loss_sum": loss_sum,
            "tokens": self._tokens,
            "trained_s": spent["training"],
            "waited_s": spent["data_wait"],
            "stalled_s": spent["checkpoint"],
            "memory": peak_memory_bytes(self._device),
            "bytes_sent": self._bytes_sent,
            "goodput": self.ledger.goodput,
            "peak_flops": self._peak_flops or 0.0,
        }
        ranks = dict(zip(mine, _columns(list(mine.values()), self._device), strict=True))
        assert len(set(ranks["step"])) == 1, f"ranks flush at different steps: {ranks['step']}"

        self.ledger.waited_longer(max(ranks["waited_s"]) - spent["data_wait"])
        time_s = max(map(sum, zip(ranks["trained_s"], ranks["waited_s"], strict=True)))
        metrics = {
            "loss": sum(ranks["loss_sum"]) / num_targets if num_targets else 0.0,
            "grad_norm": grad_norm,
            "lr": self._last.lr,
            "tokens_per_s": sum(ranks["tokens"]) / time_s,
            "step_s": time_s / self._steps,
            "data_wait_s": max(ranks["waited_s"]) / self._steps,
            "checkpoint_stall_s": max(ranks["stalled_s"]),
            "peak_memory_bytes": max(ranks["memory"]),
            "goodput": ranks["goodput"][0],
        }
        if max(ranks["bytes_sent"]) > 0:
            metrics["bytes_sent"] = max(ranks["bytes_sent"])
        if self._flops_per_token is not None and all(ranks["peak_flops"]):
            metrics["mfu"] = self._flops_per_token * metrics["tokens_per_s"] / sum(ranks["peak_flops"])
        self._begin_window()
        return metrics

    @contextmanager
    def _counting_traffic(self) -> Iterator[None]:
        with Traffic() as traffic:
            yield
        self._bytes_sent = traffic.bytes_sent

    def _begin_window(self) -> None:
        self._loss_sum = torch.zeros((), dtype=torch.float64, device=self._device)
        self._num_targets = torch.zeros((), dtype=torch.float64, device=self._device)
        self._tokens = 0
        self._steps = 0
        self._last = None
        self._at_begin = self._clock.seconds()

    def _spent(self) -> dict[Activity, float]:
        """Seconds of this window on each activity."""
        return {activity: s - self._at_begin[activity] for activity, s in self._clock.seconds().items()}


def _columns(values: list[float], device: torch.device) -> list[list[float]]:
    """For each of `values` the list of what all ranks have there, in order of rank: sums, maxima, all from one call."""
    ranks = world_size()
    if ranks == 1:
        return [[value] for value in values]
    mine = torch.tensor(values, dtype=torch.float64, device=device)
    gathered = torch.empty(ranks * len(values), dtype=torch.float64, device=device)
    dist.all_gather_single(gathered, mine)
    columns: list[list[float]] = gathered.view(ranks, len(values)).T.tolist()
    return columns


def peak_memory_bytes(device: torch.device) -> int:
    """The most since the process started: what torch has allocated on a CUDA device, resident memory elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, KiB elsewhere
