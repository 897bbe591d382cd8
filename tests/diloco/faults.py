"""What may go wrong between a server and its workers, each done to real processes, and what comes of it.

    python -m tests.diloco.faults               all of them, and the table of outcomes
    python -m tests.diloco.faults killed cut    those whose names have one of these words

Two workers, a and b, make 4 rounds of 2 steps. Where nothing is lost by a fault, the values at the end have the bits of
an undisturbed run; where a round had to go on without somebody, what that one had learned counts in a later one.
"""

import functools
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from forgather.diloco.address import parse_address
from forgather.diloco.client import Client
from forgather.diloco.messages import Accepted, Contribution, Identity, Slice, Version
from forgather.diloco.payload import Payload
from forgather.errors import ForgatherError
from tests.diloco.processes import TOKEN, Child, World, make_model, parameters_of

ROUNDS = 4
UPLOAD_BYTES = 2 * sum(value.numel() for value in parameters_of(make_model()).values())  # in bf16

Play = Callable[[World], str]


@dataclass(frozen=True)
class Fault:
    """`play` does it and returns what came of it; AssertionError where that is not what is promised."""

    name: str
    play: Play
    plan: Mapping[str, Any]

    def __call__(self, folder: Path) -> str:
        with World(folder, **self.plan) as world:
            return self.play(world)


FAULTS: list[Fault] = []


def fault(name: str, **plan: Any) -> Callable[[Play], Play]:
    """Puts a function of a world, which is made with `plan`, into the table."""

    def register(play: Play) -> Play:
        FAULTS.append(Fault(name, play, plan))
        return play

    return register


@functools.cache
def undisturbed() -> str:
    """The digest of the values at the end when nothing happens."""
    with tempfile.TemporaryDirectory() as folder, World(Path(folder)) as world:
        return end(world, world.start_worker("a"), world.start_worker("b"))


def end(world: World, *workers: Child) -> str:
    """The digest that all workers and the server have in the end."""
    digests = {worker.wait_for("ended")[1] for worker in workers}
    digests.add(world.digest())
    assert len(digests) == 1, f"workers and server have not the same values: {digests}"
    return digests.pop()


def end_undisturbed(world: World, *workers: Child) -> str:
    digest = end(world, *workers)
    assert digest == undisturbed(), "the values are not those of an undisturbed run"
    assert world.status()["versions"] == [ROUNDS]
    assert contributions(world) == {"a": ROUNDS, "b": ROUNDS}
    return "nothing lost, nothing twice: the bits of an undisturbed run"


def contributions(world: World) -> Counter[str]:
    """How many contributions of each worker are in the values."""
    return Counter(worker for version in world.status()["history"] for worker in version["workers"])


def is_held(world: World, worker: str, round: int) -> bool:
    return any(each["round"] == round and worker in each["workers"] for each in world.status()["held"])


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s:.0f} s: {what}"
        time.sleep(0.02)


def client_of(world: World, worker: str) -> Client:
    """Speaks with the worker's own name and key."""
    key = (world.folder / worker / "key").read_text(encoding="utf-8").strip()
    return Client(parse_address(f"127.0.0.1:{world.port}", token=TOKEN), worker, key)


def contribute(world: World, worker: str, round: int, value: float) -> object:
    """Send a contribution of a worker in which every number is `value`, and give the answer."""
    values = parameters_of(make_model())
    slices = [Slice(name, (0,) * each.ndim, tuple(each.shape)) for name, each in values.items()]
    payload = torch.full((sum(each.numel for each in slices),), value, dtype=torch.bfloat16).view(torch.uint8)
    # Each slice is encoded to a multiple of 8 bytes.
    payload = torch.cat([_padded(each) for each in payload.split([2 * each.numel for each in slices])])
    header = Contribution(Version(round, ""), "differences", "bf16", slices, tokens=16)
    with closing(client_of(world, worker)) as client:
        return client.send(Identity(worker, round, 0), header, Payload.whole(payload))


def _padded(encoded: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(encoded, (0, -len(encoded) % 8))


@fault("worker killed before an upload")
def killed_before(world: World) -> str:
    a, b = world.start_worker("a"), world.start_worker("b", pause_s=0.2)
    b.wait_for("step", 3)
    b.kill()
    return end_undisturbed(world, a, world.start_worker("b"))


@fault("worker killed during an upload")
def killed_during(world: World) -> str:
    a, b = world.start_worker("a"), world.start_worker("b", pause_s=0.2)
    b.wait_for("step", 3)
    proxy = world.proxy("b")
    before = proxy.up_bytes
    proxy.bytes_per_s = 100_000
    proxy.wait_for(lambda proxy: proxy.up_bytes - before > UPLOAD_BYTES // 2)
    b.kill()
    proxy.bytes_per_s = None
    assert not is_held(world, "b", 1)
    return end_undisturbed(world, a, world.start_worker("b"))


@fault("worker killed after an upload")
def killed_after(world: World) -> str:
    a, b = world.start_worker("a", pause_s=0.7), world.start_worker("b")
    wait_until(lambda: is_held(world, "b", 1), "b's second contribution")
    b.kill()
    return end_undisturbed(world, a, world.start_worker("b"))


def _stopped(world: World, seconds: float) -> str:
    a, b = world.start_worker("a", pause_s=0.1), world.start_worker("b", pause_s=0.1)
    b.wait_for("step", 3)
    b.stop()
    time.sleep(seconds)
    assert world.status()["workers"]["b"]["state"] == "dead"
    b.go_on()
    assert b.wait_for("ended")[1] == world.digest()
    a.wait_for("ended")
    counted = contributions(world)
    assert counted == {"a": ROUNDS, "b": ROUNDS}, counted
    return "the others went on; all that it had learned counted later"


@fault("worker stopped for 3 s (SIGSTOP), longer than its lease", settings={"lease_s": 1.0})
def stopped(world: World) -> str:
    return _stopped(world, 3.0)


@fault("worker stopped for 10 s (SIGSTOP)", settings={"lease_s": 5.0})
def stopped_long(world: World) -> str:
    return _stopped(world, 10.0)


@fault("reply lost after acceptance")
def reply_lost(world: World) -> str:
    world.proxy("b").lose_replies("PUT", 2)
    outcome = end_undisturbed(world, world.start_worker("a"), world.start_worker("b"))
    assert len([each for each in world.proxy("b").requests if each.startswith("PUT")]) > ROUNDS
    return outcome


@fault("upload torn in the middle")
def torn(world: World) -> str:
    world.proxy("b").tear(UPLOAD_BYTES // 2)
    outcome = end_undisturbed(world, world.start_worker("a"), world.start_worker("b"))
    assert len([each for each in world.proxy("b").requests if each.startswith("PUT")]) > ROUNDS
    return outcome


@fault("old contribution sent again (replay)")
def replayed(world: World) -> str:
    a, b = world.start_worker("a", pause_s=0.1), world.start_worker("b", pause_s=0.1)
    b.wait_for("step", 5)
    for round in (0, 1):
        assert contribute(world, "b", round, 3.0) == Accepted("counted")
    return end_undisturbed(world, a, b)


def _server_killed(world: World, where: str, which: int = 2, **arguments: Any) -> str:
    """Kill the server the `which`-th time that it saves a round."""
    assert world.server is not None
    world.server.kill()
    first = world.start_server(dies=(where, which), **arguments)
    a, b = world.start_worker("a"), world.start_worker("b")
    assert first.join() == -9
    world.start_server(**arguments)
    return end_undisturbed(world, a, b)


@fault("server killed between accepting and saving")
def server_killed_before_saving(world: World) -> str:
    return _server_killed(world, "before saving")


@fault("server killed during saving")
def server_killed_while_saving(world: World) -> str:
    return _server_killed(world, "while saving")


@fault("server killed after saving, before anybody heard of it")
def server_killed_after_saving(world: World) -> str:
    return _server_killed(world, "after saving")


@fault("server killed two unsaved rounds after its last checkpoint (save_every 3)")
def server_killed_in_between(world: World) -> str:
    return _server_killed(world, "before saving", 1, arguments={"save_every": 3})


@fault("server killed with one of two contributions held")
def server_killed_while_holding(world: World) -> str:
    a, b = world.start_worker("a", pause_s=0.7), world.start_worker("b")
    wait_until(lambda: is_held(world, "b", 1), "b's second contribution")
    assert world.server is not None
    world.server.kill()
    world.start_server()
    return end_undisturbed(world, a, b)


@fault("network cut for 1.5 s")
def cut(world: World) -> str:
    a, b = world.start_worker("a"), world.start_worker("b", pause_s=0.1)
    b.wait_for("step", 3)
    world.proxy("b").cut()
    time.sleep(1.5)
    world.proxy("b").mend()
    return end_undisturbed(world, a, b)


@fault("network cut for longer than the lease; the worker trains on", settings={"lease_s": 1.0})
def cut_long(world: World) -> str:
    patient = {"patience_s": 0.5}
    a = world.start_worker("a", pause_s=0.3)
    b = world.start_worker("b", pause_s=0.1, steps=100, arguments=patient)
    b.wait_for("step", 3)
    world.proxy("b").reset()
    assert world.server is not None
    there, world.proxy("b").target = world.proxy("b").target, ("127.0.0.1", 1)
    b.wait_for("step", 7)  # no server, and it trains
    assert world.status()["workers"]["b"]["state"] == "dead"
    world.proxy("b").target = there
    b.wait_for("ended")
    a.wait_for("ended")
    tokens = sum(version["tokens"] for version in world.status()["history"])
    assert tokens == 16 * (100 + 8), f"not every step counted once: {tokens} tokens"
    return "trained on; every step of it counted once when it was back"


@fault("straggler past the deadline", arguments={"round_timeout_s": 0.4})
def straggler(world: World) -> str:
    a, b = world.start_worker("a"), world.start_worker("b", pause_s=0.6)
    a.wait_for("ended")
    assert b.wait_for("ended")[1] == world.digest()
    assert contributions(world) == {"a": ROUNDS, "b": ROUNDS}
    assert any(version["workers"] == ["a"] for version in world.status()["history"])
    return "nobody waited longer than the deadline; what came late counted in the open round"


@fault("worker that joins late")
def late(world: World) -> str:
    a, b = world.start_worker("a", steps=16, pause_s=0.1), world.start_worker("b", steps=16, pause_s=0.1)
    world.wait_for_version(2)
    c = world.start_worker("c", steps=6, pause_s=0.1)
    values = c.wait_for("values")[1]
    c.wait_for("ended")
    end(world, a, b)
    history = world.status()["history"]
    first = next(version["version"] for version in history if "c" in version["workers"])
    assert first > 2
    assert contributions(world) == {"a": 8, "b": 8, "c": 3}
    assert values
    return f"began with the values of the day, counted from version {first}"


@fault("worker that learns NaN")
def learns_nan(world: World) -> str:
    a, b = world.start_worker("a"), world.start_worker("b", nan_at=2)
    said = b.wait_for("failed")[1]
    assert "not finite" in said, said
    digest = end(world, a)
    assert digest != undisturbed()
    assert contributions(world) == {"a": ROUNDS, "b": 1}
    return "it ended with the parameter's name and sent nothing; the others went on"


@fault("contribution of NaN")
def sends_nan(world: World) -> str:
    a, b = world.start_worker("a", pause_s=0.1), world.start_worker("b", pause_s=0.1)
    b.wait_for("step", 3)
    for worker in (a, b):  # whichever round is open then stays so
        worker.stop()
    time.sleep(0.2)
    open_round = world.status()["versions"][0]
    for value in (float("nan"), float("inf")):
        with pytest.raises(ForgatherError, match="finite"):
            contribute(world, "b", open_round, value)
    for worker in (a, b):
        worker.go_on()
    outcome = end_undisturbed(world, a, b)
    return f"refused; {outcome}"


@fault("evicted worker comes back", settings={"lease_s": 1.0})
def evicted(world: World) -> str:
    a, b = world.start_worker("a", pause_s=0.1), world.start_worker("b", pause_s=0.1)
    b.wait_for("step", 3)
    world.proxy("b").cut()
    wait_until(lambda: world.status()["workers"]["b"]["state"] == "dead", "b's eviction")
    world.wait_for_version(2)  # the round that b has trained for is closed without it
    world.proxy("b").mend()
    a.wait_for("ended")
    assert b.wait_for("ended")[1] == world.digest()
    assert contributions(world) == {"a": ROUNDS, "b": ROUNDS}
    return "what it had learned counted in the open round, once"


@fault("two processes with one name")
def same_name(world: World) -> str:
    a, b = world.start_worker("a", pause_s=0.1), world.start_worker("b", pause_s=0.1)
    b.wait_for("step", 1)
    said = world.start_worker("b", folder="other").wait_for("failed")[1]
    assert "name" in said, said
    return f"the second is refused; {end_undisturbed(world, a, b)}"


@fault("full disk on the server")
def full_disk(world: World) -> str:
    assert world.server is not None
    world.server.kill()
    log = world.folder / "log"  # on the same disk
    log.write_bytes(bytes(10_000))
    pid = world.start_server(log=log).process.pid
    a, b = world.start_worker("a", pause_s=0.1), world.start_worker("b", pause_s=0.1)
    b.wait_for("step", 3)
    _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
    wait_until(lambda: world.status()["trouble"] is not None, "a save that fails")
    version = world.status()["versions"]
    time.sleep(1.0)  # it lives, and nobody is told of what is not on the disk
    assert world.status()["versions"] == version
    assert all(member["state"] == "live" for member in world.status()["workers"].values())
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (hard, hard))
    outcome = end_undisturbed(world, a, b)
    assert world.status()["trouble"] is None
    return f"it waited for room, and said so; {outcome}"


def main() -> int:
    words = sys.argv[1:]
    chosen = [each for each in FAULTS if not words or any(word in each.name for word in words)]
    width = max(len(each.name) for each in chosen)
    failed = 0
    for each in chosen:
        begun = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            try:
                outcome = each(Path(folder))
            except (AssertionError, ForgatherError, OSError) as error:
                failed += 1
                outcome = f"FAILED: {error}"
        print(f"{each.name:<{width}}  {time.monotonic() - begun:5.1f} s  {outcome}", flush=True)
    print(f"{len(chosen) - failed} of {len(chosen)} as promised")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
