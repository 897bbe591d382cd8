"""kill -9 at any moment: the next start takes the last whole checkpoint, says so, and goes on as if undisturbed."""

import random
import time
from pathlib import Path

import pytest

from forgather.checkpoint.folder import saved_steps, step_name
from tests.checkpoint.crashing import HIDDEN, Victim
from tests.checkpoint.training import Run, damage_in

STEPS = 40


@pytest.fixture(scope="module")
def undisturbed() -> list[str]:
    """The hash after each number of steps of a run that nobody kills."""
    run = Run(hidden=HIDDEN)
    hashes = [run.hash()]
    for _ in range(STEPS):
        run.step()
        hashes.append(run.hash())
    return hashes


def assert_only_whole_ones(run: Path) -> int:
    """Every folder with a step's name is whole; return the highest step, 0 when there is none."""
    steps = saved_steps(run / "checkpoints")
    for step in steps:
        assert damage_in(run / "checkpoints" / step_name(step)) == []
    return max(steps, default=0)


# Between the ranks' parts and the name: the others are as this for who resumes. Kills at random are in every run.
@pytest.mark.parametrize(
    "place",
    [
        "rename",
        *(
            pytest.param(place, marks=pytest.mark.soak)
            for place in ("tensors", "record", "layout", "manifest", "sync", "retention", "removal")
        ),
    ],
)
def test_killed_at_each_stage_of_a_save(tmp_path: Path, undisturbed: list[str], place: str) -> None:
    run = tmp_path / "run"
    with Victim(run, 6) as victim:
        assert victim.wait_for("done") is not None
    with Victim(run, STEPS, die_at=place) as victim:
        assert victim.wait_for("done") is None
        assert victim.lines[-1] == "saving 8"
    expected = 8 if place in ("retention", "removal") else 6
    assert assert_only_whole_ones(run) == expected
    with Victim(run, 12) as victim:
        assert victim.wait_for("resumed") == f"resumed {expected} {undisturbed[expected]}"
        assert victim.wait_for("done") == f"done {undisturbed[12]}"
    said = victim.errors.read_text()
    if place != "retention":
        left = ".step-00000004.removed" if place == "removal" else ".step-00000008.partial"
        assert f"{left} was left by an interrupted save or removal; it is ignored" in said
        assert f"removing {run / 'checkpoints' / left}" in said
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00000010", "step-00000012"]


def wait_until_something_is_there(run: Path) -> None:
    """Return when a save has begun to write; how long that takes and lasts depends on the machine."""
    deadline = time.monotonic() + 5
    while not any((run / "checkpoints").glob(".step-*.partial")) and time.monotonic() < deadline:
        pass  # a save of so small a model is over within milliseconds


def let_it_end(run: Path, undisturbed: list[str], asynchronous: bool) -> None:
    """Start a run a last time: it ends as if nobody had killed it, and leaves nothing of what was interrupted."""
    with Victim(run, STEPS, asynchronous=asynchronous) as victim:
        assert victim.wait_for("done") == f"done {undisturbed[STEPS]}"
    assert assert_only_whole_ones(run) == STEPS
    # A save removes what was left; a run that was killed after its last save, in the removal, has none to come.
    assert "saved" not in " ".join(victim.lines) or not list((run / "checkpoints").glob(".step-*"))


def kill_at_random(tmp_path: Path, undisturbed: list[str], kills: int, seed: int, asynchronous: bool) -> int:
    """Kill runs `kills` times, every other time in a save, and let each end; return how many saves were hit."""
    chance = random.Random(seed)
    partials = runs = 0
    run = tmp_path / "run-0"
    for number in range(kills):
        with Victim(run, STEPS, asynchronous=asynchronous) as victim:
            resumed = victim.wait_for("resumed")
            assert resumed is not None
            step = int(resumed.split()[1])
            assert resumed == f"resumed {step} {undisturbed[step]}"
            assert step == assert_only_whole_ones(run)
            if number % 2 == 0:
                victim.wait_for("saving")
                wait_until_something_is_there(run)
                time.sleep(chance.uniform(0, 0.004))
            else:
                time.sleep(chance.uniform(0, 0.3))
        partials += any((run / "checkpoints").glob(".step-*"))
        if max(saved_steps(run / "checkpoints"), default=0) >= STEPS - 4:
            # Whoever is killed at the end of a run is killed in no save.
            let_it_end(run, undisturbed, asynchronous)
            runs += 1
            run = tmp_path / f"run-{runs}"
    let_it_end(run, undisturbed, asynchronous)
    return partials


@pytest.mark.training_case(35)
@pytest.mark.parametrize(("asynchronous", "kills"), [pytest.param(False, 3, marks=pytest.mark.soak), (True, 5)])
def test_killed_at_random(tmp_path: Path, undisturbed: list[str], asynchronous: bool, kills: int) -> None:
    kill_at_random(tmp_path, undisturbed, kills=kills, seed=1, asynchronous=asynchronous)


@pytest.mark.soak
@pytest.mark.parametrize("asynchronous", [False, True])
def test_killed_at_fifty_random_moments(tmp_path: Path, undisturbed: list[str], asynchronous: bool) -> None:
    assert kill_at_random(tmp_path, undisturbed, kills=50, seed=2, asynchronous=asynchronous) >= 8
