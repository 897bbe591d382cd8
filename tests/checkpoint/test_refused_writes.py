"""What the operating system refuses: the earlier checkpoint stays whole, and the error names path, cause and fix."""

import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from forgather.checkpoint.run_folder import RunFolder
from forgather.checkpoint.store import CheckpointStore
from forgather.errors import CheckpointError, ForgatherError
from tests.checkpoint.training import Run, damage_in
from tests.ranks import RankPool
from tests.test_durable import refuse_to_sync


def mount(*words: str) -> None:
    """Mount something, or skip where that is not allowed."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to mount")
    done = subprocess.run(["mount", *words], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"cannot mount here: {done.stderr.strip()}")


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Let nobody write into `folder`, also not root, whom modes do not stop."""
    if os.geteuid() == 0:
        mount("--bind", str(folder), str(folder))
        try:
            mount("-o", "remount,ro,bind", str(folder))
            yield
        finally:
            subprocess.run(["umount", str(folder)], check=True)
    else:
        folder.chmod(0o555)
        try:
            yield
        finally:
            folder.chmod(0o755)


def assert_only_step_1(run: Path) -> None:
    names = [path.name for path in (run / "checkpoints").iterdir()]
    assert names == ["step-00000001"]
    assert damage_in(run / "checkpoints" / "step-00000001") == []


def test_a_read_only_folder(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run") as folder:
        store = CheckpointStore(folder, asynchronous=False)
        run = Run()
        store.save(run.state, 1)
        with read_only(folder.checkpoints), pytest.raises(CheckpointError) as raised:
            store.save(run.state, 2)
        assert str(folder.checkpoints / "step-00000002") in raised.value.message
        assert "Read-only file system" in raised.value.message or "Permission denied" in raised.value.message
        assert f"make {folder.checkpoints} writable" in str(raised.value)
        assert_only_step_1(folder.dir)
        store.save(run.state, 2)


def test_a_full_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount("-t", "tmpfs", "-o", "size=512k", "tmpfs", str(disk))
    try:
        with RunFolder(disk / "run") as folder:
            store = CheckpointStore(folder, asynchronous=False)
            run = Run()
            store.save(run.state, 1)
            (disk / "ballast").write_bytes(bytes(shutil.disk_usage(disk).free - 20_000))
            with pytest.raises(CheckpointError) as raised:
                store.save(run.state, 2)
            assert "No space left on device" in raised.value.message
            assert str(folder.checkpoints / "step-00000002") in raised.value.message
            assert f"free space where {folder.checkpoints} is" in str(raised.value)
            assert_only_step_1(folder.dir)
            (disk / "ballast").unlink()
            store.save(run.state, 2)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def save_with_small_files(folder: str) -> str:
    """Save twice, the second time where no file may grow beyond 20 kB; return the error."""
    run = Run(hidden=32)
    with RunFolder(Path(folder)) as opened:
        store = CheckpointStore(opened, asynchronous=False)
        store.save(run.state, 1)
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        try:
            store.save(run.state, 2)
        except CheckpointError as error:
            return str(error)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    return "saved"


def test_a_file_that_may_not_grow(tmp_path: Path) -> None:
    """Needs no root: a limit on the size of files is refused in the middle of a write, as a full disk is."""
    with RankPool(2) as pool:
        messages = pool.run(save_with_small_files, str(tmp_path / "run"))
    for message in messages:
        assert "File too large" in message
        assert "step-00000002" in message
        assert "earlier checkpoints are untouched" in message
    assert_only_step_1(tmp_path / "run")


def test_a_checkpoint_that_stands_is_not_said_to_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with RunFolder(tmp_path / "run") as folder:
        refuse_to_sync(folder.checkpoints, monkeypatch)
        with pytest.raises(ForgatherError) as raised:
            CheckpointStore(folder, asynchronous=False).save(Run().state, 1)
    assert "step-00000001 is written and whole" in raised.value.message
    assert "could not write" not in str(raised.value)
    assert raised.value.fix
    assert_only_step_1(folder.dir)


def test_a_run_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot open the run folder"):
        RunFolder(tmp_path / "file" / "run")
