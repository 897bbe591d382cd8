"""A server that was stopped or killed at any moment goes on as if nothing had been.

A kill is a copy of the folder at that moment, on which another server is started: what a killed process leaves.
"""

import errno
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from forgather.checkpoint import background
from forgather.checkpoint.layout import read_layout
from forgather.checkpoint.run_folder import RunFolder
from forgather.checkpoint.state import TrainState
from forgather.checkpoint.storage import read_tensor
from forgather.checkpoint.store import CheckpointStore
from forgather.cli.main import main
from forgather.diloco import journal, publisher, server_state
from forgather.diloco.fragment_values import FragmentValues
from forgather.diloco.journal import Journal, Made
from forgather.diloco.messages import Version
from forgather.diloco.outer import DelayedNesterov, Nesterov
from forgather.diloco.settings import Settings
from forgather.errors import CheckpointError, ForgatherError
from tests.diloco.running_server import RunningServer, running_server, settings_of
from tests.diloco.speaking import Reply, Speaker, ask, whole
from tests.diloco.test_server import HELD, come, one, until, values

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture(autouse=True)
def retried_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publisher, "RETRY_S", 0.02)


def difference(worker: str, round: int) -> dict[str, Tensor]:
    return {name: 0.1 * value for name, value in values(100 * ord(worker) + round).items()}


def rounds(workers: Sequence[Speaker], numbers: range, fragments: Sequence[Sequence[str]]) -> None:
    """All workers contribute to these rounds of all fragments, each of which is waited for."""
    for round in numbers:
        for number, names in enumerate(fragments):
            for worker in workers:
                mine = {name: difference(worker.name, round)[name] for name in names}
                assert worker.contribute(round, mine, fragment=number, upload="bf16").json["state"] in (
                    "held",
                    "counted",
                )
            mine = {name: values(0)[name] for name in names}
            workers[0].taken(mine, whole(mine), at_least=round + 1, fragment=number)


def state(server: RunningServer) -> dict[str, Any]:
    """Everything that decides how it goes on."""

    def look() -> dict[str, Any]:
        coordinator = server.coordinator
        tensors = {f"outer {key}": value.clone() for key, value in coordinator.outer.state_tensors().items()}
        for fragment in coordinator.fragments:
            for name in fragment.master:
                tensors[f"master {name}"] = fragment.master[name].clone()
                tensors[f"published {name}"] = fragment.published[name].clone()
        said = coordinator.rounds.state_dict()
        return {"tensors": tensors, "rounds": said, "versions": [each.version for each in coordinator.fragments]}

    return server.call(look)


def require_equal(one: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    assert one["versions"] == other["versions"]
    assert one["rounds"] == other["rounds"]
    assert one["tensors"].keys() == other["tensors"].keys()
    for name, value in one["tensors"].items():
        assert torch.equal(value, other["tensors"][name]), name


FRAGMENTS = [["a.weight", "a.bias"], ["b.weight"]]


def settings(download: str = "int4", **others: Any) -> Settings:
    return settings_of(values(0), FRAGMENTS, upload="bf16", download=download, **others)


@pytest.mark.parametrize("download", ["fp32", "int4"])
def test_stopped_and_started_again_it_goes_on_as_if_it_had_not_been(tmp_path: Path, download: str) -> None:
    with running_server(tmp_path / "one", values(0), settings(download), Nesterov(), num_workers=2) as server:
        rounds(come(server, "a", "b"), range(4), FRAGMENTS)
        expected = state(server)
    for part in (range(2), range(2, 4)):
        # What it is started with is not what it goes on with.
        first = values(0 if part[0] == 0 else 99)
        with running_server(tmp_path / "two", first, settings(download), Nesterov(), num_workers=2) as server:
            rounds(come(server, "a", "b"), part, FRAGMENTS)
            found = state(server)
            history = server.status()["history"]
    require_equal(found, expected)
    assert [each["version"] for each in history if each["fragment"] == 0] == [1, 2, 3, 4]


def test_the_change_to_the_last_version_can_still_be_sent_after_a_restart(tmp_path: Path) -> None:
    with running_server(tmp_path, values(0), settings_of(values(0), download="int8")) as server:
        worker = come(server, "a")[0]
        before = server.coordinator.fragments[0].version
        worker.contribute(0, values(1))
        _, held = worker.taken(values(0), whole(values(0)), at_least=1, have=before)
    with running_server(tmp_path, values(0), settings_of(values(0), download="int8")) as server:
        answer = Speaker(server, "a").values(whole(values(0)), have=before)
        assert not isinstance(answer, Reply)
        assert answer[0].content == "change"
        _, again = Speaker(server, "a").taken(values(0), whole(values(0)), have=before)
        for name, value in held.items():
            assert torch.equal(value, again[name])


@contextmanager
def killed_at(moment: str, folder: Path, copy: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Within the block the server's folder is copied at this moment of its first round, for the first time."""

    is_copied = threading.Event()

    def snapshot() -> None:
        if not is_copied.is_set():
            shutil.copytree(folder, copy)
            is_copied.set()

    if moment == "before the outer step":
        step = Nesterov.step

        def stepping(self: Nesterov, name: str, master: Tensor, mean: Tensor) -> None:
            snapshot()
            step(self, name, master, mean)

        monkeypatch.setattr(Nesterov, "step", stepping)
    elif moment in ("while it saves", "saved"):
        commit = background.commit

        def committing(*arguments: Any) -> list[str]:
            if moment == "while it saves":
                snapshot()
            said = commit(*arguments)
            snapshot()
            return said

        monkeypatch.setattr(background, "commit", committing)
    else:
        move = FragmentValues.move

        def moving(self: FragmentValues) -> None:
            snapshot()
            move(self)

        monkeypatch.setattr(FragmentValues, "move", moving)
    yield
    assert is_copied.wait(20)  # it saves while workers go on
    monkeypatch.undo()
    monkeypatch.setattr(publisher, "RETRY_S", 0.02)


@pytest.mark.parametrize("download", ["fp32", "int4"])
@pytest.mark.parametrize(
    "moment", ["before the outer step", "written down and not published", "while it saves", "saved"]
)
def test_killed_at_any_moment_it_loses_nothing_and_counts_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, download: str
) -> None:
    said = settings_of(values(0), upload="bf16", download=download)
    names = [list(values(0))]
    with running_server(tmp_path / "one", values(0), said, Nesterov(), num_workers=2) as server:
        workers = come(server, "a", "b")
        with killed_at(moment, tmp_path / "one", tmp_path / "copy", monkeypatch):
            rounds(workers, range(1), names)
        rounds(workers, range(1, 3), names)
        expected = state(server)
    with running_server(tmp_path / "copy", values(0), said, Nesterov(), num_workers=2) as server:
        was_saved = moment == "saved"
        assert server.status()["versions"] == [int(was_saved)]
        # They do not know what became of what they sent, and send it again.
        workers = come(server, "a", "b")
        replies = [worker.contribute(0, difference(worker.name, 0), upload="bf16").json for worker in workers]
        assert [reply["state"] for reply in replies] == ["counted" if was_saved else "held"] * 2
        workers[0].taken(values(0), whole(values(0)), at_least=1)
        rounds(workers, range(1, 3), names)
        require_equal(state(server), expected)


class TestSavingEveryFewVersions:
    def test_the_rounds_since_are_made_again_with_the_same_contributions(self, tmp_path: Path) -> None:
        said = settings_of(values(0), upload="bf16", download="int4")
        with running_server(
            tmp_path / "one", values(0), said, Nesterov(), num_workers=2, save_every=3, round_timeout_s=0.05
        ) as server:
            a, b = come(server, "a", "b")
            rounds([a, b], range(3), [list(values(0))])
            until(lambda: server.status()["durable"] == [3])
            rounds([b], range(3, 4), [list(values(0))])  # a is late, by more than the deadline
            rounds([a, b], range(4, 5), [list(values(0))])
            assert server.status()["durable"] == [3]
            shutil.copytree(tmp_path / "one", tmp_path / "copy")
            expected = state(server)
        with running_server(
            tmp_path / "copy", values(0), said, Nesterov(), num_workers=2, save_every=3, round_timeout_s=0.05
        ) as server:
            assert server.status()["versions"] == [3]
            a, b = come(server, "a", "b")
            # a is not one of those that made version 4; c not of any: they wait, and are then told what is open.
            replies: list[Reply] = []
            threads = [
                threading.Thread(
                    target=lambda each=each: replies.append(each.contribute(3, difference("c", 3), upload="bf16"))
                )
                for each in (a, come(server, "c")[0])
            ]
            for thread in threads:
                thread.start()
            reply = b.contribute(4, difference("b", 4), upload="bf16")
            assert (reply.status, reply.json["open"][0]) == (409, 3)  # what it sent before is wanted first
            assert b.contribute(3, difference("b", 3), upload="bf16").json == HELD
            b.taken(values(0), whole(values(0)), at_least=4)
            assert a.contribute(4, difference("a", 4), upload="bf16").json == HELD
            assert b.contribute(4, difference("b", 4), upload="bf16").json == HELD
            b.taken(values(0), whole(values(0)), at_least=5)
            for thread in threads:
                thread.join(20)
            assert sorted(each.json["open"][0] for each in replies) in ([4, 5], [5, 5])
            found = state(server)
            for each in (found, expected):
                del each["rounds"]["expected"]  # c is here now
            require_equal(found, expected)

    def test_what_is_still_to_be_made_again_survives_another_restart(self, tmp_path: Path) -> None:
        arguments: dict[str, Any] = {"num_workers": 2, "save_every": 100}
        with running_server(tmp_path / "one", one(0.0), **arguments) as server:
            a, b = come(server, "a", "b")
            for worker in (a, b):
                worker.contribute(0, one(1.0))
            a.taken(one(0.0), whole(one(0.0)), at_least=1)
            shutil.copytree(tmp_path / "one", tmp_path / "copy")
            version = server.coordinator.fragments[0].version
        with running_server(tmp_path / "copy", one(0.0), **arguments):
            pass
        with running_server(tmp_path / "copy", one(0.0), **arguments) as server:
            a, b, c = come(server, "a", "b", "c")
            a.contribute(0, one(1.0))
            assert server.status()["held"][0]["expected"] == ["a", "b"]
            b.contribute(0, one(1.0))
            assert c.taken(one(0.0), whole(one(0.0)), at_least=1)[0] == version

    def test_a_save_on_the_way_keeps_what_is_still_to_be_made_again(self, tmp_path: Path) -> None:
        arguments: dict[str, Any] = {"num_workers": 2, "round_timeout_s": 0.05}
        with running_server(tmp_path / "one", one(0.0), save_every=100, **arguments) as server:
            a, b = come(server, "a", "b")
            for worker in (a, b):
                worker.contribute(0, one(1.0))
            b.taken(one(0.0), whole(one(0.0)), at_least=1)
            b.contribute(1, one(1.0))  # a is late, by more than the deadline
            b.taken(one(0.0), whole(one(0.0)), at_least=2)
            version = server.coordinator.fragments[0].version
            shutil.copytree(tmp_path / "one", tmp_path / "copy")
        with running_server(tmp_path / "copy", one(0.0), save_every=1, **arguments) as server:
            for worker in come(server, "a", "b"):
                worker.contribute(0, one(1.0))
            until(lambda: server.status()["durable"] == [1])
            shutil.copytree(tmp_path / "copy", tmp_path / "again")
        with running_server(tmp_path / "again", one(0.0), save_every=1, **arguments) as server:
            a, b = come(server, "a", "b")
            asking = threading.Thread(target=lambda: a.contribute(1, one(9.0)))
            asking.start()
            time.sleep(0.1)
            assert b.contribute(1, one(1.0)).json == HELD
            b.taken(one(0.0), whole(one(0.0)), at_least=2)
            asking.join(20)
            assert server.coordinator.fragments[0].version == version

    def test_an_asynchronous_servers_arrivals_come_in_the_same_order(self, tmp_path: Path) -> None:
        said = settings_of(values(0), upload="bf16", mode="async")
        arguments: dict[str, Any] = {"num_workers": 2, "save_every": 100}
        with running_server(tmp_path / "one", values(0), said, DelayedNesterov(every=2), **arguments) as server:
            a, b = come(server, "a", "b")
            for number, (worker, round) in enumerate([(a, 0), (b, 0), (a, 2), (a, 3)]):
                worker.contribute(round, difference(worker.name, round), upload="bf16")
                worker.taken(values(0), whole(values(0)), at_least=number + 1)
            shutil.copytree(tmp_path / "one", tmp_path / "copy")
            expected = state(server)
        with running_server(tmp_path / "copy", values(0), said, DelayedNesterov(every=2), **arguments) as server:
            a, b = come(server, "a", "b")
            a.contribute(0, difference("a", 0), upload="bf16")
            for worker, round, number in ((b, 0, 1), (a, 2, 2), (a, 3, 3)):
                worker.taken(values(0), whole(values(0)), at_least=number)
                assert worker.contribute(round, difference(worker.name, round), upload="bf16").json == HELD
            a.taken(values(0), whole(values(0)), at_least=4)
            require_equal(state(server), expected)

    def test_a_save_by_hand_makes_all_durable_and_a_stop_does_too(self, tmp_path: Path) -> None:
        with running_server(tmp_path, one(0.0), save_every=100) as server:
            worker = come(server, "a")[0]
            worker.contribute(0, one(1.0))
            worker.taken(one(0.0), whole(one(0.0)), at_least=1)
            assert server.status()["durable"] == [0]
            answer = worker.values(whole(one(0.0)))
            assert not isinstance(answer, Reply)
            assert answer[0].durable == 0
            assert ask(server, "POST", "/v1/control/save").json == {"step": 1}
            assert server.status()["durable"] == [1]
            worker.contribute(1, one(1.0))
            worker.taken(one(0.0), whole(one(0.0)), at_least=2)
        with running_server(tmp_path, one(0.0), save_every=100) as server:
            assert server.status()["versions"] == [2]


def made(*contributors: tuple[str, int], lr: float = 0.7) -> Made:
    return Made(list(contributors), {"lr": lr})


class TestJournal:
    def test_it_has_what_a_state_lacks_in_order(self, tmp_path: Path) -> None:
        journal = Journal(tmp_path / "journal")
        versions = [Version(2, "x"), Version(0, "y")]
        assert journal.after(versions) == [[], []]
        for fragment, number, who in ((0, 2, "old"), (0, 3, "a"), (1, 1, "b"), (0, 4, "c")):
            journal.add(fragment, Version(number, "z"), made((who, number - 1)))
        assert journal.after(versions) == [[made(("a", 2)), made(("c", 3))], [made(("b", 0))]]
        journal.clear(journal.size())
        assert journal.after(versions) == [[], []]

    @pytest.mark.parametrize("is_long", [False, True])
    def test_what_came_after_a_save_had_begun_stays_when_that_is_on_the_disk(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_long: bool
    ) -> None:
        if is_long:
            monkeypatch.setattr(journal, "_LONG", 8)
        there = Journal(tmp_path / "journal")
        assert there.size() == 0
        there.add(0, Version(1, "z"), made(("a", 0)))
        size = there.size()
        there.add(0, Version(2, "z"), made(("b", 1)))
        there.add_rates({"lr": 0.5})
        there.clear(size)
        assert there.path.read_bytes().count(b"\n") == (2 if is_long else 3)
        assert there.after([Version(1, "z")]) == [[made(("b", 1))]]
        assert there.rates == {"lr": 0.5}
        there.add(0, Version(3, "z"), made(("c", 2)))
        assert there.after([Version(1, "z")]) == [[made(("b", 1)), made(("c", 2))]]
        assert [path.name for path in tmp_path.iterdir()] == ["journal"]

    def test_rates_that_a_checkpoint_has_do_not_stay(self, tmp_path: Path) -> None:
        there = Journal(tmp_path / "journal")
        there.add_rates({"lr": 0.5})
        size = there.size()
        there.add(0, Version(1, "z"), made(("a", 0)))
        there.clear(size)
        assert there.after([Version(0, "")]) == [[made(("a", 0))]]
        assert there.rates is None

    def test_a_line_that_a_killed_server_has_not_finished_is_cut_off_so_that_others_can_follow(
        self, tmp_path: Path
    ) -> None:
        journal = Journal(tmp_path / "journal")
        journal.add(0, Version(1, "z"), made(("a", 0)))
        with journal.path.open("ab") as file:
            file.write(b"[0, [5, ")
        assert journal.after([Version(0, "")]) == [[made(("a", 0))]]
        journal.add(0, Version(2, "z"), made(("a", 1)))
        assert journal.after([Version(0, "")]) == [[made(("a", 0)), made(("a", 1))]]

    def test_rounds_that_were_made_again_as_they_were_change_nothing_and_others_end_what_came_after(
        self, tmp_path: Path
    ) -> None:
        journal = Journal(tmp_path / "journal")
        for number, who in ((1, "a"), (2, "b"), (1, "a")):
            journal.add(0, Version(number, "z"), made((who, number - 1)))
        assert journal.after([Version(0, "")]) == [[made(("a", 0)), made(("b", 1))]]
        journal.add(0, Version(1, "z"), made(("c", 0)))
        assert journal.after([Version(0, "")]) == [[made(("c", 0))]]

    def test_a_line_that_is_none_is_told(self, tmp_path: Path) -> None:
        (tmp_path / "journal").write_text("nonsense\n")
        with pytest.raises(CheckpointError, match="is damaged"):
            Journal(tmp_path / "journal").after([Version(0, "")])

    def test_a_line_that_the_disk_did_not_take_is_not_there(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        journal = Journal(tmp_path / "journal")
        journal.add(0, Version(1, "z"), made(("a", 0)))

        def full(descriptor: int) -> None:
            raise FULL

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            journal.add(0, Version(2, "z"), made(("a", 1)))
        assert journal.after([Version(0, "")]) == [[made(("a", 0))]]


def test_what_can_be_seen_of_a_version_that_is_not_published_is_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record takes rows of the history by the number of versions: a row too early would be one too many."""
    is_writing, go_on = threading.Event(), threading.Event()
    add = Journal.add

    def slowly(self: Journal, *arguments: Any) -> None:
        is_writing.set()
        assert go_on.wait(20)
        add(self, *arguments)

    monkeypatch.setattr(Journal, "add", slowly)
    with running_server(tmp_path, one(0.0)) as server:
        worker = come(server, "a")[0]
        worker.contribute(0, one(1.0))
        assert is_writing.wait(10)
        status = server.status()
        assert (status["versions"], status["history"]) == ([0], [])
        go_on.set()
        worker.taken(one(0.0), whole(one(0.0)), at_least=1)
        assert [each["version"] for each in server.status()["history"]] == [1]


def test_what_somebody_made_who_has_left_is_saved_at_once(tmp_path: Path) -> None:
    with running_server(tmp_path, one(0.0), num_workers=2, save_every=100) as server:
        a, b = come(server, "a", "b")
        b.contribute(0, one(1.0))
        b.leave()
        a.contribute(0, one(1.0))
        until(lambda: server.status()["durable"] == [1])
        a.contribute(1, one(1.0))
        a.taken(one(0.0), whole(one(0.0)), at_least=2)
        assert server.status()["durable"] == [1]  # whoever is there can bring it again


class TestRatesThatAnOperatorHasSet:
    def test_versions_are_made_again_with_the_rates_that_they_had(self, tmp_path: Path) -> None:
        arguments: dict[str, Any] = {"save_every": 100}
        with running_server(tmp_path / "one", one(0.0), outer=Nesterov(), **arguments) as server:
            worker = come(server, "a")[0]
            for round, rate in enumerate((0.5, 0.25, 0.125)):
                if round == 2:
                    shutil.copytree(tmp_path / "one", tmp_path / "copy")
                assert ask(server, "POST", "/v1/control/set", {"outer_lr": rate}).status == 200
                worker.contribute(round, one(1.0))
                worker.taken(one(0.0), whole(one(0.0)), at_least=round + 1)
                if round == 1:
                    version = server.coordinator.fragments[0].version
                    expected = server.published("w")
        with running_server(tmp_path / "copy", one(0.0), outer=Nesterov(), **arguments) as server:
            worker = come(server, "a")[0]
            for round in range(2):
                assert worker.contribute(round, one(1.0)).json == HELD
                again, held = worker.taken(one(0.0), whole(one(0.0)), at_least=round + 1)
            assert again == version
            assert torch.equal(held["w"], expected)
            assert server.coordinator.outer.lr == 0.25  # type: ignore[attr-defined]  # from here on

    def test_they_hold_also_where_nothing_was_made_with_them(self, tmp_path: Path) -> None:
        with running_server(tmp_path / "one", one(0.0), outer=Nesterov()) as server:
            worker = come(server, "a")[0]
            worker.contribute(0, one(1.0))
            until(lambda: server.status()["durable"] == [1])
            ask(server, "POST", "/v1/control/set", {"outer_lr": 0.5, "outer_momentum": 0.0})
            ask(server, "POST", "/v1/control/save")  # there is nothing new
        shutil.copytree(tmp_path / "one", tmp_path / "copy")
        for folder in ("one", "copy"):
            with running_server(tmp_path / folder, one(0.0), outer=Nesterov()) as server:
                assert server.coordinator.publisher.rates.in_force == {"lr": 0.5, "momentum": 0.0}

    def test_they_hold_after_a_restart_until_the_flags_say_something_else(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with running_server(tmp_path, one(0.0), outer=Nesterov()) as server:
            ask(server, "POST", "/v1/control/set", {"outer_lr": 0.5, "outer_momentum": 0.0})
            worker = come(server, "a")[0]
            worker.contribute(0, one(1.0))
            worker.taken(one(0.0), whole(one(0.0)), at_least=1)
        for _ in range(2):
            with running_server(tmp_path, one(0.0), outer=Nesterov()) as server:
                assert server.coordinator.publisher.rates.in_force == {"lr": 0.5, "momentum": 0.0}
            assert "outer_lr is 0.5, as it was set; the flag says 0.7" in capsys.readouterr().err
        with running_server(tmp_path, one(0.0), outer=Nesterov(0.6)) as server:
            assert server.coordinator.publisher.rates.in_force == {"lr": 0.6, "momentum": 0.9}
        said = capsys.readouterr().err
        assert "the outer optimizer is SGD, lr 0.6, Nesterov momentum 0.9; it was averaging, lr 0.5" in said


@contextmanager
def slow_disk(
    monkeypatch: pytest.MonkeyPatch, *, one_by_one: bool = False
) -> Iterator[tuple[threading.Event, threading.Event, list[OSError]]]:
    """A save has been read, and reaches the disk when the second event is set; the first says that it waits for that.

    What is in the list is then raised instead, one for each save. With `one_by_one` the event lets one save go on.
    """
    is_waiting, go_on, refusals = threading.Event(), threading.Event(), list[OSError]()
    is_over = False
    writes = background.write_part

    def slowly(*arguments: Any) -> None:
        *others, taken = arguments

        def taken_and_wait() -> None:
            taken()
            is_waiting.set()
            assert go_on.wait(20)
            if one_by_one and not is_over:
                go_on.clear()
            if refusals:
                raise refusals.pop()

        writes(*others, taken_and_wait)

    monkeypatch.setattr(background, "write_part", slowly)
    try:
        yield is_waiting, go_on, refusals
    finally:
        is_over = True
        go_on.set()


class TestSlowDisk:
    """A save brings to the disk what it has read, while versions of other fragments, and the next of this, are made."""

    NAMES = (["a.weight", "a.bias"], ["b.weight"])
    SAID = settings_of(values(0), NAMES, upload="bf16", download="bf16")

    def bring(self, worker: Speaker, fragment: int, round: int) -> None:
        mine = {name: difference(worker.name, round)[name] for name in self.NAMES[fragment]}
        worker.contribute(round, mine, fragment=fragment, upload="bf16")

    def contribute(self, worker: Speaker, fragment: int, round: int) -> None:
        self.bring(worker, fragment, round)
        mine = {name: values(0)[name] for name in self.NAMES[fragment]}
        worker.taken(mine, whole(mine), at_least=round + 1, fragment=fragment)

    def begin_to_save(self, worker: Speaker, is_waiting: threading.Event) -> None:
        """The first version of each fragment."""
        self.contribute(worker, 0, 0)
        self.contribute(worker, 1, 0)
        assert is_waiting.wait(20)

    def test_the_next_outer_steps_do_not_wait_for_it_and_the_next_save_does(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with running_server(tmp_path / "one", values(0), self.SAID, Nesterov(), save_every=2) as server:
            worker = come(server, "a")[0]
            with slow_disk(monkeypatch) as (is_waiting, go_on, _):
                self.begin_to_save(worker, is_waiting)
                self.contribute(worker, 0, 1)
                assert server.status()["versions"] == [2, 1]
                assert server.status()["durable"] == [0, 0]
                shutil.copytree(tmp_path / "one", tmp_path / "within")
                self.contribute(worker, 1, 1)  # a save is due again
                time.sleep(0.05)
                assert server.status()["durable"] == [0, 0]
                self.bring(worker, 0, 2)
                time.sleep(0.05)
                assert server.status()["versions"] == [2, 2]  # it waits, and so does what would be made after it
                go_on.set()
                until(lambda: server.status()["durable"] == [2, 2])
            until(lambda: server.status()["versions"] == [3, 2])
            shutil.copytree(tmp_path / "one", tmp_path / "after")
            expected = state(server)
        for folder, kept in (("within", ((0, 0), (1, 0), (0, 1), (1, 1), (0, 2))), ("after", ((0, 2),))):
            with running_server(tmp_path / folder, values(0), self.SAID, Nesterov(), save_every=2) as server:
                worker = come(server, "a")[0]
                for fragment, round in kept:
                    self.contribute(worker, fragment, round)
                require_equal(state(server), expected)

    def test_the_journal_keeps_what_it_does_not_have(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(journal, "_LONG", 8)
        lines = tmp_path / "journal.jsonl"

        def versions() -> list[list[int]]:
            return [[line[0], line[1][0]] for line in map(json.loads, lines.read_text().splitlines())]

        with running_server(tmp_path, values(0), self.SAID, Nesterov(), save_every=2) as server:
            worker = come(server, "a")[0]
            with slow_disk(monkeypatch) as (is_waiting, go_on, _):
                self.begin_to_save(worker, is_waiting)
                self.contribute(worker, 0, 1)
                assert versions() == [[0, 1], [1, 1], [0, 2]]
                go_on.set()
                until(lambda: server.status()["durable"] == [1, 1])
                assert versions() == [[0, 2]]
            assert ask(server, "POST", "/v1/control/save").json == {"step": 3}
            assert not lines.exists()

    def test_others_than_had_made_it_do_not_make_what_came_after_it(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A lost line would let the worker that was late come in."""
        said = settings_of(one(0.0), upload="bf16")
        arguments: dict[str, Any] = {"num_workers": 2, "save_every": 1, "round_timeout_s": 0.05}
        with running_server(tmp_path / "one", one(0.0), said, Nesterov(), **arguments) as server:
            a, b = come(server, "a", "b")
            with slow_disk(monkeypatch, one_by_one=True) as (is_waiting, go_on, _):
                for worker in (a, b):
                    worker.contribute(0, one(1.0), upload="bf16")
                assert is_waiting.wait(20)
                b.contribute(1, one(2.0), upload="bf16")
                b.taken(one(0.0), whole(one(0.0)), at_least=2)  # after the deadline
                version = server.coordinator.fragments[0].version
                go_on.set()
                until(lambda: server.status()["durable"][0] == 1)
                # The second save would take the line out of the journal that says who made version 2.
                shutil.copytree(tmp_path / "one", tmp_path / "copy", ignore=shutil.ignore_patterns("*step-00000002*"))
        with running_server(tmp_path / "copy", one(0.0), said, Nesterov(), **arguments) as server:
            assert server.status()["versions"] == [1]
            a, b = come(server, "a", "b")
            asking = threading.Thread(target=lambda: a.contribute(1, one(9.0), upload="bf16"))
            asking.start()
            time.sleep(0.1)
            assert b.contribute(1, one(2.0), upload="bf16").json == HELD
            b.taken(one(0.0), whole(one(0.0)), at_least=2)
            asking.join(20)
            assert server.coordinator.fragments[0].version == version

    def test_one_that_is_refused_after_it_was_read_is_made_again_with_what_came_since(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with running_server(tmp_path / "one", values(0), self.SAID, Nesterov(), save_every=2) as server:
            worker = come(server, "a")[0]
            with slow_disk(monkeypatch) as (is_waiting, go_on, refusals):
                refusals += [FULL, FULL, FULL]
                self.begin_to_save(worker, is_waiting)
                self.contribute(worker, 0, 1)
                shutil.copytree(tmp_path / "one", tmp_path / "within")
                go_on.set()
                until(lambda: server.status()["durable"] == [2, 1])
            assert not refusals
            assert server.status()["trouble"] is None
            expected = state(server)
        assert capsys.readouterr().err.count("trying again every") == 2  # for the state of each step once
        for folder in ("one", "within"):
            with running_server(tmp_path / folder, values(0), self.SAID, Nesterov(), save_every=2) as server:
                worker = come(server, "a")[0]
                for fragment, round in ((0, 0), (1, 0), (0, 1)) if folder == "within" else ():
                    self.contribute(worker, fragment, round)
                require_equal(state(server), expected)

    def test_after_it_was_refused_no_version_is_made_before_it_is_on_the_disk(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with running_server(tmp_path, values(0), self.SAID, Nesterov(), save_every=2) as server:
            worker = come(server, "a")[0]
            with slow_disk(monkeypatch) as (is_waiting, go_on, refusals):
                refusals.append(FULL)
                self.begin_to_save(worker, is_waiting)
                is_waiting.clear()
                go_on.set()
                until(lambda: not refusals)
                go_on.clear()
                assert is_waiting.wait(20)  # once more, and all wait for it
                self.bring(worker, 0, 1)
                time.sleep(0.05)
                assert server.status()["versions"] == [1, 1]
                go_on.set()
                until(lambda: server.status()["versions"] == [2, 1])
            assert server.status()["durable"] == [1, 1]

    def test_a_save_by_hand_hears_of_it_and_does_not_keep_versions_waiting(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with running_server(tmp_path, values(0), self.SAID, Nesterov(), save_every=2) as server:
            worker = come(server, "a")[0]
            replies: list[Reply] = []
            with slow_disk(monkeypatch) as (is_waiting, go_on, refusals):
                self.begin_to_save(worker, is_waiting)
                saving = threading.Thread(target=lambda: replies.append(ask(server, "POST", "/v1/control/save")))
                saving.start()
                time.sleep(0.05)
                self.contribute(worker, 0, 1)
                is_waiting.clear()
                go_on.set()
                saving.join(20)
                assert replies.pop().json == {"step": 3}
                refusals.append(FULL)
                self.contribute(worker, 1, 1)
                reply = ask(server, "POST", "/v1/control/save")
                assert reply.status == 507
                assert "No space left" in reply.json["error"]
            until(lambda: server.status()["durable"] == [2, 2])
            assert server.status()["trouble"] is None

    def test_what_else_goes_wrong_with_it_ends_the_server(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def broken(*arguments: Any) -> None:
            arguments[-1]()
            raise ForgatherError("its name may be lost")

        with running_server(
            tmp_path, values(0), self.SAID, Nesterov(), save_every=2, ends_with=ForgatherError
        ) as server:
            worker = come(server, "a")[0]
            monkeypatch.setattr(background, "write_part", broken)
            self.contribute(worker, 0, 0)
            self.contribute(worker, 1, 0)
            until(server.coordinator.stopped.is_set)
            assert "its name may be lost" in (server.coordinator.trouble or "")

    def test_a_stop_tells_that_what_was_not_saved_will_not_be(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with slow_disk(monkeypatch) as (_, go_on, refusals):
            go_on.set()
            with running_server(
                tmp_path, values(0), self.SAID, Nesterov(), save_every=100, ends_with=CheckpointError
            ) as server:
                worker = come(server, "a")[0]
                self.contribute(worker, 0, 0)
                refusals.append(FULL)


class TestFullDisk:
    @contextmanager
    def failing(self, monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> Iterator[Callable[[], None]]:
        """`module.name` finds the disk full until the function that is given is called."""
        works = getattr(module, name)
        is_full = True

        def tried(*arguments: Any, **named: Any) -> Any:
            if is_full:
                raise FULL
            return works(*arguments, **named)

        def freed() -> None:
            nonlocal is_full
            is_full = False

        monkeypatch.setattr(module, name, tried)
        yield freed

    def test_while_it_cannot_write_who_made_a_version_nobody_hears_of_it_and_all_else_goes_on(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        said = settings_of(one(0.0), download="bf16")
        with running_server(tmp_path, one(0.0), said) as server:
            worker = come(server, "a")[0]
            with self.failing(monkeypatch, Journal, "add") as freed:
                worker.contribute(0, one(1.0))
                until(lambda: "No space left" in (server.status()["trouble"] or ""))
                assert worker.beat().status == 200
                assert server.status()["versions"] == [0]
                _, held = worker.taken(one(5.0), whole(one(0.0)))
                assert torch.equal(held["w"], torch.zeros(3))
                reply = ask(server, "POST", "/v1/control/save")
                assert reply.status == 507
                assert "No space left" in reply.json["error"]
                assert worker.contribute(0, one(1.0)).json == HELD
                freed()
                version, held = worker.taken(one(0.0), whole(one(0.0)), at_least=1)
            assert version.number == 1
            assert torch.equal(held["w"], torch.full((3,), -1.0))
            assert server.status()["trouble"] is None

    def test_while_it_cannot_save_workers_have_the_version_and_it_is_not_durable(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with running_server(tmp_path, one(0.0)) as server:
            worker = come(server, "a")[0]
            with self.failing(monkeypatch, background, "write_part") as freed:
                worker.contribute(0, one(1.0))
                version, held = worker.taken(one(0.0), whole(one(0.0)), at_least=1)
                assert version.number == 1
                assert torch.equal(held["w"], torch.full((3,), -1.0))
                until(lambda: "No space left" in (server.status()["trouble"] or ""))
                assert server.status()["durable"] == [0]  # the worker keeps what it has sent
                assert ask(server, "POST", "/v1/control/save").status == 507
                assert worker.contribute(1, one(1.0)).json == HELD
                assert server.status()["versions"] == [1]  # the next outer step waits for the disk
                freed()
                worker.taken(one(0.0), whole(one(0.0)), at_least=2)
            until(lambda: server.status()["durable"] == [2])
            assert server.status()["trouble"] is None

    def test_a_server_that_cannot_save_can_be_ended(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with running_server(tmp_path, one(0.0)) as server:
            worker = come(server, "a")[0]
            with self.failing(monkeypatch, background, "write_part"):
                worker.contribute(0, one(1.0))
                until(lambda: server.status()["trouble"] is not None)
                server.loop.call_soon_threadsafe(server.coordinator.shutdown)
                until(server.coordinator.stopped.is_set)
        with running_server(tmp_path, one(0.0)) as server:
            assert server.status()["versions"] == [0]  # the contribution is with the worker
            assert Speaker(server, "a").register().status == 200
            assert Speaker(server, "a").contribute(0, one(1.0)).json == HELD

    def test_a_contribution_for_which_there_is_no_room_is_refused_and_may_come_again(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with running_server(tmp_path, one(0.0), spool_bytes=0) as server:
            worker = come(server, "a")[0]
            with self.failing(monkeypatch, os, "posix_fallocate") as freed:
                reply = worker.contribute(0, one(1.0))
                assert reply.status == 507
                assert "disk is full" in reply.json["error"]
                assert "disk is full" in server.status()["trouble"]
                freed()
                assert worker.contribute(0, one(1.0)).json == HELD
                assert server.status()["trouble"] is None


def test_its_folder_is_a_run_that_can_be_verified_and_holds_the_model_that_workers_have(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "config.json").write_text("{}")
    constants = {"cache": torch.arange(4)}
    run = tmp_path / "run"
    said = settings_of(values(0), download="bf16")
    with running_server(run, values(0), said, Nesterov(), package=package, constants=constants) as server:
        worker = come(server, "a")[0]
        worker.contribute(0, values(1))
        _, taken = worker.taken(values(0), whole(values(0)), at_least=1)
    folder = run / "checkpoints" / "step-00000001"
    layout = read_layout(folder)
    for name, value in (taken | constants).items():
        assert torch.equal(read_tensor(folder, layout, f"model/{name}"), value)
    # What the codec has lost is still in the master values, so they are others here.
    assert not all(
        torch.equal(read_tensor(folder, layout, f"extras/diloco/master/{name}"), taken[name]) for name in taken
    )
    assert (folder / "package" / "config.json").read_text() == "{}"
    for verb in ("ls", "verify", "inspect"):
        assert main(["checkpoint", verb, str(run)]) == 0
    assert "whole" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("others", "named"),
    [
        ({"download": "int8"}, "int4 download"),
        ({"fragments": [list(values(0))]}, "fragments"),
        ({"mode": "async"}, "sync mode"),
    ],
)
def test_a_folder_of_a_server_with_other_settings_is_refused(
    tmp_path: Path, others: dict[str, Any], named: str
) -> None:
    with running_server(tmp_path, values(0), settings()):
        pass
    said = {"fragments": FRAGMENTS, "download": "int4", "upload": "bf16"} | others
    fragments = said.pop("fragments")
    with (
        pytest.raises(CheckpointError, match=named),
        running_server(tmp_path, values(0), settings_of(values(0), fragments, **said)),
    ):
        pass


def test_a_folder_of_another_format_is_refused_with_a_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as before:
        before.setattr(server_state, "FORMAT", 1)
        with running_server(tmp_path, one(0.0)):
            pass
    with pytest.raises(CheckpointError, match="has format 1") as refused, running_server(tmp_path, one(0.0)):
        pass
    assert "forgather export" in str(refused.value.fix)


@pytest.mark.parametrize("extras", [{}, {"diloco": {}}, {"diloco": {"worker": "alpha", "steps": 3}}])
def test_a_folder_of_a_training_run_is_none_of_a_server(tmp_path: Path, extras: dict[str, Any]) -> None:
    class Extra:
        def __init__(self, state: dict[str, Any]) -> None:
            self.state_dict = lambda: state

    model = torch.nn.Linear(2, 2)
    with RunFolder(tmp_path) as run, CheckpointStore(run, asynchronous=False) as store:
        said = {name: Extra(state) for name, state in extras.items()}
        store.save(TrainState(model, torch.optim.SGD(model.parameters()), said), 1)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="of a training run") as refused, running_server(tmp_path, one(0.0)):
        pass
    assert "-o DIR" in str(refused.value.fix)


def test_after_a_restart_all_are_to_say_that_they_are_there_and_their_names_are_theirs(tmp_path: Path) -> None:
    with running_server(tmp_path, one(0.0)) as server:
        worker = come(server, "a")[0]
        assert worker.register(data="d1").status == 200
        worker.contribute(0, one(1.0))
        worker.taken(one(0.0), whole(one(0.0)), at_least=1)
    with running_server(tmp_path, one(0.0)) as server:
        assert Speaker(server, "a", "another-key-0123456789").register().status == 409
        worker = Speaker(server, "a")
        assert worker.beat().status == 404
        assert worker.contribute(1, one(1.0)).status == 404
        registered = worker.register().json
        assert registered["settings"]["data"] == "d1"
        assert worker.contribute(0, one(1.0)).json["state"] == "counted"
        assert worker.contribute(1, one(1.0)).json == HELD


def test_work_units_are_leased_counted_and_survive(tmp_path: Path) -> None:
    said = settings_of(one(0.0), work_units=5)
    with running_server(tmp_path, one(0.0), said) as server:
        worker = come(server, "a")[0]

        def unit(sequence: int) -> Any:
            request = {"worker": "a", "sequence": sequence, "rows": 10, "order": "o", "at_least": 1, "held": []}
            return ask(server, "POST", "/v1/units", request, key=worker.key).json["leases"]

        first, second = unit(0), unit(1)
        assert (first, second) == ([[0, 2]], [[2, 4]])
        assert unit(0) == first
        worker.contribute(0, one(1.0), consumed={"0": 2})
        worker.taken(one(0.0), whole(one(0.0)), at_least=1)
        third, fourth = unit(2), unit(3)  # after the save
        until(lambda: server.status()["ledger"]["trained"] == 2)
        assert worker.contribute(1, one(1.0), consumed={"x": 2}).status == 422
    with running_server(tmp_path, one(0.0), said) as server:
        worker = come(server, "a")[0]
        assert server.status()["ledger"]["trained"] == 2
        assert unit(1) == second
        assert unit(3) == fourth
        assert unit(2) == third
    with running_server(tmp_path / "without", one(0.0)) as server:
        worker = come(server, "a")[0]
        assert ask(server, "POST", "/v1/units", {"worker": "a"}, key=worker.key).status == 422
        assert server.status()["ledger"] is None


@pytest.mark.parametrize("end", ["leaves", "dies", "is removed"])
def test_rows_in_a_contribution_that_waits_are_not_leased_again(tmp_path: Path, end: str) -> None:
    said = settings_of(one(0.0), work_units=5, lease_s=0.3 if end == "dies" else 30.0)

    def lease(worker: Speaker, sequence: int) -> Any:
        request = {"worker": worker.name, "sequence": sequence, "rows": 10, "order": "o", "at_least": 2, "held": []}
        return ask(worker.server, "POST", "/v1/units", request, key=worker.key).json["leases"]

    def goes(worker: Speaker) -> None:
        match end:
            case "leaves":
                worker.leave()
            case "dies":
                until(lambda: worker.server.status()["workers"][worker.name]["state"] == "dead")
            case "is removed":
                worker.server.call(lambda: worker.server.coordinator.controls.kick(worker.name))

    with running_server(tmp_path, one(0.0), said, num_workers=2) as server:
        first = come(server, "a")[0]
        assert [lease(first, 0), lease(first, 1)] == [[[0, 2]], [[2, 4]]]
        assert first.contribute(0, one(1.0), consumed={"0": 2}).json == HELD
        goes(first)
        second = come(server, "b")[0]
        begun = 0 if end == "is removed" else 2  # what it had brought goes with it, or counts
        assert lease(second, 0) == [[begun, begun + 2]]
        if end == "is removed":
            return
        assert second.contribute(0, one(1.0), consumed={"2": 2}).status == 200
        until(lambda: server.status()["ledger"]["trained"] == 4)
        assert server.status()["ledger"]["repeated"] == 0


def test_rows_in_a_contribution_that_was_lost_with_the_server_are_leased_again(tmp_path: Path) -> None:
    """In the state that is saved one worker has left; the other came later, and the server knows its leases alone."""
    both = one(0.0) | {"b": torch.zeros(2)}
    said = settings_of(both, [["w"], ["b"]], sync_every=2, work_units=5, lease_s=3.0)

    def lease(worker: Speaker) -> Any:
        request = {"worker": worker.name, "sequence": 0, "rows": 10, "order": "o", "at_least": 2, "held": []}
        return ask(worker.server, "POST", "/v1/units", request, key=worker.key).json["leases"]

    with running_server(tmp_path, both, said, num_workers=2) as server:
        first, other = come(server, "a", "b")
        assert lease(first) == [[0, 2]]
        assert first.contribute(0, one(1.0), consumed={"0": 1}).json == HELD
        assert first.contribute(0, {"b": torch.ones(2)}, fragment=1, consumed={"1": 1}).json == HELD
        first.leave()
        other.contribute(0, one(1.0))
        until(lambda: server.status()["durable"] == [1, 0])
        late = come(server, "c")[0]
        assert lease(late) == [[2, 4]]
    with running_server(tmp_path, both, said, num_workers=2) as server:
        assert server.status()["ledger"] | {"trained": 1, "taken_back": 1, "leased": 2} == server.status()["ledger"]
        until(lambda: server.status()["ledger"]["taken_back"] == 3)
        assert "c" not in server.status()["workers"]


def test_a_folder_of_another_model_is_refused_by_its_shapes(tmp_path: Path) -> None:
    with running_server(tmp_path, one(0.0)):
        pass
    larger = {name: torch.zeros(7, 3) for name in one(0.0)}
    is_told = pytest.raises(CheckpointError, match=r"another model: \w+ is .* there, and \[7, 3\]")
    with is_told as refused, running_server(tmp_path, larger):
        pass
    assert "-o DIR" in str(refused.value.fix)


def test_a_training_has_one_name_for_good(tmp_path: Path) -> None:
    unnamed = settings_of(one(0.0), training="")
    names = []
    for folder in ("one", "one", "other"):
        with running_server(tmp_path / folder, one(0.0), unnamed) as server:
            names.append(server.coordinator.settings.training)
    assert names[0] == names[1] != ""
    assert names[2] not in ("", names[0])


def test_half_an_outer_step_is_never_saved(tmp_path: Path) -> None:
    """Who waits for a save while a step fails would keep what has moved, and count what moved it again."""
    is_stepping, go_on = threading.Event(), threading.Event()

    class Failing(Nesterov):
        def step(self, name: str, master: Tensor, mean: Tensor) -> None:
            super().step(name, master, mean)
            if float(master.flatten()[0]) > 1.5 and name == "b":
                is_stepping.set()
                assert go_on.wait(20)
                raise MemoryError("no room for it")

    first = {"a": torch.zeros(3), "b": torch.zeros(3)}
    with running_server(tmp_path, first, outer=Failing(1.0, 0.0), save_every=4, ends_with=MemoryError) as server:
        worker = come(server, "a")[0]
        worker.contribute(0, {name: torch.full((3,), -1.0) for name in first})
        worker.taken(first, whole(first), at_least=1)
        worker.contribute(1, {name: torch.full((3,), -1.0) for name in first})
        assert is_stepping.wait(20)
        replies: list[Reply] = []
        saving = threading.Thread(target=lambda: replies.append(ask(server, "POST", "/v1/control/save")))
        saving.start()
        until(lambda: len(server.coordinator.publisher._lock._waiters or ()) > 0)
        go_on.set()
        saving.join(20)
        assert replies[0].status == 507
        assert "half of a version" in replies[0].json["error"]
    saved = tmp_path / "checkpoints" / "step-00000000"
    assert [path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.startswith("step")] == [saved.name]
    with running_server(tmp_path, first, outer=Nesterov(1.0, 0.0)) as server:
        assert server.status()["versions"] == [0]
        worker = Speaker(server, "a")
        worker.register()
        for round in range(2):  # the first is made again, and the second once
            worker.contribute(round, {name: torch.full((3,), -1.0) for name in first})
            worker.taken(first, whole(first), at_least=round + 1)
        for name in first:
            assert torch.equal(server.published(name), torch.full((3,), 2.0))
