"""Workers of an asynchronous server: each goes on with values that have its own contribution, and nobody hangs."""

import asyncio
import threading

import pytest

from tests.diloco.faults import contributions, wait_until
from tests.diloco.loops import address_of
from tests.diloco.processes import World
from tests.diloco.running_server import running_server, settings_of
from tests.diloco.test_exchange import VALUES, Counter, published
from tests.diloco.test_worker import together


def test_a_version_without_the_own_contribution_is_not_what_a_worker_waits_for(tmp_path):
    """Another's contribution makes version 1 first; then the outer step of one's own takes long."""
    settings = settings_of(VALUES, mode="async", heartbeat_s=0.1)
    with running_server(tmp_path, VALUES, settings) as server:
        slow, fast = Counter(address_of(server), "slow"), Counter(address_of(server), "fast")
        together(slow.diloco.__enter__, fast.diloco.__enter__)
        fast.step()
        may_go_on = server.call(asyncio.Event)
        close_round = server.coordinator.publisher.close_round

        async def slowly(*args):
            await may_go_on.wait()
            return await close_round(*args)

        server.coordinator.publisher.close_round = slowly
        answer, is_asked = server.coordinator.answer, threading.Event()

        async def noted(*args):
            is_asked.set()  # and it looks at once whether there is such a version
            return await answer(*args)

        server.coordinator.answer = noted
        stepping = threading.Thread(target=slow.step)
        stepping.start()
        assert is_asked.wait(10)
        server.call(may_go_on.set)
        stepping.join(10)
        assert not stepping.is_alive()
        assert server.status()["versions"] == [2]
        assert slow.model.weight.item() == published(server) < -1.0
        for each in (slow, fast):
            each.diloco.__exit__(None, None, None)


@pytest.mark.parametrize("delay", [0, 1])
def test_two_workers_come_to_their_end_with_everything_counted(tmp_path, delay):
    settings = settings_of(VALUES, mode="async", sync_every=3, delay=delay, heartbeat_s=0.1)
    with running_server(tmp_path, VALUES, settings, num_workers=2, save_every=3) as server:
        counters = [Counter(address_of(server), name, tokens_per_step=10) for name in "ab"]

        def body(counter: Counter) -> None:
            with counter.diloco:
                counter.step(20)
                counter.diloco.finish()

        together(*(lambda counter=counter: body(counter) for counter in counters))
        status = server.status()
        assert {name: each["counted"] for name, each in status["workers"].items()} == {"a": 7, "b": 7}
        assert sum(each["tokens"] for each in status["history"]) == 2 * 20 * 10


@pytest.mark.parametrize("where", [("before saving", 1), pytest.param(("after saving", 1), marks=pytest.mark.soak)])
def test_a_server_that_is_killed_between_two_saves_makes_its_versions_again(tmp_path, where):
    """Each has contributions that the journal names and no checkpoint has; they come again, and count once."""
    arguments = {"save_every": 3}
    with World(tmp_path, settings={"mode": "async"}, arguments=arguments) as world:
        assert world.server is not None
        world.server.kill()
        first = world.start_server(dies=where)
        a, b = world.start_worker("a"), world.start_worker("b", pause_s=0.05)
        assert first.join() == -9
        world.start_server()
        for each in (a, b):
            each.wait_for("ended")
        wait_until(lambda: world.status()["versions"] == [8], "all versions")
        assert contributions(world) == {"a": 4, "b": 4}
        assert sum(version["tokens"] for version in world.status()["history"]) == 2 * 8 * 16
