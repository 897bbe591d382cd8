"""Times two ways of doing one thing, in one process, in interleaved pairs.

    from interleaved import compare, machine_line      # a script's own folder is on its path

    comparison = compare(ours, baseline, pairs=7, warmup=2)
    print(machine_line())
    print(comparison.line("ours", "hand-written loop"))

`ours` and `baseline` take nothing and do the same amount of work. Each pair runs both, and which one goes first
changes from pair to pair, so that a machine that grows slower, or a cache that the first one warms, favours neither.
`comparison.ratio` is the median over the pairs of baseline time / our time: the speed of ours against the baseline's,
1.0 is equal, more is faster. A pair is compared within itself only, because a noisy neighbour hits both of a pair.

`prepare` runs before each timed call, outside the clock (a barrier between ranks, freeing memory, a fresh folder).
With several ranks call `compare` on all of them with equal arguments and let `prepare` be the barrier; each rank
measures for itself, and rank 0's figures are as good as any.
"""

import gc
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Comparison:
    """Seconds of each call, pair by pair, in the order they were measured."""

    ours_s: tuple[float, ...]
    baseline_s: tuple[float, ...]

    @property
    def ratios(self) -> tuple[float, ...]:
        """Speed of ours over the baseline's, one figure a pair."""
        return tuple(baseline / ours for ours, baseline in zip(self.ours_s, self.baseline_s, strict=True))

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)

    @property
    def spread(self) -> tuple[float, float]:
        """The lower and upper quartile of the ratios."""
        if len(self.ratios) < 2:
            return (self.ratio, self.ratio)
        lower, _, upper = statistics.quantiles(self.ratios, n=4, method="inclusive")
        return (lower, upper)

    @property
    def difference_s(self) -> float:
        """Median over the pairs of our time minus the baseline's: what ours adds to one call."""
        return statistics.median(a - b for a, b in zip(self.ours_s, self.baseline_s, strict=True))

    def line(self, ours: str = "ours", baseline: str = "baseline") -> str:
        lower, upper = self.spread
        return (
            f"{ours} / {baseline}: {self.ratio:.3f} of its speed (quartiles {lower:.3f} to {upper:.3f}, "
            f"{len(self.ratios)} pairs; median {_seconds(statistics.median(self.ours_s))} against "
            f"{_seconds(statistics.median(self.baseline_s))})"
        )


def compare(
    ours: Callable[[], object],
    baseline: Callable[[], object],
    *,
    pairs: int = 7,
    warmup: int = 1,
    prepare: Callable[[], object] | None = None,
) -> Comparison:
    """Run `warmup` pairs unmeasured and `pairs` measured ones; the garbage collector rests while the clock runs."""
    times: dict[bool, list[float]] = {True: [], False: []}
    for pair in range(-warmup, pairs):
        ours_first = pair % 2 == 0
        for is_ours in (ours_first, not ours_first):
            elapsed = _timed(ours if is_ours else baseline, prepare)
            if pair >= 0:
                times[is_ours].append(elapsed)
    return Comparison(tuple(times[True]), tuple(times[False]))


def _timed(call: Callable[[], object], prepare: Callable[[], object] | None) -> float:
    if prepare is not None:
        prepare()
    gc.collect()
    gc.disable()
    try:
        _finish_queued_work()
        start = time.perf_counter()
        call()
        _finish_queued_work()
        return time.perf_counter() - start
    finally:
        gc.enable()


def _finish_queued_work() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def machine_line() -> str:
    """What a figure depends on: processor, usable cores, threads, accelerator, versions."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parts = [
        _processor(),
        f"{cores} cores",
        f"{torch.get_num_threads()} threads",
        *([torch.cuda.get_device_name()] if torch.cuda.is_available() else []),
        f"torch {torch.__version__}",
        f"python {platform.python_version()}",
    ]
    return "machine: " + ", ".join(parts)


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:  # noqa: PTH123  (a device file, read line by line)
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def _seconds(value: float) -> str:
    return f"{value * 1e3:.2f} ms" if value < 1 else f"{value:.2f} s"
