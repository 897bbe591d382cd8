"""A training config with a server is a worker of it, also when it is stopped and goes on; else it trains alone."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from forgather import Project
from forgather.diloco.address import naming
from forgather.diloco.security import TOKEN_VARIABLE, write_secret
from forgather.diloco.training import KEY_NAME
from forgather.errors import EXIT_OK, EXIT_RESUMABLE, ConfigError, ForgatherError, TrainingError
from forgather.metrics.sinks import read_rows
from forgather.trainers.worker import run_worker
from tests.diloco.running_server import TOKEN, RunningServer, running_server, settings_of
from tests.diloco.test_worker import wait_for
from tests.trainers.test_worker import folder  # noqa: F401  a fixture


@contextmanager
def server_of(
    folder: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    **settings: Any,
) -> Iterator[tuple[RunningServer, dict[str, Any]]]:
    """A server with the first weights of the project's model, and the arguments of a run that is its worker."""
    model = Project(folder, args={"run_name": "of the server"}).session().build("model")
    values: dict[str, Tensor] = {name: value.detach().clone() for name, value in model.named_parameters()}
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    with running_server(
        tmp_path / "server", values, settings_of(values, **{"sync_every": 2, "work_units": 4} | settings)
    ) as server:
        arguments = {
            "run_name": f"worker of {tmp_path.name}",
            "diloco_server": f"{server.host}:{server.port}",
            "diloco_worker": "alpha",
            "async_save": False,
        }
        yield server, arguments


def weights_of(folder: Path, run: str, step: int) -> dict[str, Tensor]:  # noqa: F811
    from forgather.checkpoint.layout import read_layout
    from forgather.checkpoint.storage import read_tensor

    path = folder / "runs" / run / "checkpoints" / f"step-{step:08d}"
    layout = read_layout(path)
    return {name: read_tensor(path, layout, name) for name in layout if name.startswith("model/")}


def test_a_run_with_a_server_that_only_averages_is_the_run_that_it_is_alone(folder, tmp_path, monkeypatch, capsys):  # noqa: F811
    with server_of(folder, tmp_path, monkeypatch) as (server, arguments):
        assert run_worker(Project(folder, args={"run_name": "alone"})) == EXIT_OK
        assert run_worker(Project(folder, args=arguments)) == EXIT_OK
        said = capsys.readouterr().err
        assert "diloco: worker alpha of 127.0.0.1" in said
        assert TOKEN not in said
        status = server.status()
        assert status["versions"] == [2]
        assert status["workers"]["alpha"]["state"] == "left"
        assert status["workers"]["alpha"]["mesh"] == "one process"
        alone, with_server = (weights_of(folder, name, 4) for name in ("alone", arguments["run_name"]))
        assert all(torch.equal(alone[name], value) for name, value in with_server.items())
        for name, value in with_server.items():
            assert torch.equal(server.published(name.removeprefix("model/")), value)
    rows = read_rows(folder / "runs" / arguments["run_name"] / "logs" / "metrics.jsonl", "train")
    assert [row["diloco/round"] for row in rows] == [0, 1, 1, 2]
    assert rows[1]["diloco/up_mb"] > 0
    [account] = read_rows(folder / "runs" / arguments["run_name"] / "logs" / "metrics.jsonl", "goodput")
    assert account["exchange_s"] >= rows[1]["diloco/sync_s"] * 0.5 > 0  # what it waits for is not useful
    key = folder / "runs" / arguments["run_name"] / KEY_NAME
    assert key.stat().st_mode & 0o077 == 0


def test_a_stopped_run_goes_on_as_the_same_worker(folder, tmp_path, monkeypatch):  # noqa: F811
    with server_of(folder, tmp_path, monkeypatch) as (server, arguments):
        stopping = Project(folder, args=arguments, words=["main.hooks.stopper.at=3"])
        assert run_worker(stopping) == EXIT_RESUMABLE
        key = (folder / "runs" / arguments["run_name"] / KEY_NAME).read_text()
        assert run_worker(Project(folder, args=arguments)) == EXIT_OK
        assert (folder / "runs" / arguments["run_name"] / KEY_NAME).read_text() == key
        assert server.status()["workers"]["alpha"]["counted"] == 2
        assert run_worker(Project(folder, args={"run_name": "undisturbed"})) == EXIT_OK
        undisturbed = weights_of(folder, "undisturbed", 4)
        resumed = weights_of(folder, arguments["run_name"], 4)
        assert all(torch.equal(undisturbed[name], value) for name, value in resumed.items())


def test_a_run_does_not_go_on_with_a_server_of_another_training(folder, tmp_path, monkeypatch):  # noqa: F811
    """Its values, rounds and leases would be nothing there; before it was refused it lost all that it had learned."""
    with server_of(folder, tmp_path, monkeypatch) as (_, arguments):
        assert run_worker(Project(folder, args=arguments, words=["main.hooks.stopper.at=3"])) == EXIT_RESUMABLE
    before = weights_of(folder, arguments["run_name"], 3)
    (tmp_path / "other").mkdir()
    with server_of(folder, tmp_path / "other", monkeypatch, training="another") as (other, others):
        arguments |= {"diloco_server": others["diloco_server"]}
        with pytest.raises(TrainingError, match="a worker of another training") as refused:
            run_worker(Project(folder, args=arguments))
        assert "-o" in str(refused.value.fix)
        assert other.status()["versions"] == [0]
    assert all(torch.equal(value, before[name]) for name, value in weights_of(folder, arguments["run_name"], 3).items())


@pytest.mark.parametrize(
    ("settings", "given", "said"),
    [
        ({"work_units": 0}, {}, "the server leases none"),
        ({}, {"diloco_sync_every": 9}, "this worker was given 9"),
        ({}, {"token": "another-token-than-it-has"}, "has another token"),
    ],
    ids=["leases", "H", "token"],
)
def test_a_run_that_is_not_welcome_has_prepared_nothing(folder, tmp_path, monkeypatch, settings, given, said):  # noqa: F811
    built: list[str] = []
    monkeypatch.setattr("forgather.trainers.worker._build", lambda *_: built.append("main"))
    with server_of(folder, tmp_path, monkeypatch, **settings) as (server, arguments):
        monkeypatch.delenv(TOKEN_VARIABLE)
        write_secret(tmp_path / "token", given.pop("token", TOKEN).encode())
        key, _, _ = naming("token_file", "COPY").partition("=")  # as remedies name it
        project = Project(folder, args=arguments | given, words=[f"{key}={tmp_path / 'token'}"])
        with pytest.raises(ForgatherError, match=said):
            run_worker(project, dry_run=True)
        assert not server.status()["workers"]
    assert not built


def test_the_server_may_tell_a_run_to_save_and_to_stop(folder, tmp_path, monkeypatch):  # noqa: F811
    with server_of(folder, tmp_path, monkeypatch, heartbeat_s=0.02) as (server, arguments):
        ended: list[int] = []
        project = Project(folder, args=arguments | {"steps": 100_000, "log_every": None, "eval_every": None})
        run = threading.Thread(target=lambda: ended.append(run_worker(project)))
        run.start()
        checkpoints = folder / "runs" / arguments["run_name"] / "checkpoints"
        wait_for(lambda: server.status()["versions"][0] > 0, 30)
        server.call(lambda: server.coordinator.controls.command("alpha", "save"))
        wait_for(lambda: any(checkpoints.glob("step-*")), 30)
        assert not ended
        server.call(lambda: server.coordinator.controls.command(None, "stop"))
        run.join(30)
        assert ended == [EXIT_RESUMABLE]


def test_a_run_that_waits_for_others_can_be_stopped(folder, tmp_path, monkeypatch):  # noqa: F811
    with server_of(folder, tmp_path, monkeypatch, sync_every=2) as (server, arguments):
        server.call(lambda: server.coordinator.controls.set(num_workers=2))
        asked = threading.Event()
        monkeypatch.setattr("forgather.trainers.control.Control.is_asked_to_end", lambda self: asked.is_set())
        ended: list[int] = []
        words = ["main.hooks.stopper.at=2"]
        run = threading.Thread(target=lambda: ended.append(run_worker(Project(folder, args=arguments, words=words))))
        run.start()
        wait_for(lambda: server.status()["held"][0]["workers"] == ["alpha"], 30)
        assert not ended
        asked.set()
        run.join(30)
        assert ended == [EXIT_RESUMABLE]  # and what it has sent is there when it comes again
        assert server.status()["held"][0]["workers"] == ["alpha"]


@pytest.mark.parametrize("sync_every", [3, 100])
def test_a_run_that_ends_within_a_cycle_sends_the_rest_and_saves_what_comes_back(
    folder,  # noqa: F811
    tmp_path,
    monkeypatch,
    capsys,
    sync_every,
):
    with server_of(folder, tmp_path, monkeypatch, sync_every=sync_every) as (server, arguments):
        assert run_worker(Project(folder, args=arguments)) == EXIT_OK
        status = server.status()
        assert status["versions"] == [2 if sync_every == 3 else 1]
        assert sum(each["tokens"] for each in status["history"]) == 4 * 64
        saved = weights_of(folder, arguments["run_name"], 4)
        for name, value in saved.items():
            assert torch.equal(server.published(name.removeprefix("model/")), value)
        warned = "this run makes 4 steps, and the server has its workers exchange every 100" in capsys.readouterr().err
        assert warned is (sync_every == 100)


def test_a_drained_run_sends_what_it_has_and_saves_after_that(folder, tmp_path, monkeypatch):  # noqa: F811
    with server_of(folder, tmp_path, monkeypatch, sync_every=100_000, heartbeat_s=0.02) as (server, arguments):
        ended: list[int] = []
        project = Project(folder, args=arguments | {"steps": 100_000, "log_every": None, "eval_every": None})
        run = threading.Thread(target=lambda: ended.append(run_worker(project)))
        run.start()
        wait_for(lambda: server.status()["workers"].get("alpha", {}).get("steps", 0) > 1, 30)
        server.call(server.coordinator.controls.drain)
        run.join(30)
        assert ended == [EXIT_RESUMABLE]
        assert server.coordinator.fragments[0].version.number == 1
        (newest,) = (folder / "runs" / arguments["run_name"] / "checkpoints").glob("step-*")
        step = int(newest.name.removeprefix("step-"))
        assert [each["tokens"] for each in server.coordinator.publisher.history] == [64 * step]
        for name, value in weights_of(folder, arguments["run_name"], step).items():
            assert torch.equal(server.published(name.removeprefix("model/")), value)


def test_a_run_that_goes_on_at_another_host_is_the_worker_that_it_was(folder, tmp_path, monkeypatch):  # noqa: F811
    with server_of(folder, tmp_path, monkeypatch) as (server, arguments):
        del arguments["diloco_worker"]
        stopping = Project(folder, args=arguments, words=["main.hooks.stopper.at=3"])
        monkeypatch.setattr("forgather.diloco.joining.socket.gethostname", lambda: "old-host")
        assert run_worker(stopping) == EXIT_RESUMABLE
        monkeypatch.setattr("forgather.diloco.joining.socket.gethostname", lambda: "new-host")
        with pytest.raises(
            ConfigError, match=r"is the worker 'old-host-worker-of-.*', and was now called 'other'"
        ) as error:
            run_worker(Project(folder, args=arguments | {"diloco_worker": "other"}))
        assert "--diloco-worker old-host" in str(error.value.fix)
        assert run_worker(Project(folder, args=arguments)) == EXIT_OK
        (name,) = server.status()["workers"]
        assert name.startswith("old-host")
        assert server.status()["workers"][name]["counted"] == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"diloco_server": "127.0.0.1:9", "fuse_optimizer_with_backward": True, "max_grad_norm": None}, "fused with"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_sent(folder, arguments, said):  # noqa: F811
    with pytest.raises(ConfigError, match=said):
        run_worker(Project(folder, args={"run_name": said} | arguments), dry_run=True)
