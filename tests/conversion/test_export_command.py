"""`forgather export` as it is typed."""

from pathlib import Path

import pytest

from forgather.cli.main import main
from forgather.cli.weight_flags import num_bytes
from forgather.errors import EXIT_OK, EXIT_USER, ForgatherError
from tests.conversion.test_export import save_run


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_run(str(tmp_path / "run"))
    run, out = str(tmp_path / "run"), str(tmp_path / "out")
    assert main(["export", run, out, "--max-shard-size", "4KB", "--dtype", "bf16"]) == EXIT_OK
    assert "weights in" in capsys.readouterr().out
    assert main(["export", run, out]) == EXIT_USER
    assert "already there" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "number"), [("5GB", 5 * 10**9), ("2 GiB", 2**31), ("1.5mb", 1_500_000), ("4096", 4096)]
)
def test_sizes_are_read(text: str, number: int) -> None:
    assert num_bytes(text) == number


@pytest.mark.parametrize("text", ["", "many", "5XB", "-1GB", "0"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ForgatherError, match="is no size"):
        num_bytes(text)
