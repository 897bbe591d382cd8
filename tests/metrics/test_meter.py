"""A window of steps: token-weighted loss, one collective, a clock without evaluation, and a cost under 0.2 ms."""

import math
import time
import warnings

import pytest
import torch
import torch.distributed as dist

from forgather.metrics import meter as meter_module
from forgather.metrics.clock import ActivityClock
from forgather.metrics.meter import Meter
from forgather.metrics.step_result import StepResult
from tests.ranks import RankPool

CPU = torch.device("cpu")


def step(
    loss_sum: float, num_targets: int, *, tokens: int = 100, grad_norm: float = 1.0, lr: float = 0.1
) -> StepResult:
    return StepResult(torch.tensor(loss_sum), torch.tensor(num_targets), torch.tensor(grad_norm), lr, tokens)


class FakeTime:
    """A clock that moves only when told."""

    def __init__(self, monkeypatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def pass_s(self, seconds: float) -> None:
        self.now += seconds


def test_loss_is_the_mean_over_the_target_tokens_of_the_window():
    meter = Meter(CPU)
    meter.start()
    meter.add(step(4.0, 30))
    meter.add(step(2.0, 10, grad_norm=3.5, lr=0.25))
    metrics = meter.flush(2)
    assert metrics["loss"] == (4.0 * 30 + 2.0 * 10) / 40
    assert metrics["grad_norm"] == 3.5
    assert metrics["lr"] == 0.25
    assert "mfu" not in metrics  # no peak is known for a CPU


def test_a_window_begins_anew_after_a_flush():
    meter = Meter(CPU)
    meter.start()
    meter.add(step(4.0, 30))
    meter.flush(1)
    meter.add(step(1.0, 5))
    assert meter.flush(2)["loss"] == 1.0


def test_counts_may_be_plain_numbers():
    meter = Meter(CPU)
    meter.start()
    meter.add(StepResult(torch.tensor(2.0), 7, torch.tensor(1.0), 0.1, 7))
    assert meter.flush(1)["loss"] == 2.0


def test_a_loss_that_is_no_number_is_reported_as_it_is():
    meter = Meter(CPU)
    meter.start()
    meter.add(step(float("nan"), 30))
    assert math.isnan(meter.flush(1)["loss"])
    meter.add(step(float("inf"), 30))
    assert meter.flush(2)["loss"] == float("inf")


def test_tokens_a_second_leave_out_pauses_and_what_came_before_the_start(monkeypatch):
    clock = FakeTime(monkeypatch)
    meter = Meter(CPU)
    clock.pass_s(50)  # compiling, loading
    meter.start()
    with meter.doing("data_wait"):
        clock.pass_s(1)
    clock.pass_s(3)
    meter.add(step(1.0, 10, tokens=100))
    with meter.doing("evaluation"):
        clock.pass_s(20)
        with meter.doing("sampling"):  # a sample within an evaluation counts once
            clock.pass_s(5)
    clock.pass_s(4)
    meter.add(step(1.0, 10, tokens=300))
    metrics = meter.flush(2)
    assert metrics["tokens_per_s"] == 400 / 8
    assert metrics["step_s"] == 4.0
    assert metrics["data_wait_s"] == 0.5


def test_a_pause_ends_with_an_error_too(monkeypatch):
    clock = FakeTime(monkeypatch)
    running = ActivityClock(CPU)
    running.turn_to("training")

    def fail() -> None:
        with running.doing("evaluation"):
            clock.pass_s(5)
            raise ValueError("evaluation")

    with pytest.raises(ValueError, match="evaluation"):
        fail()
    clock.pass_s(2)
    assert running.seconds()["training"] == 2


def test_mfu_is_the_share_of_the_peak(monkeypatch):
    clock = FakeTime(monkeypatch)
    monkeypatch.setattr(meter_module, "peak_flops", lambda device: 1e6)
    meter = Meter(CPU, flops_per_token=2_000)
    meter.start()
    clock.pass_s(2)
    meter.add(step(1.0, 10, tokens=500))
    assert meter.flush(1)["mfu"] == pytest.approx(2_000 * 250 / 1e6)


def test_peak_memory_is_that_of_this_process():
    meter = Meter(CPU)
    meter.start()
    meter.add(step(1.0, 1))
    assert 50e6 < meter.flush(1)["peak_memory_bytes"] < 50e9


def test_a_step_without_a_log_costs_under_a_fifth_of_a_millisecond():
    meter = Meter(CPU)
    meter.start()
    result = step(1.0, 10)
    for _ in range(100):
        meter.add(result)
    costs = []
    for _ in range(500):
        start = time.perf_counter()
        with meter.doing("data_wait"):
            pass
        meter.add(result)
        costs.append(time.perf_counter() - start)
    assert sorted(costs)[len(costs) // 2] < 0.2e-3


@pytest.fixture(scope="module")
def two_ranks():
    with RankPool(2) as pool:
        yield pool


def flush_on_a_rank() -> tuple[dict[str, float], int, float]:
    calls = 0
    gather = dist.all_gather_single

    def counted(*args, **kwargs):
        nonlocal calls
        calls += 1
        return gather(*args, **kwargs)

    dist.all_gather_single = counted
    warnings.simplefilter("error")  # what torch deprecates would be said at each log step, by each rank
    try:
        rank = dist.get_rank()
        meter = Meter(CPU)
        meter.start()
        # Each rank holds its share of the sums; the number of targets is that of the whole batch.
        meter.add(step(3.0 if rank == 0 else 1.0, 30, tokens=100))
        meter.add(step(0.5 if rank == 0 else 1.5, 10, tokens=50 + rank))
        with meter.doing("data_wait"):
            time.sleep(0.05 * rank)
        return meter.flush(2), calls, meter.ledger.seconds()["data_wait"]
    finally:
        warnings.resetwarnings()
        dist.all_gather_single = gather


def test_two_ranks_agree_after_one_collective(two_ranks):
    (first, calls, waited), (second, _, _) = two_ranks.run(flush_on_a_rank)
    assert calls == 1
    assert first == second
    assert first["loss"] == (4.0 * 30 + 2.0 * 10) / 40
    assert first["data_wait_s"] >= 0.025  # the slower loader's 50 ms over two steps
    assert waited >= 0.05  # in the ledger of rank 0 too, which has not waited itself
    assert first["tokens_per_s"] * first["step_s"] * 2 == pytest.approx(301)
