"""The server over its wire: what workers bring becomes what all get, and what nobody should bring is refused."""

import json
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from forgather.checkpoint.store import CheckpointStore
from forgather.diloco.combine import Guard
from forgather.diloco.messages import Slice, Version, WantValues
from forgather.diloco.outer import DelayedNesterov, Nesterov
from forgather.errors import ConfigError
from tests.diloco.running_server import RunningServer, running_server, settings_of
from tests.diloco.speaking import NO_VERSION, Reply, Speaker, ask, body_of, whole

SHAPES = {"a.weight": (64, 48), "a.bias": (48,), "b.weight": (10, 30)}


def one(value: float) -> dict[str, Tensor]:
    return {"w": torch.full((3,), value)}


def values(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.01)


def come(server: RunningServer, *names: str) -> list[Speaker]:
    workers = [Speaker(server, name) for name in names]
    for worker in workers:
        assert worker.register().status == 200
    return workers


HELD = {"state": "held", "missing_parts": 0}


def test_the_mean_of_two_workers_becomes_the_values_of_both(tmp_path: Path) -> None:
    with running_server(tmp_path, one(0.0), num_workers=2) as server:
        workers = come(server, "a", "b")
        for worker, moved in zip(workers, (1.0, 3.0), strict=True):
            reply = worker.contribute(0, one(moved))
            assert reply.json == HELD
        for worker in workers:
            version, held = worker.taken(one(9.0), whole(one(0.0)), at_least=1)
            assert version.number == 1
            assert torch.equal(held["w"], torch.full((3,), -2.0))
        until(lambda: server.status()["durable"] == [1])  # it is saved while workers go on
        status = server.status()
        assert status["versions"] == [1]
        assert status["history"][0]["workers"] == ["a", "b"]
        assert status["workers"]["a"]["counted"] == 1
        assert status["workers"]["a"]["bytes_up"] > 12
        assert status["workers"]["a"]["bytes_down"] > 12


@pytest.mark.parametrize("spool_bytes", [None, 0], ids=["in memory", "in files"])
@pytest.mark.parametrize("download", ["fp32", "bf16", "int8", "int4"])
def test_all_that_hold_the_values_have_them_bit_for_bit(tmp_path: Path, download: str, spool_bytes: int | None) -> None:
    """One worker is one process, one has rows on its ranks, one columns, and one comes late."""
    rows = [
        [Slice("a.weight", (0, 0), (32, 48)), Slice("a.bias", (0,), (24,)), Slice("b.weight", (0, 0), (5, 30))],
        [Slice("a.weight", (32, 0), (32, 48)), Slice("a.bias", (24,), (24,)), Slice("b.weight", (5, 0), (5, 30))],
    ]
    columns = [
        [Slice("a.weight", (0, 0), (64, 24)), *whole(values(0))[1:]],
        [Slice("a.weight", (0, 24), (64, 24))],
    ]
    settings = settings_of(values(0), download=download, upload="int8")
    with running_server(
        tmp_path, values(0), settings, Nesterov(0.7, 0.9), num_workers=3, spool_bytes=spool_bytes
    ) as server:
        ranks = {"one": [whole(values(0))], "rows": rows, "columns": columns}
        workers = dict(zip(ranks, come(server, *ranks), strict=True))
        anchors = {name: values(0) for name in ranks}
        version = server.coordinator.fragments[0].version
        for round in range(3):
            for number, (name, parts) in enumerate(ranks.items()):
                difference = {key: 0.1 * each for key, each in values(10 * round + number + 1).items()}
                for part, slices in enumerate(parts):
                    reply = workers[name].contribute(
                        round, difference, part=part, slices=slices, upload="int8", parts=len(parts), base=version
                    )
                    assert reply.json == {"state": "held", "missing_parts": len(parts) - part - 1}
            for name, parts in ranks.items():
                for slices in parts:
                    now, anchors[name] = workers[name].taken(anchors[name], slices, at_least=round + 1, have=version)
            version = now
        latecomer = come(server, "late")[0]
        _, anchors["late"] = latecomer.taken(values(5), whole(values(0)))
        for anchor in anchors.values():
            for name in SHAPES:
                assert torch.equal(anchor[name], server.published(name))
        answer = workers["one"].values(whole(values(0)), have=version)
        assert not isinstance(answer, Reply)
        assert answer[0].content == "values"  # there is no change from the version that it has to that version
        assert server.status()["spool"] == {"memory_bytes": 0, "disk_bytes": 0}


def test_downward_goes_the_change_to_those_that_have_the_version_before(tmp_path: Path) -> None:
    with running_server(tmp_path, values(0), settings_of(values(0), download="int4")) as server:
        worker = come(server, "a")[0]
        before = server.coordinator.fragments[0].version
        worker.contribute(0, values(1))
        contents = {}
        for name, have in (("it", before), ("none", None), ("another", Version(0, "of other values"))):
            answer = worker.values(whole(values(0)), at_least=1, have=have)
            assert not isinstance(answer, Reply)
            contents[name] = (answer[0].content, len(answer[1]))
        elements = 64 * 48 + 48 + 300
        assert contents["none"] == contents["another"] == ("values", 4 * elements)
        assert contents["it"][0] == "change"
        assert contents["it"][1] < 0.6 * elements


@pytest.mark.training_case(80)
def test_one_worker_that_sends_values_trains_as_it_does_alone(tmp_path: Path) -> None:
    local = values(7)
    with running_server(tmp_path, values(0)) as server:
        worker = come(server, "a")[0]
        base = server.coordinator.fragments[0].version
        assert worker.contribute(0, local, content="values", base=base).json == HELD
        _, held = worker.taken(values(3), whole(local), at_least=1, have=base)
        for name, value in local.items():
            assert torch.equal(held[name], value)


@pytest.mark.training_case(77)
def test_a_contribution_whose_reply_was_lost_counts_once(tmp_path: Path) -> None:
    with running_server(tmp_path, one(0.0), num_workers=2) as server:
        a, b = come(server, "a", "b")
        for _ in range(3):
            assert a.contribute(0, one(1.0)).json == HELD
        b.contribute(0, one(1.0))
        version, _ = a.taken(one(0.0), whole(one(0.0)), at_least=1)
        for _ in range(2):
            assert a.contribute(0, one(1.0)).json["state"] == "counted"
        again, held = a.taken(one(0.0), whole(one(0.0)))
        assert again == version
        assert torch.equal(held["w"], torch.full((3,), -1.0))


def test_a_contribution_that_is_sent_anew_replaces_what_it_was(tmp_path: Path) -> None:
    with running_server(tmp_path, one(0.0), num_workers=2) as server:
        a, b = come(server, "a", "b")
        a.contribute(0, one(100.0), parts=2)  # the first part of a try that was ended
        a.contribute(0, one(50.0))
        a.contribute(0, one(1.0), tokens=3)
        b.contribute(0, one(5.0))
        _, held = a.taken(one(0.0), whole(one(0.0)), at_least=1)
        assert torch.equal(held["w"], torch.full((3,), -2.0))


@pytest.mark.training_case(79)
def test_a_late_contribution_is_neither_counted_twice_nor_thrown_away(tmp_path: Path) -> None:
    with running_server(tmp_path, one(0.0), num_workers=2, round_timeout_s=0.05) as server:
        a, b = come(server, "a", "b")
        a.contribute(0, one(1.0))
        version, _ = a.taken(one(0.0), whole(one(0.0)), at_least=1)
        reply = b.contribute(0, one(4.0))
        assert reply.status == 409
        assert reply.json["open"] == version.to_json()
        assert "differences for round 1" in reply.json["fix"]
        assert b.contribute(1, one(4.0), base=NO_VERSION).json == HELD
        _, held = b.taken(one(0.0), whole(one(0.0)), at_least=2)
        assert torch.equal(held["w"], torch.full((3,), -5.0))


def test_values_of_another_base_are_to_be_made_differences(tmp_path: Path) -> None:
    with running_server(tmp_path, one(0.0)) as server:
        worker = come(server, "a")[0]
        version = server.coordinator.fragments[0].version
        reply = worker.contribute(0, one(4.0), content="values", base=Version(0, "of other values"))
        assert reply.status == 409
        assert reply.json["open"] == version.to_json()


@pytest.mark.training_case(79)
def test_numbers_that_are_not_finite_harm_nobody(tmp_path: Path) -> None:
    with running_server(tmp_path, one(0.0), num_workers=2) as server:
        a, b = come(server, "a", "b")
        a.contribute(0, one(1.0))
        reply = b.contribute(0, one(float("nan")))
        assert reply.status == 422
        assert "w has numbers that are not finite" in reply.json["error"]
        assert server.status()["held"][0]["workers"] == ["a"]
        b.contribute(0, one(3.0))
        _, held = b.taken(one(0.0), whole(one(0.0)), at_least=1)
        assert torch.equal(held["w"], torch.full((3,), -2.0))
        assert server.status()["refused"] == 1


def test_a_torn_body_leaves_nothing(tmp_path: Path) -> None:
    with running_server(tmp_path, values(0)) as server:
        worker = come(server, "a")[0]
        header, payload = worker.message(values(1))
        body = body_of(header, payload)
        for sent in (2, 100, len(body) - 1):
            with socket.create_connection((server.host, server.port)) as connection:
                connection.sendall(put_head(worker, len(body)) + body[:sent])
        until(lambda: server.status()["spool"]["memory_bytes"] == 0)
        assert server.status()["held"][0]["workers"] == []
        assert worker.contribute(0, values(1)).json == HELD


def put_head(worker: Speaker, length: int) -> bytes:
    return (
        f"PUT /v1/contributions/{worker.name}/0/0/0 HTTP/1.1\r\nHost: server\r\nContent-Length: {length}\r\n"
        f"Authorization: Bearer {worker.server.token}\r\nX-Worker-Key: {worker.key}\r\n\r\n"
    ).encode()


def test_a_client_that_never_finishes_is_cut_and_others_go_on(tmp_path: Path) -> None:
    with running_server(tmp_path, values(0), serve={"idle_s": 0.2}) as server:
        worker = come(server, "a")[0]
        header, payload = worker.message(values(1))
        body = body_of(header, payload)
        with socket.create_connection((server.host, server.port), timeout=10) as connection:
            connection.sendall(put_head(worker, len(body)) + body[:-10])
            until(lambda: server.status()["spool"]["memory_bytes"] > 0)
            assert worker.beat().status == 200
            assert connection.recv(100).startswith(b"HTTP/1.1 408")
        assert server.status()["spool"]["memory_bytes"] == 0


def test_whoever_sends_a_part_again_is_not_kept_waiting_by_its_old_connection(tmp_path: Path) -> None:
    with running_server(tmp_path, values(0)) as server:
        worker = come(server, "a")[0]
        header, payload = worker.message(values(1))
        body = body_of(header, payload)
        with socket.create_connection((server.host, server.port), timeout=10) as connection:
            connection.sendall(put_head(worker, len(body)) + body[:-10])
            until(lambda: server.status()["spool"]["memory_bytes"] > 0)
            assert worker.contribute(0, values(1)).json == HELD
            worker.taken(values(0), whole(values(0)), at_least=1)
            connection.sendall(body[-10:])
            assert connection.recv(100).startswith(b"HTTP/1.1 409")
        assert server.status()["versions"] == [1]


def test_what_is_no_contribution_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with running_server(tmp_path, values(0)) as server:
        worker = come(server, "a")[0]
        header, payload = worker.message(values(1))
        good = body_of(header, payload)
        path = "/v1/contributions/a/0/0/0"
        cases = [
            (path, good[:-8], 422, "the payload has"),
            (path, good + bytes(8), 422, "the payload has"),
            (path, good[:-1] + b"\x55", 400, "digest"),
            (path, b"\xff" * 100, 413, "a header of"),
            (path, b"\x00\x00\x00\x05{nope" + payload, 400, "no JSON"),
            (path, b"\x00\x00\x00\x02{}" + payload, 400, "lacks something"),
            (path, b"\x00\x00", 400, "ends before its header"),
            ("/v1/contributions/a/0/3/0", good, 422, "no fragment 3"),
            ("/v1/contributions/a/0/0/1", good, 422, "no part 1 of 1"),
            ("/v1/contributions/a/7/0/0", good, 409, "round 7 is not open"),
            ("/v1/contributions/b/0/0/0", good, 404, "no worker 'b'"),
            (f"/v1/contributions/a/{10**30}/0/0", good, 422, "below 2**62"),
        ]
        for where, body, status, message in cases:
            reply = ask(server, "PUT", where, body, key=worker.key)
            assert (reply.status, message in reply.json["error"]) == (status, True), (where, body[:20], reply)
            assert reply.json["fix"] or status in (400, 413, 422)
        num_refused = sum(status in (400, 413, 422) for _, _, status, _ in cases)
        assert server.status()["refused"] == num_refused
        ask(server, "POST", "/v1/units", b"{}", key=worker.key)  # 422 too, and no contribution
        assert server.status()["refused"] == num_refused
        wrong_key = ask(server, "PUT", path, good, key="another-key-0123456789")
        assert wrong_key.status == 403
        assert server.status()["versions"] == [0]
        assert server.status()["spool"] == {"memory_bytes": 0, "disk_bytes": 0}
        assert torch.equal(server.published("a.weight"), values(0)["a.weight"])
        assert worker.contribute(0, values(1)).json == HELD


def test_slices_that_are_not_of_the_fragment_are_not_given_out(tmp_path: Path) -> None:
    with running_server(tmp_path, values(0)) as server:
        worker = come(server, "a")[0]
        for slices in ([Slice("c", (0,), (1,))], [Slice("a.bias", (40,), (9,))], whole(values(0)) * 2):
            reply = worker.values(slices)
            assert isinstance(reply, Reply)
            assert reply.status == 422
        reply = worker.values([], fragment=4)
        assert isinstance(reply, Reply)
        assert reply.status == 422


def test_values_are_waited_for_and_not_for_ever(tmp_path: Path) -> None:
    with running_server(tmp_path, one(0.0)) as server:
        worker = come(server, "a")[0]
        reply = worker.values(whole(one(0.0)), at_least=1, wait_s=0.05)
        assert isinstance(reply, Reply)
        assert reply.status == 204
        answers = []
        waiting = threading.Thread(target=lambda: answers.append(worker.taken(one(0.0), whole(one(0.0)), at_least=1)))
        waiting.start()
        worker.contribute(0, one(1.0))
        waiting.join(10)
        assert answers[0][0].number == 1


def test_without_the_token_nobody_learns_anything(tmp_path: Path) -> None:
    with running_server(tmp_path, one(0.0)) as server:
        for token in (None, "wrong", "token-of-the-test", "caf\u00e9"):
            stranger = RunningServer(server.host, server.port, token, server.coordinator, server.loop)
            for method, path in (
                ("GET", "/v1/status"),
                ("POST", "/v1/workers"),
                ("GET", "/nothing"),
                ("GET", "/v1/settings"),
            ):
                reply = ask(stranger, method, path, None if method == "GET" else {})
                assert (reply.status, reply.json) == (401, {"error": "unauthorized"})
    with running_server(tmp_path / "open", one(0.0), token=None) as server:
        assert ask(server, "GET", "/v1/status").status == 200


def test_the_same_name_twice_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    with running_server(tmp_path, one(0.0)) as server:
        first = come(server, "a")[0]
        second = Speaker(server, "a", "a-key-of-its-own-0123")
        reply = second.register()
        assert reply.status == 409
        assert "another key" in reply.json["error"]
        assert first.register().status == 200  # the same one may come again at once
        assert first.contribute(0, one(1.0)).json == HELD
        assert list(server.status()["workers"]) == ["a"]


def test_other_data_or_another_model_is_refused_by_name(tmp_path: Path) -> None:
    with running_server(tmp_path, one(0.0), settings_of(one(0.0), package="p1")) as server:
        assert Speaker(server, "a").register(package="p1", data="d1").status == 200  # who comes first says the data
        for others, named in (({"package": "p2"}, "package"), ({"data": "d2"}, "data")):
            reply = Speaker(server, "b").register(**others)
            assert reply.status == 422
            assert f"the {named} of b is" in reply.json["error"]
        assert Speaker(server, "c").register(package="p1", data="d1").json["settings"]["data"] == "d1"
        assert Speaker(server, "d").register().status == 200


def test_a_dead_worker_is_not_waited_for_and_may_come_back(tmp_path: Path) -> None:
    with running_server(tmp_path, one(0.0), settings_of(one(0.0), lease_s=0.3), num_workers=2) as server:
        a, b = come(server, "a", "b")
        a.contribute(0, one(1.0))
        until(lambda: a.beat().status == 200 and server.status()["versions"] == [1])
        assert server.status()["workers"]["b"]["state"] == "dead"
        assert b.beat().status == 404
        assert b.contribute(0, one(1.0)).status == 404
        assert b.register().json["versions"][0][0] == 1
        assert b.beat().status == 200


def test_heartbeats_and_status_are_answered_while_an_outer_step_is_made(tmp_path: Path) -> None:
    go_on = threading.Event()

    class Slow(Nesterov):
        def step(self, name: str, master: Tensor, mean: Tensor) -> None:
            assert go_on.wait(20)
            super().step(name, master, mean)

    with running_server(tmp_path, one(0.0), outer=Slow(1.0, 0.0), num_workers=2) as server:
        a, b = come(server, "a", "b")
        a.contribute(0, one(1.0))
        b.contribute(0, one(1.0))
        for _ in range(5):
            assert a.beat(steps=3, loss=2.5).status == 200
            status = ask(server, "GET", "/v1/status").json
            assert status["versions"] == [0]
        _, held = a.taken(one(5.0), whole(one(0.0)))  # the old values are still there
        assert torch.equal(held["w"], torch.zeros(3))
        assert a.contribute(0, one(1.0)).json == HELD  # a lost reply, again
        go_on.set()
        a.taken(one(0.0), whole(one(0.0)), at_least=1)
        assert server.status()["history"][0]["loss"] == 2.5


@pytest.mark.training_case(76)
def test_controls_say_what_is_wrong_with_them(tmp_path: Path) -> None:
    with running_server(tmp_path, one(0.0), num_workers=2, min_workers=2) as server:
        for action, body, status in (
            ("nothing", {}, 404),
            ("set", b"{not json", 400),
            ("kick", {"worker": "nobody"}, 404),
            ("kick", {}, 400),
            ("set", {"num_workers": 1}, 400),
            ("set", {}, 400),
            ("set", {"colour": 3}, 400),
            ("set", {"outer_lr": -1}, 400),
            ("set", {"outer_lr": "fast"}, 400),
            ("set", {"outer_lr": 0.5, "num_workers": 0}, 400),
            ("set", [1], 400),
            ("command", {"command": "dance"}, 400),
            ("command", {"command": "save", "worker": "nobody"}, 404),
        ):
            reply = ask(server, "POST", f"/v1/control/{action}", body)
            assert reply.status == status, (action, body, reply)
            assert reply.json["error"]
        assert server.coordinator.outer.lr == 1.0  # type: ignore[attr-defined]
        assert ask(server, "POST", "/v1/control/set", {"outer_lr": 0.5, "min_workers": 1}).status == 200
        assert server.coordinator.outer.lr == 0.5  # type: ignore[attr-defined]
        assert server.status()["min_workers"] == 1
        before = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
        assert ask(server, "POST", "/v1/control/save").json == {"step": 0}
        assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == before


def test_an_outer_optimizer_without_a_learning_rate_to_set_says_so(tmp_path: Path) -> None:
    class Fixed(Nesterov):
        def __init__(self) -> None:
            super().__init__()
            del self.lr

        def describe(self) -> str:
            return "fixed"

    with running_server(tmp_path, one(0.0), outer=Fixed()) as server:
        reply = ask(server, "POST", "/v1/control/set", {"outer_lr": 0.5})
        assert reply.status == 400
        assert "fixed has no lr" in reply.json["error"]


def test_a_kicked_workers_contribution_does_not_count_and_its_process_is_told_to_stop(tmp_path: Path) -> None:
    with running_server(tmp_path, one(0.0), num_workers=2) as server:
        a, b = come(server, "a", "b")
        b.contribute(0, one(100.0))
        assert ask(server, "POST", "/v1/control/kick", {"worker": "b"}).status == 200
        assert b.contribute(0, one(100.0)).status == 410
        assert b.register().status == 410
        assert b.beat().json["command"] == "stop"
        a.contribute(0, one(1.0))
        _, held = a.taken(one(0.0), whole(one(0.0)), at_least=1)
        assert torch.equal(held["w"], torch.full((3,), -1.0))


def test_commands_are_relayed_and_a_drained_server_ends_when_all_have_left(tmp_path: Path) -> None:
    with running_server(tmp_path, one(0.0), num_workers=2) as server:
        a, b = come(server, "a", "b")
        reply = ask(server, "POST", "/v1/control/command", {"command": "save", "worker": "b"})
        assert reply.json == {"workers": ["b"]}
        assert [a.beat().json["command"], b.beat().json["command"]] == [None, "save"]
        ask(server, "POST", "/v1/control/drain")
        assert server.status()["state"] == "draining"
        assert Speaker(server, "c").register().status == 503
        assert [a.beat().json["command"], b.beat().json["command"]] == ["drain", "drain"]
        a.contribute(0, one(1.0))  # what they have is still taken
        b.contribute(0, one(1.0))
        a.taken(one(0.0), whole(one(0.0)), at_least=1)
        assert a.leave().status == b.leave().status == 200
        until(server.coordinator.stopped.is_set)


def looks_of(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Grows each time that the server looks who is there, some times a second."""
    looks: list[None] = []
    expire = server.coordinator.members.expire

    def looking() -> list[str]:
        looks.append(None)
        return expire()

    monkeypatch.setattr(server.coordinator.members, "expire", looking)
    return looks


def test_a_drained_server_counts_what_has_come_before_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last worker leaves while others' contributions are still waiting for their turn."""
    go_on = threading.Event()

    class Slow(Nesterov):
        def step(self, name: str, master: Tensor, mean: Tensor) -> None:
            assert go_on.wait(20)
            super().step(name, master, mean)

    settings = settings_of(one(0.0), mode="async")
    with running_server(tmp_path, one(0.0), settings, Slow(1.0, 0.0), num_workers=3) as server:
        a, b = come(server, "a", "b")  # of the three that are awaited
        looks = looks_of(server, monkeypatch)
        for worker in (a, b):
            worker.contribute(0, one(1.0))
        ask(server, "POST", "/v1/control/drain")
        until(lambda: server.call(lambda: bool(server.coordinator.rounds.rounds[0].closing)))
        assert a.leave().status == b.leave().status == 200
        looked = len(looks)
        until(lambda: len(looks) > looked + 1)  # it has seen that all have left
        assert not server.coordinator.stopped.is_set()
        go_on.set()
        until(server.coordinator.stopped.is_set)
    with running_server(tmp_path, one(0.0), settings) as server:
        assert server.status()["versions"] == [2]


def test_while_a_server_drains_those_it_knows_may_come_back_and_are_told_and_others_may_not(tmp_path: Path) -> None:
    with running_server(tmp_path, one(0.0), settings_of(one(0.0), lease_s=0.4), num_workers=2) as server:
        a, b = come(server, "a", "b")
        until(lambda: a.beat().status == 200 and server.status()["workers"]["b"]["state"] == "dead")
        ask(server, "POST", "/v1/control/drain")
        assert Speaker(server, "c").register().status == 503
        assert Speaker(server, "b", "another-key-0123456789").register().status == 503
        assert b.register().status == 200
        assert b.beat(heard=0).json["command"] == "drain"
        assert b.leave().status == 200
        assert b.register().status == 503  # it has been told
        a.leave()
        until(server.coordinator.stopped.is_set)


def test_what_an_operator_removes_while_a_disk_is_waited_for_does_not_end_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_saving, go_on = threading.Event(), threading.Event()
    save = CheckpointStore.save

    def slowly(self: CheckpointStore, *arguments: object, **named: object) -> object:
        is_saving.set()
        assert go_on.wait(20)
        return save(self, *arguments, **named)  # type: ignore[arg-type]

    with running_server(tmp_path, one(0.0), num_workers=2) as server:
        a, b = come(server, "a", "b")
        monkeypatch.setattr(CheckpointStore, "save", slowly)
        a.contribute(0, one(1.0))
        saving = threading.Thread(target=lambda: ask(server, "POST", "/v1/control/save"))
        saving.start()
        assert is_saving.wait(10)
        b.contribute(0, one(5.0))  # the round is to be closed, and waits for the save
        ask(server, "POST", "/v1/control/kick", {"worker": "b"})
        go_on.set()
        saving.join(10)
        _, held = a.taken(one(0.0), whole(one(0.0)), at_least=1)
        assert torch.equal(held["w"], torch.full((3,), -1.0))
        assert server.status()["trouble"] is None


def test_a_version_waits_for_a_slow_answer_that_was_broken_off_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = {"w": torch.zeros(4 << 20)}  # more than the network keeps for one that does not read
    with running_server(tmp_path, large) as server:
        worker = come(server, "a")[0]
        want = WantValues(whole(large), 0).to_json()
        body = json.dumps(want).encode()

        def begin_to_read() -> socket.socket:
            connection = socket.create_connection((server.host, server.port), timeout=20)
            connection.sendall(
                f"POST /v1/values/0 HTTP/1.1\r\nHost: server\r\nContent-Length: {len(body)}\r\n"
                f"Authorization: Bearer {server.token}\r\nX-Worker-Key: {worker.key}\r\n\r\n".encode()
                + body
            )
            assert connection.recv(1) == b"H"
            return connection

        def rest_of(connection: socket.socket) -> int:
            length = 1
            with connection, suppress(ConnectionError):
                while data := connection.recv(1 << 20):
                    length += len(data)
                    if length > large["w"].nbytes:
                        break
            return length

        first = begin_to_read()
        worker.contribute(0, {"w": torch.ones(4 << 20)})
        until(lambda: server.status()["versions"] == [1])
        assert rest_of(first) < large["w"].nbytes
        second = begin_to_read()
        said: list[str] = []
        monkeypatch.setattr(server.coordinator.run, "say", said.append)
        looks = looks_of(server, monkeypatch)
        worker.contribute(1, {"w": torch.ones(4 << 20)})
        until(lambda: any("waits for up to 30 s, until a has" in words for words in said))
        looked = len(looks)
        until(lambda: len(looks) > looked + 1)
        assert server.status()["versions"] == [1]
        assert rest_of(second) > large["w"].nbytes
        until(lambda: server.status()["versions"] == [2])


@pytest.mark.training_case(69)
def test_an_asynchronous_server_applies_each_contribution_alone(tmp_path: Path) -> None:
    settings = settings_of(one(0.0), mode="async")
    with running_server(tmp_path, one(0.0), settings, num_workers=2, staleness=lambda _: 1.0) as server:
        w0, w1 = come(server, "w0", "w1")
        for round, (moved, expected) in enumerate(((1.0, -1.0), (2.0, -3.0))):
            assert w0.contribute(round, one(moved)).json == HELD
            _, held = w0.taken(one(0.0), whole(one(0.0)), at_least=round + 1)
            assert torch.equal(held["w"], torch.full((3,), expected))
        assert w0.contribute(1, one(2.0)).json["state"] == "counted"
        assert w1.contribute(0, one(0.5)).json == HELD  # it began with version 0
        _, held = w1.taken(one(0.0), whole(one(0.0)), at_least=3)
        assert torch.equal(held["w"], torch.full((3,), -3.5))
        assert server.status()["spool"] == {"memory_bytes": 0, "disk_bytes": 0}
        assert w1.contribute(0, one(0.5), content="values").status in (200, 422)
        assert w1.contribute(3, one(0.5), content="values").status == 422


def test_what_changes_nothing_on_an_asynchronous_server_cannot_be_set(tmp_path: Path) -> None:
    with running_server(tmp_path, one(0.0), settings_of(one(0.0), mode="async")) as server:
        for name in ("min_workers", "round_timeout_s"):
            reply = ask(server, "POST", "/v1/control/set", {"num_workers": 3, name: 2})
            assert (reply.status, f"{name} would change nothing" in reply.json["error"]) == (400, True)
        assert server.status()["num_workers"] == 1
        assert ask(server, "POST", "/v1/control/set", {"num_workers": 2, "outer_lr": 0.5}).status == 200
        assert server.status()["num_workers"] == 2


def test_what_is_stale_counts_less(tmp_path: Path) -> None:
    with running_server(tmp_path, one(0.0), settings_of(one(0.0), mode="async")) as server:
        a, b = come(server, "a", "b")
        for round in range(3):
            a.contribute(round, one(0.0))
            version, _ = a.taken(one(0.0), whole(one(0.0)), at_least=round + 1)
        b.contribute(0, one(1.0))  # three versions ago: 1 / sqrt(4)
        _, held = b.taken(one(0.0), whole(one(0.0)), at_least=version.number + 1)
        assert torch.equal(held["w"], torch.full((3,), -0.5))


@pytest.mark.training_case(70)
def test_delayed_nesterov_on_hand_computed_numbers(tmp_path: Path) -> None:
    settings = settings_of(one(0.0), mode="async")
    outer = DelayedNesterov(1.0, 0.9, every=3)
    with running_server(tmp_path, one(0.0), settings, outer) as server:
        worker = come(server, "a")[0]
        seen = []
        for round in range(3):
            worker.contribute(round, one(1.0))
            _, held = worker.taken(one(0.0), whole(one(0.0)), at_least=round + 1)
            seen.append(held["w"][0].item())
        assert seen == pytest.approx([-1 / 3, -2 / 3, -1.9])


@pytest.mark.training_case(71)
def test_slower_workers_make_fewer_steps_to_an_exchange(tmp_path: Path) -> None:
    speeds = {"a": 10.0, "b": 5.0, "c": 2.0, "d": 0.001}
    for dylu, expected in ((True, [500, 250, 100, 1]), (False, [500] * 4)):
        settings = settings_of(one(0.0), sync_every=500, dylu=dylu)
        with running_server(tmp_path / str(dylu), one(0.0), settings) as server:
            workers = come(server, *speeds)
            assert workers[2].beat().json["sync_every"] == 500  # nothing is known yet
            for worker in workers:
                worker.beat(steps_per_s=speeds[worker.name])
            assert [w.beat(steps_per_s=speeds[w.name]).json["sync_every"] for w in workers] == expected
    settings = settings_of(one(0.0), sync_every=500, round_seconds=60.0)
    with running_server(tmp_path / "seconds", one(0.0), settings) as server:
        worker = come(server, "a")[0]
        assert worker.beat(steps_per_s=2.5).json["sync_every"] == 150


def test_an_outlier_is_cut_down_where_settings_say_so(tmp_path: Path) -> None:
    with running_server(tmp_path, one(0.0), num_workers=3, guard=Guard("clip", 2.0)) as server:
        workers = come(server, "a", "b", "c")
        for worker, moved in zip(workers, (1.0, 1.0, 100.0), strict=True):
            worker.contribute(0, one(moved))
        _, held = workers[0].taken(one(0.0), whole(one(0.0)), at_least=1)
        torch.testing.assert_close(held["w"], torch.full((3,), -4 / 3))
        assert server.status()["history"][0]["clipped"] == ["c"]


def test_a_part_of_the_model_leaves_the_rest_untouched(tmp_path: Path) -> None:
    settings = settings_of(values(0), [["a.weight", "a.bias"], ["b.weight"]])
    with running_server(tmp_path, values(0), settings, Nesterov(0.5, 0.9)) as server:
        worker = come(server, "a")[0]
        mine = {"b.weight": values(1)["b.weight"]}
        assert worker.contribute(0, values(1), fragment=1).status == 422  # these are not its parameters
        assert worker.contribute(0, mine, fragment=1).json == HELD
        version, _ = worker.taken({"b.weight": values(0)["b.weight"]}, whole(mine), at_least=1, fragment=1)
        assert server.status()["versions"] == [0, 1]
        assert version.number == 1
        assert torch.equal(server.published("a.weight"), values(0)["a.weight"])
        assert not torch.equal(server.published("b.weight"), values(0)["b.weight"])
        assert list(server.coordinator.outer.state_tensors()) == ["b.weight.momentum"]


@pytest.mark.training_case(68)
def test_a_model_of_less_precision_is_kept_in_fp32(tmp_path: Path) -> None:
    half = {name: value.bfloat16() for name, value in values(0).items()}
    with running_server(tmp_path, half, settings_of(half)) as server:
        assert server.published("a.weight").dtype == torch.float32
        assert torch.equal(server.published("a.weight"), half["a.weight"].float())
    other = settings_of({"v": torch.zeros(1)})
    with pytest.raises(ConfigError, match="missing v; not wanted w"), running_server(tmp_path / "2", one(0.0), other):
        pass


def test_a_probe_counts_what_comes_and_sends_what_is_asked_for(tmp_path: Path) -> None:
    with running_server(tmp_path, one(0.0)) as server:
        assert ask(server, "POST", "/v1/probe", bytes(3_000_000)).json == {"received": 3_000_000}
        reply = ask(server, "POST", "/v1/probe?send=2500000", b"x")
        assert len(reply.body) == 2_500_000
        assert ask(server, "POST", f"/v1/probe?send={1 << 40}").status == 413
        assert ask(server, "POST", "/v1/probe?send=much").status == 400


def test_a_port_in_use_is_told(tmp_path: Path) -> None:
    import asyncio

    from forgather.diloco.application import serving

    async def serve_there(server: RunningServer) -> None:
        async with serving(server.coordinator, None, server.host, server.port):
            pass

    with running_server(tmp_path, one(0.0)) as server, pytest.raises(ConfigError, match="cannot listen on") as refused:
        asyncio.run(serve_there(server))
    assert "--port" in str(refused.value.fix)


def test_parts_of_a_worker_that_was_started_anew_do_not_go_with_those_of_before(tmp_path: Path) -> None:
    first = {"v": torch.zeros(2), "w": torch.zeros(3)}
    slices = {name: whole({name: value}) for name, value in first.items()}

    def bring(worker: Speaker, part: int, value: float, origin: str) -> Any:
        name = ("v", "w")[part]
        mine = {name: torch.full_like(first[name], value)}
        return worker.contribute(0, mine, part=part, slices=slices[name], parts=2, origin=origin).json

    with running_server(tmp_path, first, num_workers=2) as server:
        a, b = come(server, "a", "b")
        assert bring(a, 0, -1.0, "before")["missing_parts"] == 1
        assert bring(a, 1, -1.0, "before") == HELD
        # Killed and started again, its steps have made other numbers.
        assert bring(a, 0, -3.0, "after")["missing_parts"] == 1
        b.contribute(0, {name: torch.full_like(value, -3.0) for name, value in first.items()})
        assert server.status()["versions"] == [0]  # half of it is of before, so there is nothing to close
        assert bring(a, 1, -3.0, "after") == HELD
        a.taken(first, whole(first), at_least=1)
        for name, value in first.items():
            assert torch.equal(server.published(name), torch.full_like(value, 3.0))
