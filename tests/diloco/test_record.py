"""Every round that is closed is one row, and a record that cannot be written stops no round."""

import asyncio
from collections import deque
from types import SimpleNamespace

import pytest

from forgather.diloco.record import RoundRecord
from forgather.errors import TrainingError
from forgather.metrics.sinks import JsonLines, read_rows
from tests.diloco.status_example import closed


class Rounds:
    """What the record sees of a coordinator that closes rounds when told to."""

    def __init__(self, step: int = 0) -> None:
        self.step = step
        self.history: deque = deque(maxlen=4)
        self.publisher = self
        self.stopped = asyncio.Event()
        self.said: list[str] = []
        self.run = SimpleNamespace(say=self.said.append)
        self._told = asyncio.Condition()

    async def until(self, condition, seconds):
        async with self._told:
            await asyncio.wait_for(self._told.wait_for(lambda: condition() or self.stopped.is_set()), 10)
        return condition()

    async def close(self, count: int = 1) -> None:
        for _ in range(count):
            self.history.append(closed(self.step))
            self.step += 1
        async with self._told:
            self._told.notify_all()

    async def stop(self) -> None:
        self.stopped.set()
        async with self._told:
            self._told.notify_all()


def follow(sinks, script, step: int = 0):
    """Runs `script` of a coordinator while a record follows it; what it has said."""

    async def run():
        rounds = Rounds(step)
        following = asyncio.create_task(RoundRecord(rounds, sinks).follow())
        await script(rounds)
        await rounds.stop()
        await following
        return rounds.said

    return asyncio.run(run())


def test_each_closed_round_is_a_row(tmp_path):
    async def script(rounds):
        await rounds.close()
        await asyncio.sleep(0.05)
        await rounds.close(2)

    assert follow([JsonLines(tmp_path / "metrics.jsonl")], script) == []
    rows = read_rows(tmp_path / "metrics.jsonl", "outer")
    assert [(row["step"], row["fragment"], row["version"]) for row in rows] == [(1, 0, 1), (2, 1, 1), (3, 0, 2)]
    assert rows[1]["contribution_norm"] == closed(1)["norm"]
    assert rows[1]["num_workers"] == 2


def test_a_server_that_goes_on_from_an_older_state_makes_its_rows_again(tmp_path):
    path = tmp_path / "metrics.jsonl"

    async def two(rounds):
        await rounds.close(2)

    follow([JsonLines(path)], two, step=1)
    follow([JsonLines(path)], two, step=2)
    assert [row["step"] for row in read_rows(path, "outer")] == [2, 3, 4]


def test_rounds_go_on_without_a_sink_that_fails(tmp_path):
    class Full:
        written = 0

        def start(self, step):
            pass

        def write(self, step, metrics, kind="train"):
            self.written += 1
            raise TrainingError("the disk is full")

        def close(self):
            raise AssertionError("it was let go of")

    async def script(rounds):
        await rounds.close()
        await asyncio.sleep(0.05)
        await rounds.close()

    full = Full()
    said = follow([full, JsonLines(tmp_path / "metrics.jsonl")], script)
    assert said == ["warning: the disk is full; rounds go on without Full"]
    assert full.written == 1
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 2


@pytest.mark.parametrize("count", [1, 4, 9])
def test_what_was_not_seen_in_time_has_its_right_step(tmp_path, count):
    async def script(rounds):
        await rounds.close(count)  # of which the last 4 are remembered

    follow([JsonLines(tmp_path / "metrics.jsonl")], script, step=10)
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(10 + max(1, count - 3), 11 + count))
