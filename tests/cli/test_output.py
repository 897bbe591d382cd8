"""Where a command's text goes: the terminal line by line, a file, an editor; and what is refused before any work."""

import io
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from forgather.cli.output import Output
from forgather.cli.parser import UsageError


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def use_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a fixture: pytest gives each phase of a test streams of its own."""
    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr(sys, "stdout", Terminal())
    for name in ("VISUAL", "EDITOR"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def editor(tmp_path: Path) -> SimpleNamespace:
    """An editor that appends its arguments but the last, and its name, to the file it is given."""

    def make(name: str, code: int = 0) -> str:
        path = tmp_path / name
        path.write_text(f'#!/bin/sh\nfor file; do :; done\necho "{name} $#" >> "$file"\nexit {code}\n')
        path.chmod(0o755)
        return str(path)

    return SimpleNamespace(make=make)


def test_lines_are_shown_as_they_come(capsys: pytest.CaptureFixture[str]) -> None:
    output = Output(None, edit=False, name="x")
    output.write("one")
    assert capsys.readouterr().out == "one\n"
    output.close()
    assert capsys.readouterr().out == ""


def test_a_file_has_all_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = Output(str(tmp_path / "x.txt"), edit=False, name="x")
    output.write("one")
    output.write("two")
    assert not (tmp_path / "x.txt").exists()
    output.close()
    assert (tmp_path / "x.txt").read_text() == "one\ntwo\n"
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("visual", "plain", "expected"),
    [("visual --wait", "plain", "visual 2"), (" ", "plain", "plain 1"), ("", "", "vi 1")],
)
def test_visual_goes_before_editor_and_vi_comes_last(
    visual: str, plain: str, expected: str, editor: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_terminal(monkeypatch)
    for name in ("vi", "visual", "plain"):
        editor.make(name)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("VISUAL", visual)
    monkeypatch.setenv("EDITOR", plain)
    output = Output(str(tmp_path / "x.txt"), edit=True, name="x")
    output.write("text")
    output.close()
    assert (tmp_path / "x.txt").read_text() == f"text\n{expected}\n"


def test_without_a_file_a_temporary_one_is_edited_and_kept(
    editor: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use_terminal(monkeypatch)
    monkeypatch.setenv("VISUAL", editor.make("visual"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    output = Output(None, edit=True, name="4M")
    output.write("text")
    output.close()
    [written] = tmp_path.glob("forgather-*/4M.txt")
    assert written.read_text() == "text\nvisual 1\n"
    assert f"output: {written}" in capsys.readouterr().err


def test_an_editor_that_fails_is_told_with_the_file(
    editor: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_terminal(monkeypatch)
    monkeypatch.setenv("EDITOR", editor.make("broken", code=3))
    output = Output(str(tmp_path / "x.txt"), edit=True, name="x")
    with pytest.raises(UsageError, match=r"exit code 3; the output is in .*x\.txt"):
        output.close()


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [("EDITOR", "nonesuch", "EDITOR names 'nonesuch'"), ("VISUAL", "'open", "VISUAL cannot be read")],
)
def test_an_editor_that_is_not_there(variable: str, value: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_terminal(monkeypatch)
    monkeypatch.setenv(variable, value)
    with pytest.raises(UsageError, match=said) as raised:
        Output(None, edit=True, name="x")
    assert f"export {variable}=" in str(raised.value.fix)


def test_no_editor_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_terminal(monkeypatch)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match="neither VISUAL nor EDITOR is set, and there is no vi"):
        Output(None, edit=True, name="x")


@pytest.mark.parametrize("stream", ["stdin", "stdout"])
def test_no_terminal(stream: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_terminal(monkeypatch)
    monkeypatch.setattr(sys, stream, io.StringIO())
    with pytest.raises(UsageError, match="no terminal") as raised:
        Output(None, edit=True, name="x")
    assert "-o FILE" in str(raised.value.fix)


def test_a_file_that_cannot_be_written_is_told_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="it is a folder"):
        Output(str(tmp_path), edit=False, name="x")
    with pytest.raises(UsageError, match="its folder is not there"):
        Output(str(tmp_path / "nowhere" / "x"), edit=False, name="x")
