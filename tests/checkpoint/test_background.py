"""Saves that a process of their own writes: what was saved is what there was, and every failure is told."""

import errno
import os
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from forgather.checkpoint import background, plan
from forgather.checkpoint import store as store_module
from forgather.checkpoint.background import BackgroundWriter
from forgather.checkpoint.folder import saved_steps
from forgather.checkpoint.run_folder import RunFolder
from forgather.checkpoint.store import CheckpointStore
from forgather.distributed.collectives import rank
from forgather.errors import CheckpointError
from tests.checkpoint.crashing import Victim
from tests.checkpoint.training import Position, Run, load_newest
from tests.ranks import RankPool


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[RunFolder]:
    with RunFolder(tmp_path / "run") as opened:
        yield opened


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[RankPool]:
    with RankPool(2) as pool:
        yield pool


def loaded(folder: RunFolder) -> dict[str, torch.Tensor]:
    """The values in the newest checkpoint."""
    run = Run(seed=9)
    store = CheckpointStore(folder, asynchronous=False)
    checkpoint = store.resume(run.state)
    assert checkpoint is not None
    return run.values()


def process_of(store: CheckpointStore) -> int:
    assert isinstance(store._writer, BackgroundWriter)
    return store._writer._process.pid


def test_what_was_saved_is_what_there_was_when_it_was_saved(folder: RunFolder) -> None:
    """The run goes on at once, and changes every tensor while they are being written."""
    run = Run()
    run.step()
    with CheckpointStore(folder) as store:
        store.save(run.state, 1)
        then = run.values()
        for value in (*run.state.weights().values(), *(v for s in run.optimizer.state.values() for v in s.values())):
            value.data.fill_(7)
    assert all(torch.equal(value, then[name]) for name, value in loaded(folder).items())


def test_a_save_is_told_once_when_it_is_whole(folder: RunFolder) -> None:
    run = Run()
    with CheckpointStore(folder) as store:
        assert store.committed() is None
        path = store.save(run.state, 1)
        until = time.monotonic() + 60
        while (told := store.committed()) is None and time.monotonic() < until:
            time.sleep(0.01)
        assert told is not None
        assert (told.step, told.path) == (1, path)
        assert path.is_dir()
        assert store.committed() is None
        store.save(run.state, 2)
        store.finish()
        told = store.committed()
        assert told is not None
        assert told.step == 2


def test_the_plan_changes_with_the_state(folder: RunFolder) -> None:
    """The optimizer's state comes into being at the first step, and a hook's may grow at any."""
    run = Run()
    hook: Any = Position()
    grown = torch.arange(3)
    hook.state_dict = lambda: {"seen": grown}
    run.state.extras = {"hook": hook}
    with CheckpointStore(folder) as store:
        store.save(run.state, 1)
        run.step()
        store.save(run.state, 2)
        grown = torch.arange(1000)
        run.step()
        store.save(run.state, 3)
        then = run.values()
    other: dict[str, Any] = {}
    hook.load_state_dict = other.update
    run.state.extras = {"hook": hook}
    store = CheckpointStore(folder, asynchronous=False)
    checkpoint = store.resume(run.state)
    assert checkpoint is not None
    assert torch.equal(other["seen"], torch.arange(1000))
    assert all(torch.equal(value, then[name]) for name, value in run.values().items())


def test_a_plan_is_made_once(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run()
    run.step()
    made = []
    with CheckpointStore(folder) as store:
        make = store._plans.make
        monkeypatch.setattr(store._plans, "make", lambda *args: (made.append(1), make(*args)))
        for step in (1, 2, 3):
            store.save(run.state, step)
            run.step()
    assert len(made) == 1


class Renaming:
    """A hook whose tensors have other names at each save, as contributions do that have a round in their name."""

    def __init__(self) -> None:
        self.round = 0
        self.given: weakref.ref[torch.Tensor] | None = None
        self.loaded: dict[str, torch.Tensor] = {}

    def state_dict(self) -> dict[str, torch.Tensor]:
        self.round += 1
        part = torch.full((100,), float(self.round))
        self.given = weakref.ref(part)
        return {f"part {self.round}": part}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.loaded = state


def test_names_of_hooks_that_change_cost_the_model_nothing(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """No plan for the model's tensors, no memory mapped anew, and nothing of the hook is held longer than it takes."""
    run = Run()
    run.step()
    hook = Renaming()
    run.state.extras = {"hook": hook}
    planned: list[set[str]] = []
    mapped: list[int] = []
    monkeypatch.setattr(plan, "make_plan", lambda here, make=plan.make_plan: planned.append(set(here)) or make(here))
    grow = BackgroundWriter._grow
    monkeypatch.setattr(BackgroundWriter, "_grow", lambda self, size: mapped.append(size) or grow(self, size))
    with CheckpointStore(folder) as store:
        for step in (1, 2, 3):
            store.save(run.state, step)
            assert hook.given is not None
            assert hook.given() is None
            run.step()
        run.step()
        store.save(run.state, 4)
        then = run.values()
    assert len(mapped) == 1
    assert [len(names) for names in planned[1:]] == [1, 1, 1, 1]
    other = Run(seed=9)
    other.state.extras = {"hook": hook}
    assert CheckpointStore(folder, asynchronous=False).resume(other.state) is not None
    assert all(torch.equal(value, then[name]) for name, value in other.values().items())
    assert {name: part.tolist() for name, part in hook.loaded.items()} == {"part 4": [4.0] * 100}


def test_the_death_of_the_writer_is_an_error_at_the_next_save(folder: RunFolder) -> None:
    run = Run()
    store = CheckpointStore(folder)
    store.save(run.state, 1)
    store.finish()
    os.kill(process_of(store), signal.SIGKILL)
    with pytest.raises(CheckpointError, match=r"that writes this rank's checkpoints was ended by signal 9"):
        store.save(run.state, 2) and store.finish()
    store.close()
    assert saved_steps(folder.checkpoints) == [1]
    store.save(run.state, 3)  # by a new one
    store.finish()
    store.close()
    assert saved_steps(folder.checkpoints) == [1, 3]


def test_a_part_that_never_comes_is_not_waited_for_long(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another rank is gone, or hangs, while this one ends with an error of its own."""
    monkeypatch.setattr(store_module, "world_size", lambda: 2)
    monkeypatch.setattr(store_module, "STALLED_S", 0.2)
    store = CheckpointStore(folder)
    store.save(Run().state, 1)
    start = time.monotonic()
    store.wait_alone(600)
    store.close()
    assert time.monotonic() - start < 60
    assert saved_steps(folder.checkpoints) == []


def test_a_save_whose_parts_come_is_waited_for(folder: RunFolder) -> None:
    store = CheckpointStore(folder)
    store.save(Run().state, 1)
    store.wait_alone(60)
    store.close()
    assert saved_steps(folder.checkpoints) == [1]


def test_memory_that_is_refused_is_an_error_of_the_save(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(BackgroundWriter, "_arrange", refuse)
    store = CheckpointStore(folder)
    with pytest.raises(CheckpointError, match=r"could not write .*step-00000001: Cannot allocate memory"):
        store.save(Run().state, 1) and store.finish()
    store.close()
    assert saved_steps(folder.checkpoints) == []


@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("place", ["a rank's part", "the layout of all"])
def test_what_cannot_be_written_is_an_error_at_the_end(folder: RunFolder, place: str, asked: bool) -> None:
    """Also where somebody has asked meanwhile whether it is whole, and was not told."""
    store = CheckpointStore(folder)
    run = Run()
    store.save(run.state, 1)
    store.finish()
    store.committed()
    if place == "a rank's part":
        (folder.checkpoints / ".step-00000002.partial").write_text("in the way")
    else:
        folder._descriptions["tensors.json/in the way"] = b""
    store.save(run.state, 2)
    until = time.monotonic() + 30
    while asked and store._heard is None and time.monotonic() < until:
        assert store.committed() is None
    with pytest.raises(CheckpointError, match=r"could not write .*step-00000002: (File exists|Is a directory)"):
        store.finish()
    store.close()
    assert saved_steps(folder.checkpoints) == [1]


def test_signals_of_a_terminal_do_not_end_it(folder: RunFolder) -> None:
    store = CheckpointStore(folder)
    run = Run()
    store.save(run.state, 1)
    store.finish()
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(process_of(store), number)
    store.save(run.state, 2)
    store.finish()
    store.close()
    assert saved_steps(folder.checkpoints) == [1, 2]


def hold(process: int) -> None:
    """Let a process do nothing any more, as a disk that does not answer would."""
    os.kill(process, signal.SIGSTOP)
    os.waitid(os.P_PID, process, os.WSTOPPED)


def test_a_writer_that_does_not_end_is_killed(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "ENDING_S", 0.2)
    store = CheckpointStore(folder)
    store.save(Run().state, 1)
    store.finish()
    writer = process_of(store)
    hold(writer)
    store.close()
    assert not Path(f"/proc/{writer}").exists()


def test_one_that_not_even_a_kill_ends_is_left_behind(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "ENDING_S", 0.1)
    store = CheckpointStore(folder)
    store.save(Run().state, 1)
    store.finish()
    assert isinstance(store._writer, BackgroundWriter)
    process = store._writer._process
    with monkeypatch.context() as patch:
        patch.setattr(process, "kill", lambda: None)
        hold(process.pid)
        store.close()
    process.kill()
    assert process.wait() == -signal.SIGKILL


def test_files_where_the_run_was_started_are_no_modules(
    folder: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "random.py").write_text("raise SystemExit('of the user')")
    monkeypatch.chdir(tmp_path)
    with CheckpointStore(folder) as store:
        store.save(Run().state, 1)
    assert saved_steps(folder.checkpoints) == [1]


def test_it_does_not_outlive_its_rank(tmp_path: Path) -> None:
    with Victim(tmp_path / "run", 10_000, asynchronous=True) as victim:
        victim.wait_for("saved")
        children = Path(f"/proc/{victim.pid}/task/{victim.pid}/children")
        (writer,) = [int(word) for word in children.read_text().split()]
        victim.kill()
    until = time.monotonic() + 30
    while Path(f"/proc/{writer}").exists() and time.monotonic() < until:
        time.sleep(0.01)
    assert not Path(f"/proc/{writer}").exists()


def test_it_knows_no_torch() -> None:
    code = "import forgather.checkpoint.writer, sys; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def save_on_two(folder: str, change: str) -> str:
    """Save with a hook whose state differs between the ranks in `change`; the error."""
    run = Run()
    hook: Any = Position()
    tensor = torch.zeros(5 + (rank() if change == "shape" else 0))
    tensor[-1] = rank() if change == "value" else 0
    hook.state_dict = lambda: {"mean": tensor}
    run.state.extras = {"hook": hook}
    with RunFolder(Path(folder)) as opened:
        store = CheckpointStore(opened)
        try:
            store.save(run.state, 1)
            store.finish()
        except CheckpointError as error:
            return str(error)
        finally:
            store.close()
    return "saved"


@pytest.mark.training_case(29, 31)
def test_tensors_that_share_a_name_and_differ_are_refused(tmp_path: Path, two_ranks: RankPool) -> None:
    """One of them would be lost, be it by its last element."""
    assert two_ranks.run(save_on_two, str(tmp_path / "same"), "nothing") == ["saved", "saved"]
    for change, said in (("value", "extras/hook/mean has other values on rank 1 than on rank 0"), ("shape", "[5]")):
        for message in two_ranks.run(save_on_two, str(tmp_path / change), change):
            assert said in message
            assert "put the rank into the key" in message
        assert list((tmp_path / change / "checkpoints").glob("step-*")) == []


def save_often(folder: str) -> list[str]:
    run = Run()
    names = []
    with RunFolder(Path(folder)) as opened, CheckpointStore(opened) as store:
        for step in range(1, 6):
            run.step()
            store.save(run.state, step)
            names.append(run.hash())
            while step == 2 and rank() == 0 and store.committed() is None:
                time.sleep(0.01)  # one rank has heard that it is whole when all save again, the other not
    return names


def test_ranks_that_save_beside_their_steps_agree(tmp_path: Path, two_ranks: RankPool) -> None:
    hashes = two_ranks.run(save_often, str(tmp_path / "run"))
    assert len(set(hashes[0])) == 5
    assert saved_steps(tmp_path / "run" / "checkpoints") == [4, 5]
    assert [digest for _, digest in two_ranks.run(load_newest, str(tmp_path / "run"))] == [h[-1] for h in hashes]
