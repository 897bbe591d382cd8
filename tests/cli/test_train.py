"""`forgather train` runs one rank here, starts several, or is one of them."""

import os
import socket
import subprocess
import sys
from types import ModuleType

import pytest

from forgather.cli import train


@pytest.fixture
def started(monkeypatch):
    """What was called instead of training: a list of (name, arguments)."""
    calls = []
    worker = ModuleType("forgather.trainers.worker")
    launcher = ModuleType("forgather.distributed.launcher")

    def run_worker(project, *, fresh, dry_run, refresh_model):
        calls.append(("worker", project.config_name, fresh, dry_run, refresh_model, project.show("main")))
        return 75

    def launch(module, arguments, processes, extra, *, timeout_s):
        calls.append(("launch", module, arguments, processes, extra))
        assert timeout_s == 0.0, "this config does not say how long a collective may take"
        return 75

    worker.run_worker = run_worker
    launcher.launch = launch
    monkeypatch.setitem(sys.modules, "forgather.trainers.worker", worker)
    monkeypatch.setitem(sys.modules, "forgather.distributed.launcher", launcher)
    monkeypatch.setattr(train, "count_cuda_devices", lambda: 0)
    return calls


def test_without_devices_one_rank_runs_in_this_process(forgather, started):
    done = forgather("train", "--fresh", "main.steps=7", "--lr", "1.5")
    assert done.code == 75
    ((name, config, fresh, dry_run, refresh_model, shown),) = started
    assert (name, config.removesuffix(".yaml"), fresh, dry_run, refresh_model) == (
        "worker",
        "train",
        True,
        False,
        False,
    )
    assert "steps: 7" in shown
    assert "lr: 1.5" in shown


def test_several_ranks_get_the_same_words(forgather, started):
    words = ["-t", "train", "train", "--nproc", "2", "main.steps=7", "--lr=-1", "--dry-run"]
    assert forgather(*words).code == 75
    assert started == [("launch", "forgather", words, 2, [])]


def test_several_hosts_and_restarts_are_said_to_torchrun(forgather, started):
    words = ["train", "--nnodes", "2:4", "--rdzv-endpoint", "a:29500", "--max-restarts", "3", "--nproc", "1"]
    assert forgather(*words).code == 75
    meeting = ["--nnodes=2:4", "--rdzv-backend=c10d", "--rdzv-endpoint=a:29500", "--max-restarts=3"]
    assert started == [("launch", "forgather", words, 1, meeting)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nnodes", "2"], "--nnodes 2 needs a place to meet"),
        (["--nnodes", "4:2"], "'4:2' is not a number of hosts"),
        (["--max-restarts", "-1"], "'-1' is not a number of restarts"),
    ],
)
def test_what_hosts_cannot_do_is_told_before_any_rank_starts(words, message, forgather, started):
    done = forgather("train", *words)
    assert (done.code, started) == (2, [])
    assert message in done.err


def test_words_after_two_dashes_are_for_torchrun(forgather, started):
    forgather("train", "--", "--max-restarts", "3")
    assert started == [("launch", "forgather", ["train"], 1, ["--max-restarts", "3"])]


@pytest.mark.parametrize(("arguments", "count"), [((), 8), (("--nproc", "2"), 2), (("--device", "cpu"), 1)])
def test_by_default_there_is_a_rank_for_each_device(arguments, count, forgather, started, project, monkeypatch):
    path = project / "configs" / "train.yaml"
    path.write_text(path.read_text().replace("  steps: 300\n", "  steps: 300\n  device: auto\n"))
    monkeypatch.setattr(train, "count_cuda_devices", lambda: 8)
    forgather("train", *arguments)
    assert [call[3] if call[0] == "launch" else 1 for call in started] == [count]


def test_a_broken_config_is_told_before_any_rank_starts(forgather, started):
    assert forgather("train", "--nproc", "2", "mian.steps=1").code == 2
    assert started == []


def test_a_config_without_main_is_of_another_kind(forgather, started, project):
    (project / "configs" / "data.yaml").write_text("numbers: [1]\n")
    done = forgather("-t", "data", "train")
    assert done.code == 2
    assert "is of another kind: `forgather train` needs main" in done.err


def test_started_by_torchrun_it_is_a_rank(project):
    script = (
        "import sys; from types import ModuleType\n"
        "worker = ModuleType('forgather.trainers.worker')\n"
        "worker.run_worker = lambda project, **flags: print('rank of', project.config_name) or 3\n"
        "sys.modules['forgather.trainers.worker'] = worker\n"
        "from forgather.cli.main import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-c", script, "train", "--nproc", "8"]
    environment = {**os.environ, "RANK": "0", "WORLD_SIZE": "2"}
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (3, "")
    assert done.stdout.startswith("rank of train")


def test_a_rank_that_torchrun_started_tells_a_user_error_in_two_lines(project):
    command = [sys.executable, "-m", "forgather", "train", "mian.steps=1"]
    environment = {**os.environ, "RANK": "1", "WORLD_SIZE": "2"}
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: rank 1 of 2 on {socket.gethostname()}: ")
    assert len(done.stderr.splitlines()) == 2
