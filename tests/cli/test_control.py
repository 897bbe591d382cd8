"""`forgather control` finds live runs, and prints what they answer."""

import json
import os
import threading

import pytest

from forgather.cli.main import main
from forgather.trainers.commands import Command
from forgather.trainers.control_server import ControlServer


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A live run in `runs/one`, beside one that is not live; obeys each command after step 7."""
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        (tmp_path / "runs" / name / "checkpoints").mkdir(parents=True)
    status = {"state": "training", "step": 6, "steps": 9, "loss": 1.5, "steps_per_s": None, "ranks": 2, "pid": 5}
    refuse = {Command.DECAY: "there is no decay"}.get
    folder = tmp_path / "runs" / "one"
    server = ControlServer(folder, status=lambda: status, refuse=refuse)
    server.start()
    ended = threading.Event()

    def obey() -> None:
        while not ended.wait(0.01):
            server.obeyed(7, server.take())
            server.saved(7, folder / "checkpoints" / "step-00000007")

    loop = threading.Thread(target=obey)
    loop.start()
    yield folder
    ended.set()
    loop.join()
    server.close("the run ended")


def said(capsys, *arguments):
    code = main(["control", *arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_the_list_has_live_runs_and_no_others(run, capsys):
    assert said(capsys, "list") == (0, "runs/one  training 6/9  loss 1.5000    2 ranks  process 5\n", "")
    assert said(capsys, "list", "runs/two") == (0, "no live run below runs/two\n", "")


def test_status_is_json(run, capsys):
    code, out, _ = said(capsys, "status", "runs/one")
    assert code == 0
    assert json.loads(out)["step"] == 6


@pytest.mark.parametrize(
    ("verb", "words"),
    [
        ("save", "saved {}/checkpoints/step-00000007"),
        ("stop", "the run ends after step 7, and saves"),
        ("save-stop", "the run ends after step 7; saved {}/checkpoints/step-00000007"),
        ("abort", "the run ends after step 7, and saves nothing"),
    ],
)
def test_a_command_says_what_it_came_to(verb, words, run, capsys):
    assert said(capsys, verb, "runs/one") == (0, words.format(run) + "\n", "")


def test_what_cannot_be_done_is_an_error(run, capsys):
    code, _, err = said(capsys, "decay", "runs/one")
    assert (code, err) == (2, "error: runs/one: there is no decay\n")
    code, _, err = said(capsys, "list", "nosuch")
    assert (code, err.splitlines()[0]) == (2, "error: there is no folder nosuch")
    code, _, err = said(capsys, "stop", "runs/two")
    assert (code, err.splitlines()[0]) == (2, "error: no live run in runs/two")
    code, _, err = said(capsys, "stop", "runs")
    assert (code, err.splitlines()[0]) == (2, "error: runs is no run folder")
    code, _, err = said(capsys, "stop", "runs/one", "--timeout", "soon")
    assert (code, "'soon' is not a number of seconds above 0" in err) == (2, True)


def test_it_needs_no_torch(run):
    import subprocess
    import sys

    script = "import sys; from forgather.cli.main import main; main(['control', 'list']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=os.environ, check=True)
    assert done.stdout.splitlines()[-1] == "False"
