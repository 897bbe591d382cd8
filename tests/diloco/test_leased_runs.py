"""Whole runs on leased rows: those of the plain run, stopped while they wait, and nothing leased by a dry run."""

import threading
import time
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from forgather import Project
from forgather.data.loader import Loader
from forgather.data.order import Permutation
from forgather.diloco.address import ServerAddress
from forgather.diloco.frame import ProtocolError
from forgather.diloco.lease_desk import LeaseDesk
from forgather.diloco.leased_order import LeasedOrder
from forgather.diloco.worker import DiLoCo
from forgather.distributed.collectives import max_ranks, rank, world_size
from forgather.errors import EXIT_INTERRUPTED, EXIT_OK, EXIT_RESUMABLE, DataError
from forgather.trainers.worker import run_worker
from tests.diloco.loops import address_of, sgd, small_model, train, values_of
from tests.diloco.running_server import RunningServer, running_server, settings_of
from tests.diloco.test_leased_order import Blocks
from tests.diloco.test_training import server_of, weights_of
from tests.diloco.test_worker import wait_for
from tests.ranks import RankPool
from tests.trainers.test_worker import folder  # noqa: F401  a fixture

QUIET = {"log_every": None, "eval_every": None, "sample_every": None}


@contextmanager
def without_rows(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The server is too busy to lease rows; what was asked is in the list."""
    asked: list[str] = []

    async def unit(request: Any, key: str) -> Any:
        asked.append(request["worker"])
        raise ProtocolError("busy", status=503)

    with monkeypatch.context() as patch:
        patch.setattr(server.coordinator, "unit", unit)
        yield asked


@contextmanager
def running(project: Project) -> Iterator[list[int]]:
    """A run in a thread; its exit code is in the list when it has ended."""
    ended: list[int] = []
    run = threading.Thread(target=lambda: ended.append(run_worker(project)))
    run.start()
    try:
        yield ended
    finally:
        run.join(30)
        assert not run.is_alive()


def names_of_threads(but: Collection[threading.Thread] = ()) -> set[str]:
    """Of the threads that there are, `but` those that another test may have left."""
    return {thread.name for thread in threading.enumerate() if thread not in but}


def same_weights(folder: Path, one: str, other: str, step: int) -> bool:  # noqa: F811
    left, right = (weights_of(folder, name, step) for name in (one, other))
    return all(torch.equal(left[name], value) for name, value in right.items())


def test_a_run_that_waits_for_its_first_rows_is_stopped_and_goes_on(folder, tmp_path, monkeypatch):  # noqa: F811
    before = threading.enumerate()
    with server_of(folder, tmp_path, monkeypatch) as (server, arguments):
        project = Project(folder, args=arguments)
        told = threading.Event()
        with monkeypatch.context() as patch, without_rows(server, monkeypatch) as asked:
            patch.setattr("forgather.trainers.control.Control._wishes", wishes_to_stop(told))
            with running(project) as ended:
                wait_for(lambda: bool(asked), 30)
                assert not ended
                told.set()
            assert ended == [EXIT_RESUMABLE]
            wait_for(lambda: server.status()["workers"]["alpha"]["state"] == "left")
            wait_for(lambda: "diloco leases" not in names_of_threads(before))  # nobody goes on asking
        assert run_worker(project) == EXIT_OK
        assert run_worker(Project(folder, args={"run_name": f"alone {tmp_path.name}"})) == EXIT_OK
        assert same_weights(folder, f"alone {tmp_path.name}", arguments["run_name"], 4)
        assert server.status()["ledger"]["trained"] == 16


def wishes_to_stop(told: threading.Event) -> Any:
    from forgather.trainers.commands import Command

    return lambda self: {Command.STOP} if told.is_set() else set()


@pytest.mark.parametrize(("command", "code"), [("stop", EXIT_RESUMABLE), ("abort", EXIT_INTERRUPTED)])
def test_the_server_ends_a_run_that_has_no_rows_any_more(folder, tmp_path, monkeypatch, command, code):  # noqa: F811
    with server_of(folder, tmp_path, monkeypatch, heartbeat_s=0.02) as (server, arguments):
        project = Project(folder, args=arguments | QUIET | {"steps": 100_000})
        run = folder / "runs" / arguments["run_name"]
        with running(project) as ended:
            wait_for(lambda: server.status()["versions"][0] > 0, 30)
            with without_rows(server, monkeypatch) as asked:
                wait_for(lambda: len(asked) > 3, 30)
                steps = wait_until_it_stands(server)
                assert not ended
                server.call(lambda: server.coordinator.controls.command(None, command))
                wait_for(lambda: bool(ended), 30)
        assert ended == [code]
        saved = [int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*")]
        assert saved == ([steps] if command == "stop" else [])
        assert server.status()["workers"]["alpha"]["state"] == "left"
        assert server.status()["ledger"]["leased"] == 0  # others may have what it did not train


def test_a_run_whose_server_is_gone_ends_soon_after_it_is_told_to(folder, tmp_path, monkeypatch):  # noqa: F811
    before = threading.enumerate()
    told = threading.Event()
    monkeypatch.setattr("forgather.trainers.control.Control._wishes", wishes_to_stop(told))
    monkeypatch.setattr("forgather.trainers.control.Control.is_asked_to_end", lambda self: told.is_set())
    with ExitStack() as stack:
        server, arguments = stack.enter_context(server_of(folder, tmp_path, monkeypatch, heartbeat_s=0.02))
        words = ["diloco.patience_s=0.1"]
        with running(Project(folder, args=arguments | QUIET | {"steps": 100_000}, words=words)) as ended:
            wait_for(lambda: server.status()["versions"][0] > 0, 30)
            stack.close()
            checkpoints = folder / "runs" / arguments["run_name"] / "checkpoints"
            wait_for(lambda: "diloco leases" in names_of_threads(before), 30)
            assert not ended
            told.set()
            begun = time.monotonic()
            wait_for(lambda: bool(ended), 30)
    assert ended == [EXIT_RESUMABLE]
    assert time.monotonic() - begun < 10
    assert len(list(checkpoints.glob("step-*"))) == 1
    wait_for(lambda: not names_of_threads(before) & {"diloco leases", "forgather-loader_0"})


def wait_until_it_stands(server: RunningServer) -> int:
    """The step at which the run waits for rows."""
    seen: list[int] = []

    def stands() -> bool:
        seen.append(server.status()["workers"]["alpha"]["steps"])
        return len(seen) > 30 and len(set(seen[-30:])) == 1

    wait_for(stands, 30)
    return seen[-1]


def test_a_run_goes_on_when_rows_come_again(folder, tmp_path, monkeypatch):  # noqa: F811
    with server_of(folder, tmp_path, monkeypatch, heartbeat_s=0.02) as (server, arguments):
        with running(Project(folder, args=arguments | QUIET | {"steps": 24})) as ended:
            with without_rows(server, monkeypatch) as asked:
                wait_for(lambda: len(asked) > 1, 30)
            wait_for(lambda: bool(ended), 30)
        assert ended == [EXIT_OK]
        assert run_worker(Project(folder, args=QUIET | {"steps": 24, "run_name": f"alone {tmp_path.name}"})) == EXIT_OK
        assert same_weights(folder, f"alone {tmp_path.name}", arguments["run_name"], 24)
        assert server.status()["ledger"] | {"trained": 96, "repeated": 0} == server.status()["ledger"]


def test_a_dry_run_leases_nothing(folder, tmp_path, monkeypatch, capsys):  # noqa: F811
    with server_of(folder, tmp_path, monkeypatch) as (server, arguments):
        assert run_worker(Project(folder, args=arguments), dry_run=True) == EXIT_OK
        assert "dry run: the next batch has loss" in capsys.readouterr().out
        assert server.status()["workers"] == {}
        assert server.status()["ledger"]["rows"] is None
        # Also one of a run that goes on.
        assert run_worker(Project(folder, args=arguments)) == EXIT_OK
        leased = server.status()["ledger"]
        assert run_worker(Project(folder, args=arguments | {"steps": 400}), dry_run=True) == EXIT_OK
        assert server.status()["ledger"] == leased


def test_a_run_that_began_with_leases_or_without_says_how_it_goes_on(folder, tmp_path, monkeypatch):  # noqa: F811
    with server_of(folder, tmp_path, monkeypatch) as (_, arguments):
        assert run_worker(Project(folder, args=arguments)) == EXIT_OK
        alone = arguments | {"diloco_server": None, "steps": 6}
        with pytest.raises(DataError, match="another order") as caught:
            run_worker(Project(folder, args=alone))
        assert "--diloco-server" in caught.value.fix
        began_alone = {"run_name": f"began alone {tmp_path.name}"}
        assert run_worker(Project(folder, args=began_alone)) == EXIT_OK
        with pytest.raises(DataError, match="another order") as caught:
            run_worker(Project(folder, args=arguments | began_alone | {"steps": 6}))
        assert "--no-diloco-leased" in caught.value.fix
        leased = arguments | began_alone | {"steps": 6, "diloco_leased": False, "diloco_worker": "beta"}
        assert run_worker(Project(folder, args=leased)) == EXIT_OK


def test_two_workers_of_one_seed_train_no_row_twice(folder, tmp_path, monkeypatch):  # noqa: F811
    with server_of(folder, tmp_path, monkeypatch) as (server, arguments):
        server.call(lambda: server.coordinator.controls.set(num_workers=2))
        other = arguments | {"run_name": f"beta of {tmp_path.name}", "diloco_worker": "beta"}
        with running(Project(folder, args=arguments)) as ended:
            # Python 3.11 cannot parse sources, as both do to make their package, in two threads at once.
            wait_for(lambda: "alpha" in server.status()["workers"], 30)
            with running(Project(folder, args=other)) as too:
                pass
        assert ended == too == [EXIT_OK]
        ledger = server.status()["ledger"]
        assert ledger | {"trained": 32, "repeated": 0} == ledger


# Two ranks, which ask as one.


def steps_on_leased_rows(address: ServerAddress, asked_to_stop: str) -> tuple[bool, int, list[int]]:
    """Eight steps of one worker; whether it was stopped, how often it waited, and this rank's rows."""
    model = small_model()
    optimizer = sgd(model)
    desk = LeaseDesk(is_open=True)
    order = LeasedOrder(Permutation(40, 3), desk, rows_per_step=4)
    data = Loader(Blocks(40), order, rows_per_step=4, rows_per_forward=4, data_rank=rank(), data_ranks=world_size())
    waits, rows = 0, []
    worker = DiLoCo(
        model, optimizer, address, "w", leases=desk, num_rows=lambda: data.consumed, consumed=order.consumed
    )
    with worker:
        for number in range(8):
            while not data.has_rows(8 - number):
                waits += 1
                if max_ranks(int(rank() == 1 and Path(asked_to_stop).exists())):  # a signal that one rank has got
                    data.close()
                    return True, waits, rows
            rows += [int(row) for each in data.take() for row in each.input_ids[:, 0]]
            train(model, [number], optimizer)
    data.close()
    return False, waits, rows


@pytest.mark.parametrize("is_stopped", [False, True])
def test_ranks_wait_together_for_rows_and_are_stopped_together(two_ranks, tmp_path, monkeypatch, is_stopped):
    values = values_of(small_model())
    with running_server(tmp_path / "server", values, settings_of(values, sync_every=2, work_units=20)) as server:
        leases, asked = server.coordinator.unit, 0

        async def unit(request: Any, key: str) -> Any:
            nonlocal asked
            asked += 1
            if asked > 4 and is_stopped:
                (tmp_path / "stop").touch()
            if asked <= 4 or is_stopped:
                raise ProtocolError("busy", status=503)
            return await leases(request, key)

        monkeypatch.setattr(server.coordinator, "unit", unit)
        first, second = two_ranks.run(steps_on_leased_rows, address_of(server), str(tmp_path / "stop"))
        assert first[:2] == second[:2]
        assert first[0] is is_stopped
        assert first[1] > 0
        if not is_stopped:
            rows = [row for at in range(0, 16, 2) for each in (first, second) for row in each[2][at : at + 2]]
            assert rows == Permutation(40, 3).samples(0, 32).tolist()
            assert server.status()["ledger"] | {"trained": 32, "repeated": 0} == server.status()["ledger"]


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[RankPool]:
    with RankPool(2) as pool:
        yield pool
