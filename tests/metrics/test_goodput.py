"""The ledger adds up to the wall time, knows what a fault has cost, and outlives its process."""

import json
import time
from pathlib import Path

import pytest
import torch

from forgather.errors import TrainingError
from forgather.metrics.clock import ActivityClock
from forgather.metrics.goodput import Ledger


class FakeTime:
    """Both clocks of a machine, which move only when told."""

    def __init__(self, monkeypatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(time, "time", lambda: 1.7e9 + self.now)

    def pass_s(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch) -> FakeTime:
    return FakeTime(monkeypatch)


class Process:
    """A process of a run: what the loop tells the ledger, in made-up seconds."""

    def __init__(self, time: FakeTime, path: Path | None, start_up_s: float, useful_at_checkpoint: float | None = None):
        self.time = time
        self.clock = ActivityClock(torch.device("cpu"))
        self.ledger = Ledger(path)
        if useful_at_checkpoint is not None:
            self.ledger.load_state_dict({"useful_s": useful_at_checkpoint})
        time.pass_s(start_up_s)
        self.ledger.open(self.clock)
        self.clock.turn_to("training")

    def step(self, seconds: float, count: int = 1) -> "Process":
        for _ in range(count):
            self.time.pass_s(seconds)
            self.ledger.step_made()
        return self

    def do(self, activity, seconds: float) -> "Process":
        with self.clock.doing(activity):
            self.time.pass_s(seconds)
        return self

    def spent(self) -> dict[str, float]:
        return {name: round(s, 6) for name, s in self.ledger.seconds().items() if round(s, 6)}


def test_every_second_has_one_place(clock):
    began = clock.now
    run = Process(clock, None, start_up_s=5).step(2, 3).do("data_wait", 1).do("evaluation", 4)
    with run.clock.doing("evaluation"):
        clock.pass_s(1)
        run.do("sampling", 3)  # within an evaluation: it counts once
    run.do("checkpoint", 0.5).do("inspection", 0.25)
    expected = {"useful": 6, "start_up": 5, "data_wait": 1, "evaluation": 5, "sampling": 3}
    assert run.spent() == expected | {"checkpoint": 0.5, "inspection": 0.25}
    assert sum(run.spent().values()) == clock.now - began
    assert run.ledger.goodput == pytest.approx(6 / 20.75)


def test_what_the_first_two_steps_take_longer_than_the_third_is_start_up(clock):
    run = Process(clock, None, start_up_s=1).step(30).step(12)
    assert run.spent() == {"useful": 42, "start_up": 1}  # not known yet
    run.step(2, 3)
    assert run.spent() == {"useful": 10, "start_up": 1 + 28 + 10}
    assert Process(clock, None, start_up_s=1).step(1, 2).step(2, 3).spent() == {"useful": 8, "start_up": 1}


def test_a_fault_moves_the_lost_steps_to_redo_and_counts_the_time_without_a_process(clock, tmp_path):
    path = tmp_path / "logs" / "goodput.json"
    began = clock.now
    first = Process(clock, path, start_up_s=5).step(2, 5)
    saved = first.ledger.state_dict()
    assert saved == {"useful_s": 10}
    first.do("checkpoint", 1).step(2, 3)
    clock.pass_s(0.4)  # the step in which it is killed
    clock.pass_s(60)

    second = Process(clock, path, start_up_s=5, useful_at_checkpoint=saved["useful_s"]).step(2, 4)
    expected = {"useful": 10 + 8, "start_up": 10, "checkpoint": 1, "redo": 6, "down": 60.4}
    assert second.spent() == expected
    assert sum(second.spent().values()) == pytest.approx(clock.now - began)
    assert second.ledger.summary()["processes"] == 2

    # A second fault at once: what was useful before the first checkpoint still is.
    third = Process(clock, path, start_up_s=1, useful_at_checkpoint=saved["useful_s"])
    assert third.spent()["useful"] == 10
    assert third.spent()["redo"] == 6 + 8
    assert sum(third.spent().values()) == pytest.approx(clock.now - began)


def test_without_a_checkpoint_everything_is_made_again(clock, tmp_path):
    path = tmp_path / "goodput.json"
    Process(clock, path, start_up_s=5).step(2, 5)
    assert Process(clock, path, start_up_s=5).spent() == {"start_up": 10, "redo": 10}


def test_the_time_after_an_orderly_end_is_no_loss(clock, tmp_path, monkeypatch):
    path = tmp_path / "goodput.json"
    first = Process(clock, path, start_up_s=5).step(2, 5)
    first.ledger.write(is_orderly_end=True)
    clock.pass_s(200_000)  # a weekend
    second = Process(clock, path, start_up_s=5, useful_at_checkpoint=10)
    assert second.spent() == {"useful": 10, "start_up": 10}
    second.ledger.write(is_orderly_end=True)
    clock.pass_s(3)
    # torchrun stops the survivors of a fault in good order before it starts all again.
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert Process(clock, path, start_up_s=5, useful_at_checkpoint=10).spent()["down"] == 3


def test_another_ranks_slower_loader_is_data_wait(clock):
    run = Process(clock, None, start_up_s=1).step(2, 5).do("data_wait", 1)
    run.ledger.waited_longer(3)
    assert run.spent() == {"useful": 7, "start_up": 1, "data_wait": 4}


def test_the_file_is_written_at_most_every_second(clock, tmp_path):
    path = tmp_path / "goodput.json"
    run = Process(clock, path, start_up_s=1)
    seen = set()
    for _ in range(50):
        run.step(0.1)
        seen.add(path.read_text())
    assert 4 <= len(seen) <= 6


def test_the_line_names_the_losses_by_size(clock):
    run = Process(clock, None, start_up_s=10).step(2, 40).do("data_wait", 2).do("checkpoint", 8)
    assert run.ledger.describe() == "goodput 80.0% of 0:01:40: start up 10.0%, checkpoint 8.0%, data wait 2.0%"


def test_an_account_that_cannot_be_read_is_refused(clock, tmp_path):
    path = tmp_path / "goodput.json"
    path.write_text('{"began": 1.')
    with pytest.raises(TrainingError, match=r"cannot read the account of the run's time") as error:
        Process(clock, path, start_up_s=1)
    assert "remove" in error.value.fix


def test_a_process_may_count_from_its_birth(tmp_path):
    ledger = Ledger(tmp_path / "goodput.json")
    ledger.count_from_birth()
    ledger.open(ActivityClock(torch.device("cpu")))
    assert 0.1 < ledger.seconds()["start_up"] < 24 * 3600  # the tests' own process
    account = json.loads((tmp_path / "goodput.json").read_text())
    assert account["until"] - account["began"] == pytest.approx(ledger.seconds()["start_up"], abs=0.5)
