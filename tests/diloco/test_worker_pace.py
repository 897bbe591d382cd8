"""How fast a worker is, which decides how many steps it makes where workers are unequal, and rounds of a fixed time."""

import threading
import time

from forgather.diloco.presence import STRENGTH, Beat
from forgather.diloco.pulse import Pace, Pulse
from tests.diloco.bad_wire import BadWire
from tests.diloco.loops import address_of
from tests.diloco.running_server import running_server, settings_of
from tests.diloco.test_exchange import VALUES, Counter
from tests.diloco.test_worker import together, wait_for


def test_the_pace_is_that_of_training_and_stays_while_nothing_is_made(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    pace = Pace()
    pace.step_ended()  # the first, in which things are compiled
    assert pace.steps_per_s() is None
    for _ in range(10):
        now[0] += 100.0  # waits for others
        pace.step_begins()
        now[0] += 0.5
        pace.step_ended()
    assert pace.steps_per_s() == 2.0
    now[0] += 100.0
    assert pace.steps_per_s() == 2.0
    pace.step_begins()
    now[0] += 0.25
    pace.step_ended()
    assert pace.steps_per_s() == 4.0


def test_a_slower_worker_makes_fewer_steps_though_the_faster_one_waits_for_it(tmp_path):
    """Both report while they train and while they wait; the faster one keeps its H, and its rounds get shorter."""
    settings = settings_of(VALUES, sync_every=12, dylu=True, heartbeat_s=0.02)
    with running_server(tmp_path, VALUES, settings, num_workers=2) as server:
        fast, slow = Counter(address_of(server), "fast"), Counter(address_of(server), "slow")
        together(fast.diloco.__enter__, slow.diloco.__enter__)
        is_over = threading.Event()

        def body(counter: Counter, seconds: float) -> None:
            while not is_over.is_set():
                time.sleep(seconds)  # what a step takes
                counter.step()

        def is_adapted() -> bool:
            workers = server.status()["workers"]
            return workers["fast"]["sync_every"] == 12 and workers["slow"]["sync_every"] <= 6

        loops = [threading.Thread(target=body, args=each) for each in ((fast, 0.002), (slow, 0.05))]
        for each in loops:
            each.start()
        try:
            version = server.status()["versions"][0]
            wait_for(is_adapted, 20)
            # It stays so over rounds in which the faster one waits.
            wait_for(lambda: server.status()["versions"][0] >= version + 4, 20)
            for _ in range(20):
                time.sleep(0.01)
                assert is_adapted()
            assert slow.diloco._schedule.next_sync_every <= 6
        finally:
            is_over.set()
            server.call(lambda: server.coordinator.controls.command(None, "stop"))
            for each in loops:
                each.join(10)
        for each in (fast, slow):
            each.diloco.__exit__(None, None, None)


def test_a_worker_goes_on_with_the_time_of_rounds_that_its_server_has_now(tmp_path):
    long, short = (settings_of(VALUES, round_seconds=seconds, heartbeat_s=0.05) for seconds in (3600.0, 0.01))
    with running_server(tmp_path / "first", VALUES, long) as server:
        counter = Counter(address_of(server))
        with counter.diloco:
            counter.step(3)
            state = counter.diloco.state_dict()
            assert server.status()["versions"] == [0]
    with running_server(tmp_path / "second", VALUES, short) as server:
        again = Counter(address_of(server))
        stored = {f"anchor/{name}": (value.shape, value.dtype) for name, value in VALUES.items()}
        again.diloco.load_targets(state, stored)
        again.diloco.load_state_dict(state)
        with again.diloco:
            wait_for(lambda: again.step() < 0 and server.status()["versions"][0] > 0)


def test_a_server_that_is_started_again_with_another_time_of_rounds_is_followed(tmp_path):
    first, second = (settings_of(VALUES, round_seconds=seconds, heartbeat_s=0.05) for seconds in (0.01, 3600.0))
    with BadWire.between() as wire:
        with running_server(tmp_path, VALUES, first) as server:
            wire.mend(server)
            counter = Counter(wire.address, patience_s=0.1)
            counter.diloco.__enter__()
            wait_for(lambda: counter.step() < 0 and server.status()["versions"][0] > 0)
            wire.cut()
        with running_server(tmp_path, VALUES, second) as server:
            wire.mend(server)
            wait_for(lambda: counter.step() < 0 and counter.diloco._schedule.round_seconds == 3600.0)
            counter.diloco.__exit__(None, None, None)


def test_a_command_that_is_told_again_is_heard_once():
    pulse = Pulse(1)
    pulse.hear(Beat(1, "save", 7))
    assert pulse.tell().heard == 7
    assert pulse.take_save()
    pulse.hear(Beat(1, "save", 7))
    assert not pulse.take_save()
    for number, command in enumerate(STRENGTH[2:], 8):
        pulse.hear(Beat(1, command, number))
        assert pulse.command == command
    pulse.hear(Beat(1, "save", 20))
    assert pulse.command == "abort"
