"""Adds up the steps between two log steps on the device, and brings them to the host once.

    meter = Meter(device, flops_per_token=count_flops(model, length).per_token)
    meter.start()
    with meter.waiting_for_data():
        batches = loader.take()
    meter.add(step(batches))
    with meter.paused():
        evaluate()
    metrics = meter.flush(step_number)      # at a log step only, on all ranks

Between two flushes nothing is copied off the device and no rank waits for another.
"""

import resource
import sys
from contextlib import AbstractContextManager

import torch
import torch.distributed as dist

from forgather.distributed import collectives
from forgather.metrics.clock import PausableClock
from forgather.metrics.flops import peak_flops
from forgather.metrics.step_result import StepResult


class Meter:
    """The metrics of a window of steps, the same on every rank, for one collective a flush.

    flops_per_token: what the model needs for one token, forward and backward. With it, and on devices whose peak is
        known, the metrics have `mfu`.
    """

    def __init__(self, device: torch.device, flops_per_token: float | None = None) -> None:
        self._device = device
        self._flops_per_token = flops_per_token
        self._peak_flops = peak_flops(device)
        self._clock = PausableClock(device)
        self._last: StepResult | None = None
        self._begin_window()

    def start(self) -> None:
        """Begin the window now: what was set up since the meter was made is not training time."""
        self._begin_window()

    def add(self, result: StepResult) -> None:
        """Account for one step of this rank."""
        # In float64: a window of many steps must not lose the digits that two runs are compared by.
        self._loss_sum += result.loss_sum.detach().double() * result.num_targets
        self._num_targets += result.num_targets
        self._tokens += result.tokens
        self._steps += 1
        self._last = result

    def paused(self) -> AbstractContextManager[None]:
        """A context whose time is no training time: evaluation, saves, sampling."""
        return self._clock.paused()

    def waiting_for_data(self) -> AbstractContextManager[None]:
        """A context whose time is reported as `data_wait_s`; it stays part of the training time."""
        return self._clock.waiting_for_data()

    def flush(self, step: int) -> dict[str, float]:
        """The window's metrics, and a new window. All ranks call it, at the same step.

        loss: mean over the target tokens of all steps of the window.
        grad_norm, lr: of the window's last step.
        tokens_per_s: input tokens of all ranks, per second of training of the slowest rank.
        step_s: that time, per step. data_wait_s: how much of it the slowest loader kept its rank waiting.
        peak_memory_bytes: the most since the process started, of the rank that has most; what torch has allocated on
            CUDA, resident memory elsewhere.
        mfu: the share of all ranks' peak that the tokens account for; absent where a peak or the need is not known.
        """
        assert self._last is not None, "a flush needs at least one step in its window"
        on_device = [self._loss_sum, self._num_targets, self._last.grad_norm.detach().double()]
        loss_sum, num_targets, grad_norm = torch.stack(on_device).tolist()  # waits for the window's last step
        mine = {
            "step": step,
            "loss_sum": loss_sum,
            "tokens": self._tokens,
            "elapsed_s": self._clock.elapsed_s(),  # after the wait: queued kernels have run
            "waited_s": self._clock.waited_s,
            "memory": peak_memory_bytes(self._device),
            "peak_flops": self._peak_flops or 0.0,
        }
        ranks = dict(zip(mine, _columns(list(mine.values()), self._device), strict=True))
        assert len(set(ranks["step"])) == 1, f"ranks flush at different steps: {ranks['step']}"

        time_s = max(ranks["elapsed_s"])
        metrics = {
            "loss": sum(ranks["loss_sum"]) / num_targets if num_targets else 0.0,
            "grad_norm": grad_norm,
            "lr": self._last.lr,
            "tokens_per_s": sum(ranks["tokens"]) / time_s,
            "step_s": time_s / self._steps,
            "data_wait_s": max(ranks["waited_s"]) / self._steps,
            "peak_memory_bytes": max(ranks["memory"]),
        }
        if self._flops_per_token is not None and all(ranks["peak_flops"]):
            metrics["mfu"] = self._flops_per_token * metrics["tokens_per_s"] / sum(ranks["peak_flops"])
        self._begin_window()
        return metrics

    def _begin_window(self) -> None:
        self._loss_sum = torch.zeros((), dtype=torch.float64, device=self._device)
        self._num_targets = torch.zeros((), dtype=torch.float64, device=self._device)
        self._tokens = 0
        self._steps = 0
        self._last = None
        self._clock.restart()


def _columns(values: list[float], device: torch.device) -> list[list[float]]:
    """For each of `values` the list of what all ranks have there, in order of rank: sums, maxima, all from one call."""
    ranks = collectives.world_size()
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
