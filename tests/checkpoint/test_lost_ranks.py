"""A run that loses ranks or a host goes on by itself, and ends as if nothing had happened."""

import contextlib
import os
import random
import signal
import socket
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from forgather.metrics.sinks import read_rows
from tests.checkpoint.test_train_crash import Training, newest_tensors, project

__all__ = ["project"]  # a fixture

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(sys.platform != "linux", reason="finds the ranks in /proc"),
]
MOST_S = 6.0  # from the loss of a rank to the end of the next step


def wait_for(is_true: Callable[[], object], training: Training) -> None:
    end = time.monotonic() + 120
    while not is_true():
        assert training.process.is_alive(), training.said()
        assert time.monotonic() < end, training.said()
        time.sleep(0.005)


def rows(training: Training) -> list[dict[str, Any]]:
    """What was logged of each step; a step that is made again has its last row."""
    file = training.run / "logs" / "metrics.jsonl"
    return read_rows(file, "train") if file.exists() else []


def losses(training: Training) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in rows(training)}


def wait_for_steps(training: Training, number: int) -> None:
    """Return when so many steps have been logged from now on."""
    now = time.time()
    wait_for(lambda: sum(row["time"] > now for row in rows(training)) >= number, training)


def test_a_lost_rank_costs_seconds_and_nothing_else(project: Path) -> None:
    steps, kills = 200, 8
    calm = Training(project, "steady", steps, 2)
    assert calm.end() == 0, calm.said()
    training = Training(project, "lossy", steps, 2, ["--max-restarts", str(kills)])
    chance, restarts = random.Random(0), []
    for number in range(kills):
        wait_for_steps(training, 4)
        time.sleep(chance.uniform(0, 0.2))
        killed = time.monotonic()
        os.kill(chance.choice(training.ranks()), signal.SIGKILL)
        wait_for(lambda number=number: training.said().count("starting again") > number, training)
        wait_for_steps(training, 1)
        restarts.append(time.monotonic() - killed)
    assert training.end() == 0, training.said()
    print("restarts:", " ".join(f"{seconds:.1f}" for seconds in restarts), "s")
    assert newest_tensors(training.run) == newest_tensors(calm.run)
    assert statistics.median(restarts) < MOST_S


def test_a_lost_host_leaves_the_run_to_the_others(project: Path) -> None:
    """Two launchers on one host; what is left reads the samples that the two would have read."""
    steps = 150
    # What is dropped out is another thing on each number of ranks.
    no_chance = ["model_project.args.attention_dropout=0.0", "model_project.args.model_name=no_chance"]
    calm = Training(project, "together", steps, 2, no_chance)
    assert calm.end() == 0, calm.said()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{free.getsockname()[1]}"
    meeting = ["--nnodes", "1:2", "--rdzv-endpoint", place, "--max-restarts", "3", *no_chance]
    first = Training(project, "shrinking", steps, 1, meeting)
    time.sleep(1.0)  # the first of them keeps the meeting place
    second = Training(project, "shrinking", steps, 1, meeting)
    wait_for(lambda: len(losses(first)) > 20, first)
    assert "ranks: " not in first.said()
    with contextlib.suppress(ProcessLookupError):
        os.kill(second.process.pid, signal.SIGKILL)
    assert second.end() == -signal.SIGKILL
    assert first.end() == 0, first.said()
    assert "starting again" in first.said()
    assert "changed since then: ranks: 2 -> 1" in first.said()
    found, expected = losses(first), losses(calm)
    assert sorted(found) == sorted(expected) == list(range(1, steps + 1))
    assert found == pytest.approx(expected, rel=1e-5)
