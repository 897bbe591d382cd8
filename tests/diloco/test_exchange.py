"""Over a bad network and past deadlines: what a worker has learned counts once, and nothing of it is lost."""

import asyncio
import threading
import time
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from forgather.diloco.client import Client
from forgather.diloco.local_fragment import LocalFragment, Numbers, Part
from forgather.diloco.messages import Accepted
from forgather.diloco.outer import Nesterov
from forgather.diloco.worker import DiLoCo
from tests.diloco.bad_wire import BadWire
from tests.diloco.loops import address_of
from tests.diloco.running_server import RunningServer, running_server, settings_of
from tests.diloco.test_worker import wait_for

VALUES = {"weight": torch.zeros(1, 1)}


class Counter:
    """A worker whose one weight counts its steps down: after n steps alone it is -n."""

    def __init__(self, address, name: str = "alpha", **others) -> None:
        self.model = nn.Linear(1, 1, bias=False)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1.0)
        self.said: list[str] = []
        self.diloco = DiLoCo(self.model, self.optimizer, address, name, say=self.said.append, **others)

    def step(self, times: int = 1) -> float:
        for _ in range(times):
            self.model.weight.grad = torch.ones(1, 1)
            self.optimizer.step()
        return self.model.weight.item()


def taken_in(worker: Counter) -> float:
    """What the worker has when it has waited once more."""
    worker.diloco.settle()
    return worker.model.weight.item()


def published(server: RunningServer) -> float:
    return server.published("weight").item()


@pytest.fixture
def settings():
    return settings_of(VALUES, sync_every=2, heartbeat_s=0.1)


@pytest.mark.training_case(77)
def test_a_reply_that_is_lost_after_it_was_accepted_counts_once(tmp_path, settings):
    with running_server(tmp_path, VALUES, settings) as server, BadWire(server) as wire:
        worker = Counter(wire.address)
        with worker.diloco:
            wire.lose_reply("PUT ")
            assert worker.step(2) == -2.0
            assert wire.lost.is_set()
            assert worker.step(2) == -4.0
        assert sum(request.startswith("PUT /v1/contributions/alpha/0/") for request in wire.requests) == 2
        assert server.status()["versions"] == [2]
        assert published(server) == -4.0


@pytest.mark.parametrize("is_broken", [False, True], ids=["slow", "broken"])
def test_what_is_counted_already_is_still_encoded_to_its_end(tmp_path, settings, monkeypatch, is_broken):
    """The server says so before it has read any of it; the worker keeps it, so it must be whole, and of one anchor."""
    go_on = threading.Event()
    write = LocalFragment.write

    def slowly(self: LocalFragment, part: Part, local: Numbers) -> None:
        assert go_on.wait(20)
        if is_broken:
            with part.payload.written():
                raise MemoryError("no room")
        else:
            write(self, part, local)

    with running_server(tmp_path, VALUES, settings) as server:
        worker = Counter(address_of(server))
        with pytest.raises(MemoryError, match="no room") if is_broken else nullcontext(), worker.diloco:
            worker.step(1)
            monkeypatch.setattr(LocalFragment, "write", slowly)
            monkeypatch.setattr(Client, "send", lambda *_: Accepted("counted"))
            ended: list[object] = []

            def step() -> None:
                try:
                    ended.append(worker.step(1))
                except MemoryError as error:
                    ended.append(str(error))

            thread = threading.Thread(target=step)
            thread.start()
            flights = worker.diloco._session.flights
            wait_for(lambda: bool(flights.under_way))
            [flight] = flights.under_way.values()
            wait_for(lambda: flight.exchange.has_parts)
            time.sleep(0.1)
            assert not flight.exchange.is_delivered
            go_on.set()
            if is_broken:
                thread.join(20)
                assert ended == ["no room"]
            else:
                wait_for(lambda: flight.exchange.is_delivered)
                assert flight.exchange.parts[0].payload.is_whole
                monkeypatch.undo()
                flight.exchange._accepted = None  # as by a server that has forgotten it
                flight.exchange._client.interrupt()
                thread.join(30)


@pytest.mark.training_case(78)
def test_what_was_made_while_the_server_was_away_reaches_it(tmp_path, settings):
    with running_server(tmp_path, VALUES, settings) as server, BadWire(server) as wire:
        worker = Counter(wire.address, patience_s=0.3)
        with worker.diloco:
            worker.step(2)
            wire.cut()
            assert worker.step(2) == -4.0  # not waited for longer than its patience
            assert any("out of reach" in text for text in worker.said)
            assert worker.step(5) == -9.0  # trains on, and does not wait again
            assert published(server) == -2.0
            wire.mend()
            wait_for(lambda: published(server) == -4.0)  # the 2 steps that were sent
            worker.diloco.settle()
            assert worker.step() == -10.0  # local progress is on top: nothing was overwritten
            worker.diloco.settle()
            wait_for(lambda: published(server) == -10.0)  # and the rest came with the next turn
        assert server.status()["versions"] == [3]


@pytest.mark.parametrize("codec", ["fp32", "bf16"])
def test_the_contribution_of_an_evicted_worker_counts_in_the_open_round(tmp_path, codec):
    settings = settings_of(VALUES, sync_every=2, heartbeat_s=0.1, lease_s=0.5, upload=codec, download=codec)
    with (
        running_server(tmp_path, VALUES, settings, Nesterov(1.0, 0.0), num_workers=2) as server,
        BadWire(server) as wire,
    ):
        lost = Counter(wire.address, "lost", patience_s=0.1)
        other = Counter(address_of(server), "other")  # its connection is never cut
        opened = threading.Thread(target=lost.diloco.__enter__)
        opened.start()
        with other.diloco:
            opened.join()
            wire.cut()
            lost.step(2)
            wait_for(lambda: server.status()["workers"]["lost"]["state"] == "dead")
            other.step(2)  # round 0 closes without it
            assert published(server) == -2.0
            wire.mend()
            wait_for(lambda: any("lost" in each["workers"] for each in server.status()["held"]))
            other_round = threading.Thread(target=other.step, args=(2,))
            other_round.start()
            wait_for(lambda: taken_in(lost) == -4.0)
            other_round.join()
            # Round 1: the mean of two differences of 2, on top of -2.
            assert published(server) == -4.0
            assert server.status()["workers"]["lost"]["counted"] == 1
            lost.diloco.__exit__(None, None, None)


def test_values_that_are_not_what_their_digests_say_are_asked_for_again(tmp_path):
    settings = settings_of(VALUES, sync_every=1, upload="bf16", download="bf16")
    with running_server(tmp_path, VALUES, settings) as server:
        worker = Counter(address_of(server))
        with worker.diloco:
            # What this worker takes for the last version is not it: the change leads elsewhere.
            worker.diloco._fragments[0].anchor.flat.add_(1.0)
            worker.step()
            assert worker.model.weight.item() == published(server)


def test_a_server_that_came_back_from_an_older_state_is_brought_everything_again(tmp_path):
    """Saves are rare: the second server begins at version 0, and makes versions 1 and 2 once more."""
    settings = settings_of(VALUES, sync_every=2, heartbeat_s=0.1)
    with BadWire.between() as wire:
        with running_server(tmp_path / "first", VALUES, settings, save_every=100) as server:
            wire.mend(server)
            worker = Counter(wire.address, patience_s=0.1)
            worker.diloco.__enter__()
            worker.step(4)
            assert published(server) == -4.0
            wire.cut()
        with running_server(tmp_path / "second", VALUES, settings, save_every=100) as server:
            wire.mend(server)
            worker.step(2)
            worker.diloco.settle()
            assert published(server) == -6.0
            assert worker.model.weight.item() == -6.0
            worker.diloco.__exit__(None, None, None)


def test_a_server_that_forgets_what_it_held_is_brought_it_again(tmp_path):
    """Killed between accepting and closing the round: the contribution of the one that waits comes once more."""
    settings = settings_of(VALUES, sync_every=2, heartbeat_s=0.1)
    with BadWire.between() as wire:
        with running_server(tmp_path / "first", VALUES, settings, num_workers=2) as server:
            wire.mend(server)
            workers = [Counter(wire.address, name, patience_s=0.1) for name in ("a", "b")]
            joining = [threading.Thread(target=each.diloco.__enter__) for each in workers]
            for each in joining:
                each.start()
            for each in joining:
                each.join()
            waiting = threading.Thread(target=workers[0].step, args=(2,))
            waiting.start()
            wait_for(lambda: bool(server.status()["held"]))
            wire.cut()
            waiting.join()
        with running_server(tmp_path / "second", VALUES, settings, num_workers=2) as server:
            wire.mend(server)
            other = threading.Thread(target=lambda: (workers[1].step(2), workers[1].diloco.settle()))
            other.start()
            workers[0].diloco.settle()
            other.join()
            assert published(server) == -2.0
            assert server.status()["versions"] == [1]
            for each in workers:
                assert each.model.weight.item() == -2.0
                each.diloco.__exit__(None, None, None)


def number_of_uploads(wire: BadWire) -> int:
    return sum(request.startswith("PUT /v1/contributions") for request in wire.requests)


def test_a_connection_that_is_lost_to_the_same_server_sends_nothing_again(tmp_path):
    """Neither what that connection waited for, nor what other fragments have brought."""
    values = {"a": torch.zeros(1, 1), "b": torch.zeros(1, 1)}
    settings = settings_of(values, [["a"], ["b"]], sync_every=2, delay=5, heartbeat_s=0.1)
    with running_server(tmp_path, values, settings) as server, BadWire(server) as wire:
        model = nn.ParameterDict({name: nn.Parameter(value.clone()) for name, value in values.items()})
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        with DiLoCo(model, optimizer, wire.address, "alpha", say=lambda text: None) as diloco:
            server.call(lambda: server.coordinator.rounds.change(num_workers=2))  # rounds stay open
            asked = len(wire.requests)
            for _ in range(2):
                for parameter in model.values():
                    parameter.grad = torch.ones(1, 1)
                optimizer.step()
            waiting = [f"POST /v1/values/{number}" for number in (0, 1)]
            wait_for(lambda: all(each in wire.requests[asked:] for each in waiting))
            times = diloco._membership.times
            wire.cut()
            wire.mend()
            wait_for(lambda: diloco._membership.times > times)
            server.call(lambda: server.coordinator.rounds.change(num_workers=1))
            server.call(server.coordinator.wake)
            diloco.settle()
        assert server.status()["versions"] == [1, 1]
        assert number_of_uploads(wire) == 2


def test_a_server_that_was_restored_from_before_all_that_is_kept_is_brought_what_is_new(tmp_path):
    """What was in the values that it has lost is lost with them; nobody sends it again and again."""
    settings = settings_of(VALUES, sync_every=2, heartbeat_s=0.1)
    with BadWire.between() as wire:
        with running_server(tmp_path / "first", VALUES, settings, save_every=100) as server:
            wire.mend(server)
            worker = Counter(wire.address, patience_s=0.1)
            worker.diloco.__enter__()
            worker.step(4)
            asyncio.run_coroutine_threadsafe(server.coordinator.controls.save(), server.loop).result(10)
            worker.step(4)
            assert {part.identity.round for part in worker.diloco._fragments[0].kept} == {2, 3}
            wire.cut()
        with running_server(tmp_path / "backup", VALUES, settings, save_every=100) as server:
            wire.mend(server)
            worker.step(2)
            worker.diloco.settle()
            assert published(server) == -2.0
            assert server.status()["versions"] == [1]
            assert worker.model.weight.item() == -2.0
            worker.diloco.__exit__(None, None, None)


@pytest.mark.parametrize("start", [0.0, 5.0])
def test_what_is_kept_is_brought_only_to_values_that_it_was_made_from(tmp_path, start):
    """Contributions of values (fp32) say nothing to a server with others: it refuses them once."""
    settings = settings_of(VALUES, sync_every=2, heartbeat_s=0.1)
    other = {"weight": torch.full((1, 1), start)}
    with BadWire.between() as wire:
        with running_server(tmp_path / "first", VALUES, settings, save_every=100) as server:
            wire.mend(server)
            worker = Counter(wire.address, patience_s=0.1)
            worker.diloco.__enter__()
            worker.step(2)
            wire.cut()
        with running_server(tmp_path / "other", other, settings_of(other, sync_every=2, heartbeat_s=0.1)) as server:
            wire.mend(server)
            worker.step(2)
            worker.diloco.settle()
            assert published(server) == (-4.0 if start == 0 else 3.0)  # both contributions, or the last as a difference
            assert worker.model.weight.item() == published(server)
            worker.diloco.__exit__(None, None, None)
