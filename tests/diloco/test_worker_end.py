"""How a worker ends: with nothing unsent, nothing that hangs, and its last contribution on the server's disk."""

import asyncio
import threading
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from forgather.diloco import flights
from forgather.diloco.frame import ProtocolError
from forgather.errors import DistributedError, StoppedError
from tests.diloco.loops import address_of, equals_server, sgd, small_model, train, values_of, worker
from tests.diloco.running_server import RunningServer, running_server, settings_of
from tests.diloco.test_exchange import VALUES, Counter, published
from tests.diloco.test_worker import LAYERS, together, wait_for


def ended(body: Callable[[], object], seconds: float = 20.0) -> bool:
    """Whether it comes to its end by itself."""
    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()


def come(*counters: Counter) -> None:
    together(*(each.diloco.__enter__ for each in counters))


def part(*counters: Counter) -> None:
    for each in counters:
        each.diloco.__exit__(None, None, None)


def settings(**others):
    return settings_of(VALUES, **{"sync_every": 2, "heartbeat_s": 0.02} | others)


# What was learned since the last exchange


@pytest.mark.parametrize("fragments", [None, [LAYERS[0] + LAYERS[2], LAYERS[1] + LAYERS[3]]])
@pytest.mark.parametrize("delay", [0, 1])
def test_the_end_of_a_run_is_an_exchange_of_what_was_not_sent(tmp_path, fragments, delay):
    models = [small_model(), small_model()]
    values = values_of(models[0])

    def body(number: int, server: RunningServer) -> None:
        optimizer = sgd(models[number])
        with worker(models[number], optimizer, server, f"w{number}", tokens_per_step=10) as diloco:
            train(models[number], range(7), optimizer, slice(4 * number, 4 * number + 4))
            diloco.finish()

    chosen = settings_of(values, fragments, sync_every=4, delay=delay)
    with running_server(tmp_path, values, chosen, num_workers=2) as server:
        together(lambda: body(0, server), lambda: body(1, server))
        history = server.status()["history"]
        assert all(equals_server(model, server) for model in models)
    for number in range(len(fragments or [None])):
        assert sum(each["tokens"] for each in history if each["fragment"] == number) == 2 * 7 * 10


def test_a_run_of_fewer_steps_than_h_is_exchanged_all_the_same(tmp_path):
    model = small_model()
    values = values_of(model)
    with running_server(tmp_path, values, settings_of(values, sync_every=500)) as server:
        optimizer = sgd(model)
        with worker(model, optimizer, server) as diloco:
            train(model, range(3), optimizer)
            diloco.finish()
            diloco.finish()  # nothing is left to send
        assert server.status()["versions"] == [1]
        assert equals_server(model, server)


def test_steps_that_were_not_sent_are_said(tmp_path):
    with running_server(tmp_path, VALUES, settings()) as server:
        forgetful = Counter(address_of(server))
        come(forgetful)
        forgetful.step(3)
        part(forgetful)
        assert "note: the last 1 steps were not sent to the server; call finish() where a run ends" in forgetful.said
        careful = Counter(address_of(server), "careful")
        come(careful)
        careful.step(2)
        part(careful)
        assert not any("not sent" in text for text in careful.said)


def test_what_a_draining_server_is_sent_counts_and_nobody_hangs(tmp_path):
    """Both are within a cycle; the first to end does not wait for the other, which still counts with it."""
    with running_server(tmp_path, VALUES, settings(sync_every=100), num_workers=2) as server:
        a, b = (Counter(address_of(server), name, tokens_per_step=10) for name in "ab")
        come(a, b)
        a.step(3), b.step(5)
        server.call(server.coordinator.controls.drain)
        wait_for(lambda: a.diloco.wants_stop() and b.diloco.wants_stop())
        ending = SimpleNamespace(is_finished=False, is_stopping=False)
        together(lambda: a.diloco.on_ending(ending), lambda: b.diloco.on_ending(ending))
        assert (
            a.model.weight.item() == b.model.weight.item() == published(server) == -4.25
        )  # 3 and 5 weighed by themselves
        assert server.status()["history"][0]["tokens"] == 80
        part(a, b)
        wait_for(server.coordinator.stopped.is_set)


def test_a_stopped_run_keeps_what_it_has_not_sent_for_when_it_goes_on(tmp_path):
    with running_server(tmp_path, VALUES, settings()) as server:
        counter = Counter(address_of(server))
        come(counter)
        counter.step(3)
        server.call(lambda: server.coordinator.controls.command(None, "stop"))
        wait_for(counter.diloco.wants_stop)
        counter.diloco.on_ending(SimpleNamespace(is_finished=False, is_stopping=False))
        assert counter.diloco.state_dict()["fragments"]["0"]["since"] == 2
        part(counter)
        assert published(server) == -2.0


# While values are waited for


@pytest.mark.parametrize("command", ["stop", "abort"])
def test_a_worker_that_waits_for_others_heeds_the_server(tmp_path, command):
    with running_server(tmp_path, VALUES, settings(), num_workers=2) as server:
        waiting, other = Counter(address_of(server), "waiting"), Counter(address_of(server), "other")
        come(waiting, other)
        stepping = threading.Thread(target=waiting.step, args=(2,), daemon=True)
        stepping.start()
        wait_for(lambda: server.status()["held"][0]["workers"] == ["waiting"])
        assert stepping.is_alive()
        server.call(lambda: server.coordinator.controls.command("waiting", command))
        stepping.join(10)
        assert not stepping.is_alive()
        part(waiting, other)


def test_one_that_is_removed_saves_also_where_a_request_tells_it_before_a_heartbeat_does(tmp_path):
    with running_server(tmp_path, VALUES, settings(heartbeat_s=60.0), num_workers=2) as server:
        removed, other = Counter(address_of(server), "removed"), Counter(address_of(server), "other")
        come(removed, other)
        server.call(lambda: server.coordinator.controls.kick("removed"))
        assert not removed.diloco.wants_stop()
        assert ended(lambda: removed.step(2))
        assert removed.diloco.wants_stop()
        assert removed.diloco.state_dict()["flights"]  # what it has made is in its checkpoint
        part(removed, other)


def test_a_loop_that_does_not_listen_ends_one_step_later(tmp_path):
    with running_server(tmp_path, VALUES, settings()) as server:
        deaf = Counter(address_of(server), "deaf")
        come(deaf)
        deaf.step(1)
        server.call(lambda: server.coordinator.controls.kick("deaf"))
        wait_for(deaf.diloco.wants_stop)
        deaf.step(1)
        with pytest.raises(DistributedError, match="worker deaf is to end"):
            deaf.step(1)
        part(deaf)


def test_a_run_that_is_told_to_stop_does_not_wait_for_its_first_values():
    never = SimpleNamespace(
        failure=None, round=0, number=None, away_s=0.0, refused_s=50.0, trouble=None, fragment=None, wait=lambda _: None
    )
    never.move_to = lambda round, at_least: None
    waiting = flights.Flights(
        SimpleNamespace(registered=None),
        settings(),
        patience_s=0.1,
        is_stopping=lambda: True,
        failure=lambda: None,
        say=str,
    )
    waiting.under_way[0] = flights.Flight(SimpleNamespace(number=0), never, 0)
    with pytest.raises(StoppedError):
        waiting.attend(0, 0, is_needed=True)


def test_what_is_waited_for_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(flights, "_SILENT_S", 0.1)
    with running_server(tmp_path, VALUES, settings(), num_workers=2) as server:
        waiting = Counter(address_of(server), "waiting")
        come(waiting)
        stepping = threading.Thread(target=waiting.step, args=(2,), daemon=True)
        stepping.start()
        wait_for(lambda: any(text.startswith("waiting: round 0 is not closed yet") for text in waiting.said))
        other = Counter(address_of(server), "other")
        come(other)
        other.step(2)
        stepping.join(10)
        assert not stepping.is_alive()
        assert sum(text.startswith("waiting") for text in waiting.said) == 1
        part(waiting, other)


def test_a_drained_worker_does_not_wait_for_one_that_has_left_a_round_too_small(tmp_path):
    with running_server(tmp_path, VALUES, settings(), num_workers=2, min_workers=2) as server:
        waiting, other = (Counter(address_of(server), name, patience_s=0.3) for name in ("waiting", "other"))
        come(waiting, other)
        stepping = threading.Thread(target=waiting.step, args=(2,), daemon=True)
        stepping.start()
        wait_for(lambda: server.status()["held"][0]["workers"] == ["waiting"])
        server.call(server.coordinator.controls.drain)
        part(other)
        stepping.join(10)
        assert not stepping.is_alive()
        assert waiting.diloco.wants_stop()
        assert ended(lambda: waiting.diloco.on_ending(SimpleNamespace(is_finished=False, is_stopping=False)))
        part(waiting)


# What the server has in the end


def test_a_contribution_that_the_server_cannot_take_is_given_up_in_the_end_and_said(tmp_path, monkeypatch):
    with running_server(tmp_path, VALUES, settings(delay=1)) as server:

        def refuse(num_bytes: int) -> None:
            raise ProtocolError("no room", status=507)

        monkeypatch.setattr(server.coordinator.spool, "room", refuse)
        counter = Counter(address_of(server), patience_s=0.05)
        come(counter)
        counter.step(2)
        assert ended(lambda: part(counter), 10)
        assert any(text.startswith("warning: the server has not got all") for text in counter.said)


def test_a_run_that_is_told_to_end_does_not_stay_to_deliver(tmp_path, monkeypatch):
    with running_server(tmp_path, VALUES, settings(delay=1)) as server:

        def refuse(num_bytes: int) -> None:
            raise ProtocolError("no room", status=507)

        monkeypatch.setattr(server.coordinator.spool, "room", refuse)
        asked = threading.Event()
        counter = Counter(address_of(server), patience_s=3600, is_stopping=asked.is_set)
        come(counter)
        counter.step(2)
        leaving = threading.Thread(target=part, args=(counter,), daemon=True)
        leaving.start()
        wait_for(lambda: any(flight.exchange.refused_s > 0 for flight in _under_way(counter)))
        assert leaving.is_alive()
        asked.set()
        leaving.join(10)
        assert not leaving.is_alive()


def _under_way(counter: Counter):
    return list(counter.diloco._session.flights.under_way.values())


def test_the_last_contribution_of_a_finished_run_is_on_the_servers_disk(tmp_path):
    with running_server(tmp_path, VALUES, settings(), save_every=100) as server:
        counter = Counter(address_of(server))
        come(counter)
        counter.step(4)
        assert server.status()["durable"] == [0]
        counter.diloco.finish()
        part(counter)
        assert server.status()["durable"] == [2]
        assert not any("saved" in text for text in counter.said)


def test_a_finished_run_says_when_the_server_cannot_save(tmp_path, monkeypatch):
    with running_server(tmp_path, VALUES, settings(), save_every=100) as server:

        async def refuse() -> int:
            raise ProtocolError("the disk is full", status=507)

        monkeypatch.setattr(server.coordinator.controls, "save", refuse)
        counter = Counter(address_of(server))
        come(counter)
        counter.step(2)
        counter.diloco.finish()
        part(counter)
        assert any("may not have saved it yet" in text and "the disk is full" in text for text in counter.said)


def test_a_finished_run_that_is_told_to_end_does_not_wait_for_the_servers_disk(tmp_path, monkeypatch):
    with running_server(tmp_path, VALUES, settings(), save_every=100) as server:
        begun, asked, has_ended = threading.Event(), threading.Event(), threading.Event()
        has_saved = server.call(asyncio.Event)

        async def slowly() -> int:
            begun.set()
            try:
                await has_saved.wait()
            finally:
                has_ended.set()
            return 0

        monkeypatch.setattr(server.coordinator.controls, "save", slowly)
        counter = Counter(address_of(server), is_stopping=asked.is_set)
        come(counter)
        counter.step(2)
        counter.diloco.finish()
        leaving = threading.Thread(target=part, args=(counter,), daemon=True)
        leaving.start()
        assert begun.wait(10)
        assert leaving.is_alive()
        asked.set()
        leaving.join(10)
        assert not leaving.is_alive()
        server.call(has_saved.set)
        assert has_ended.wait(10)
        assert server.status()["workers"]["alpha"]["state"] == "left"


def test_a_worker_that_finishes_while_the_server_is_away_has_it_in_its_state(tmp_path):
    with running_server(tmp_path, VALUES, settings()) as server:
        counter = Counter(address_of(server), patience_s=0.1)
        come(counter)
        counter.step(3)
    counter.diloco.finish()
    state = counter.diloco.state_dict()
    assert state["flights"]["0"]["steps"] == 1
    assert torch.equal(state["sent"]["weight"], counter.model.weight)
    part(counter)
    assert any(text.startswith("warning: the server has not got all") for text in counter.said)
