"""A run folder has one live run, and nothing in it is overwritten."""

import errno
import multiprocessing
import os
from pathlib import Path

import pytest

from forgather.checkpoint.run_folder import RunFolder
from forgather.distributed.collectives import rank
from forgather.errors import CheckpointError
from tests.checkpoint.crashing import Victim
from tests.ranks import run_ranks


def test_a_second_live_run_is_refused_and_the_first_is_named(tmp_path: Path) -> None:
    with Victim(tmp_path / "run", 10_000) as victim:
        victim.wait_for("resumed")
        with pytest.raises(CheckpointError, match="is used by a live run: process") as raised:
            RunFolder(tmp_path / "run")
        assert str(victim.pid) in str(raised.value)
        assert os.uname().nodename in str(raised.value)
        RunFolder(tmp_path / "run", fresh=True).close()
    RunFolder(tmp_path / "run").close()  # the kill has released it


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("forgather.checkpoint.lock.fcntl.flock", refused)
    with pytest.raises(
        CheckpointError, match=r"cannot lock .*run/\.lock: No locks available\n.*file system with locks"
    ):
        RunFolder(tmp_path / "run")


def test_a_folder_of_runs_is_no_run(tmp_path: Path) -> None:
    RunFolder(tmp_path / "first").close()
    with pytest.raises(CheckpointError, match=r"cannot be a run: it holds the runs first\n.*name one of these"):
        RunFolder(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first"]


def open_on_another_host(folder: str) -> str:
    """Where rank 1 has a disk of its own."""
    if rank() == 1:
        is_dir = Path.is_dir
        Path.is_dir = lambda path: not str(path).startswith(folder) and is_dir(path)  # type: ignore[method-assign]
    try:
        RunFolder(Path(folder) / "run").close()
    except CheckpointError as error:
        return str(error)
    return "opened"


def test_a_folder_that_a_rank_does_not_see_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    for message in run_ranks(2, open_on_another_host, str(tmp_path)):
        assert f"rank 1 does not see {tmp_path / 'run'}" in message
        assert "all hosts share" in message
    RunFolder(tmp_path / "run").close()


def open_in_child(folder: str) -> str:
    try:
        RunFolder(Path(folder)).close()
    except CheckpointError as error:
        return error.message
    return "opened"


def wait_for_ever(barrier: "multiprocessing.synchronize.Barrier") -> None:
    barrier.wait()
    barrier.wait()


def test_a_forked_worker_does_not_keep_the_folder_of_a_dead_run(tmp_path: Path) -> None:
    """A loader's workers are forks of the run; those that a kill -9 leaves behind must not look like the run."""
    fork = multiprocessing.get_context("fork")
    barrier = fork.Barrier(2)
    folder = RunFolder(tmp_path / "run")
    worker = fork.Process(target=wait_for_ever, args=(barrier,))
    worker.start()
    barrier.wait()
    folder.close()
    try:
        RunFolder(tmp_path / "run").close()
    finally:
        barrier.wait()
        worker.join()


@pytest.mark.training_case(25)
def test_fresh_takes_the_first_name_that_is_free(tmp_path: Path) -> None:
    dirs = []
    for _ in range(3):
        with RunFolder(tmp_path / "runs" / "default", fresh=True) as folder:
            (folder.dir / "mine").write_text("")
            dirs.append(folder.dir.name)
    assert dirs == ["default", "default-2", "default-3"]
    with RunFolder(tmp_path / "runs" / "default") as folder:
        assert folder.dir.name == "default"
        assert (folder.dir / "mine").exists()


def opened_dir(folder: str) -> str:
    with RunFolder(Path(folder), fresh=True) as opened:
        return opened.dir.name


def test_rank_0_decides_for_all(tmp_path: Path) -> None:
    assert run_ranks(2, opened_dir, str(tmp_path / "run")) == ["run", "run"]
    with RunFolder(tmp_path / "run"):
        messages = run_ranks(2, open_in_child, str(tmp_path / "run"))
    assert all("used by a live run" in message for message in messages)
    assert run_ranks(2, opened_dir, str(tmp_path / "run")) == ["run-2", "run-2"]


def test_a_description_is_taken_when_it_is_given(tmp_path: Path) -> None:
    package = tmp_path / "package"
    (package / "runs").mkdir(parents=True)
    (package / "config.json").write_text("{}")
    (package / "model.safetensors").write_bytes(b"weights")
    with RunFolder(package / "runs" / "default") as folder:
        folder.describe("package", package)
        folder.describe("config.yaml", "a: 1\n")
        (package / "config.json").write_text("changed while the run goes on")
    assert folder.descriptions == {"package/config.json": b"{}", "config.yaml": b"a: 1\n"}
