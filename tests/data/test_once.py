"""A folder that is made once."""

from pathlib import Path

import pytest

from forgather.data.once import made_once
from forgather.errors import DataError
from tests.test_durable import what_is_done


def test_it_is_made_once_and_on_the_disk_before_it_has_its_name(tmp_path: Path) -> None:
    with what_is_done() as done, made_once(tmp_path / "made") as folder:
        assert folder is not None
        (folder / "a.json").write_text("{}")
    assert done == ["a.json", ".made.partial", "> made", tmp_path.name]
    with made_once(tmp_path / "made") as folder:
        assert folder is None


def test_a_folder_below_a_file_is_refused_with_its_path(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(DataError, match=r"cannot make the folder .*file: .*\n  fix: set another"),
        made_once(tmp_path / "file" / "made"),
    ):
        pass
