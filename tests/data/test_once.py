"""A folder that is made once: whole, and on the disk before it has its name."""

import os
from pathlib import Path

import pytest

from forgather.data.once import made_once


def test_everything_is_on_the_disk_before_the_folder_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def synced(descriptor: int) -> None:
        done.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    def renamed(path: Path, target: Path) -> Path:
        done.append("rename")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    with made_once(tmp_path / "made") as folder:
        assert folder is not None
        (folder / "below").mkdir()
        (folder / "below" / "b.bin").write_bytes(b"b")
        (folder / "a.json").write_text("{}")
    before, after = done[: done.index("rename")], done[done.index("rename") + 1 :]
    assert sorted(before) == [".made.partial", "a.json", "b.bin", "below"]
    assert after == [tmp_path.name]
    with made_once(tmp_path / "made") as folder:
        assert folder is None
