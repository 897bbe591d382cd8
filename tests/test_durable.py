"""What has its name is whole and on the disk; what failed has left nothing."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from forgather import durable
from forgather.durable import appearing
from forgather.errors import ForgatherError


@contextmanager
def what_is_done() -> Iterator[list[str]]:
    """The names that are synced, renamed and moved, in that order; of moved ones the new name, after a '>'."""
    done: list[str] = []
    fsync, rename, replace = os.fsync, Path.rename, Path.replace

    def synced(descriptor: int) -> None:
        done.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    def renamed(path: Path, target: Path) -> Path:
        done.append(f"> {target.name}")
        return rename(path, target)

    def replaced(path: Path, target: Path) -> Path:
        done.append(f"> {target.name}")
        return replace(path, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", synced)
        patch.setattr(Path, "rename", renamed)
        patch.setattr(Path, "replace", replaced)
        yield done


def test_everything_is_on_the_disk_before_the_folder_has_its_name(tmp_path: Path) -> None:
    with what_is_done() as done, appearing(tmp_path / "made") as folder:
        (folder / "below").mkdir()
        (folder / "below" / "b.bin").write_bytes(b"b")
        (folder / "a.json").write_text("{}")
    at = done.index("> made")
    assert sorted(done[:at]) == [".made.partial", "a.json", "b.bin", "below"]
    assert done[at + 1 :] == [tmp_path.name]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_what_fails_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    (tmp_path / ".made.partial").mkdir()
    (tmp_path / ".made.partial" / "of a killed writer").write_text("")

    def fail() -> None:
        with appearing(tmp_path / "made") as folder:
            assert not list(folder.iterdir())
            raise error

    with pytest.raises(error):
        fail()
    assert not list(tmp_path.iterdir())


def test_a_name_that_is_not_on_the_disk_is_told_from_a_folder_that_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_to_sync(tmp_path, monkeypatch)
    with pytest.raises(ForgatherError, match=r"made is written and whole(.|\n)*fix: "), appearing(tmp_path / "made"):
        pass
    assert (tmp_path / "made").is_dir()


def refuse_to_sync(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sync = durable.sync

    def refusing(path: Path) -> None:
        if path == folder:
            raise OSError(errno.EIO, "Input/output error", str(path))
        sync(path)

    monkeypatch.setattr(durable, "sync", refusing)
