"""Every way to go wrong has one message, its next action, and its exit code."""

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from forgather import __version__
from forgather.cli import main as main_module
from forgather.cli.commands import COMMANDS, load
from forgather.cli.main import main


def test_help_lists_every_command(forgather):
    for arguments in ([], ["--help"], ["-h"], ["-p", ".", "--help"]):
        done = forgather(*arguments)
        assert done.code == 0
        for name, (_, summary) in COMMANDS.items():
            assert f"  {name}" in done.out
            assert summary in done.out


@pytest.mark.parametrize("name", COMMANDS)
def test_modules_repeat_the_line_of_the_table(name):
    assert COMMANDS[name][1] == load(name).SUMMARY


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name, forgather):
    done = forgather(name, "--help")
    assert done.code == 0
    assert done.out.startswith(f"usage: forgather {name}")
    assert COMMANDS[name][1] in done.out
    assert done.err == ""


def test_version(forgather):
    assert forgather("--version").out == f"forgather {__version__}\n"


def test_an_unknown_command_shows_the_nearest(forgather):
    done = forgather("tarin")
    assert done.code == 2
    assert done.err == "error: unknown command 'tarin'\n  fix: did you mean train?\n"


def test_no_command_after_a_selection_is_an_error(forgather):
    assert forgather("-p", ".").code == 2


def test_a_flag_of_a_config_before_the_command_is_refused(forgather):
    done = forgather("--lr", "3", "show")
    assert done.code == 2
    assert "--lr stands before the command" in done.err


@pytest.mark.parametrize("arguments", [["show", "x", "y"], ["graph", "--format", "svg"], ["train", "--nproc", "0"]])
def test_what_argparse_refuses_is_a_user_error(arguments, forgather):
    done = forgather(*arguments)
    assert done.code == 2
    assert done.err.startswith(f"error: forgather {arguments[0]}: ")
    assert "usage:" not in done.err


def test_words_after_two_dashes_are_for_train_alone(forgather):
    done = forgather("show", "--", "x")
    assert done.code == 2
    assert "takes no words after `--`" in done.err


def test_an_interrupt_ends_with_130(forgather, monkeypatch):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(main_module, "_dispatch", interrupted)
    done = forgather("show")
    assert (done.code, done.err) == (130, "")


def test_a_defect_of_ours_escapes_with_its_traceback(monkeypatch):
    def defect(arguments):
        raise ZeroDivisionError

    monkeypatch.setattr(main_module, "_dispatch", defect)
    with pytest.raises(ZeroDivisionError):
        main(["show"])


def _run(*arguments, cwd, **settings):
    command = [sys.executable, "-m", "forgather", *arguments]
    return subprocess.run(command, cwd=cwd, stderr=subprocess.PIPE, text=True, **settings)


def test_a_reader_that_leaves_is_not_an_error(project):
    reader, writer = os.pipe()
    os.close(reader)
    done = _run("--help", cwd=project, stdout=writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("settings", [{}, {"NO_COLOR": "1"}, {"TERM": "dumb"}], ids=str)
def test_errors_are_coloured_on_a_terminal_only(settings, project):
    ours, theirs = pty.openpty()
    environment = {**{"TERM": "xterm"}, **settings}
    command = [sys.executable, "-m", "forgather", "tarin"]
    subprocess.run(command, cwd=project, stderr=theirs, env=environment, check=False)
    os.close(theirs)
    said = os.read(ours, 10_000)
    os.close(ours)
    assert (b"\033[31;1merror:\033[0m unknown command" in said) == (not settings)
    assert (b"\033" in said) == (not settings)
    assert b"\033" not in subprocess.run(command, cwd=project, stderr=subprocess.PIPE, check=False).stderr


def test_a_rank_that_is_no_number_is_told(forgather, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        with monkeypatch.context() as patch:
            patch.setenv("RANK", "0")
            patch.setenv(name, "x")
            done = forgather("targets")
        assert done.code == 2
        assert done.err.startswith(f"error: the environment variable {name} is 'x'")


def test_a_deleted_working_directory_is_told(project, tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    script = f"rmdir {gone}; exec {sys.executable} -m forgather ls"
    done = subprocess.run(["sh", "-c", script], cwd=gone, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: the working directory has been deleted\n  fix: change to a folder that exists\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("unbuffered", [[], ["-u"]], ids=str)
def test_output_to_a_full_disk_is_told(unbuffered, project):
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, *unbuffered, "-m", "forgather", "show"]
        done = subprocess.run(command, cwd=project, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == (
        "error: the output cannot be written: No space left on device\n  fix: make room on its disk\n"
    )
