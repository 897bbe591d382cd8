"""A worker of several ranks is the worker that one process would be, to the bit, and comes back on any mesh."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from forgather.checkpoint.run_folder import RunFolder
from forgather.checkpoint.state import TrainState
from forgather.checkpoint.store import CheckpointStore
from forgather.diloco.address import ServerAddress
from forgather.diloco.outer import Nesterov
from forgather.diloco.worker import DiLoCo
from forgather.distributed.collectives import rank, world_size
from forgather.tensor_boxes import local_part
from tests.diloco.loops import address_of, small_model, step_of_any_mesh, train_as_worker, values_of, whole
from tests.diloco.running_server import running_server, settings_of
from tests.ranks import RankPool

MESHES = ["fsdp", "pipeline", "replicas"]
FRAGMENTS = [["0.weight", "0.bias", "2.weight", "2.bias"], ["1.weight", "1.bias", "3.weight", "3.bias"]]


def model_on(mesh: str) -> nn.Module:
    """The small model, or this rank's part of it."""
    model = small_model()
    if mesh == "pipeline":
        stage = nn.Sequential()
        for number in (0, 1) if rank() == 0 else (2, 3):
            stage.add_module(str(number), model[number])
        return stage
    if mesh == "fsdp":
        fully_shard(model, mesh=init_device_mesh("cpu", (world_size(),)))
        assert all(local_part(parameter).shape != parameter.shape for parameter in model.parameters())
    return model


def work(mesh: str, address: ServerAddress, folder: Path, **others: Any) -> dict[str, Any]:
    """Train, from the start or from a checkpoint; what the parameters are, and what was held."""
    model = model_on(mesh)
    diloco = train_as_worker(model, address, folder, **others)
    return {"values": whole(model), "owned": [holding.slice for holding in diloco._holdings.mine if holding.is_owned]}


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[RankPool]:
    with RankPool(2) as pool:
        yield pool


def a_server(folder: Path, **others: Any) -> Any:
    values = values_of(small_model())
    chosen = {"upload": "bf16", "download": "bf16", "sync_every": 4} | others
    return running_server(folder, values, settings_of(values, FRAGMENTS, **chosen), Nesterov(0.7, 0.9))


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    """What one process makes of 10 steps, without and with a delay."""
    made = {}
    for delay in (0, 1):
        folder = tmp_path_factory.mktemp("alone")
        with a_server(folder / "server", delay=delay) as server:
            made[delay] = work("one", address_of(server), folder / "run", until=10)["values"]
    assert not same(made[0], made[1])
    return made


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("delay", [0, 1])
def test_two_ranks_are_the_worker_that_one_process_is(tmp_path, two_ranks, alone, mesh, delay):
    with a_server(tmp_path / "server", delay=delay) as server:
        results = two_ranks.run(work, mesh, address_of(server), tmp_path / "run", until=10)
        assert same(results[0]["values"], alone[delay])
        for name, value in results[0]["values"].items():
            if delay == 0 and name in FRAGMENTS[0]:
                assert torch.equal(server.published(name), value)
    slices = [part for result in results for part in result["owned"]]
    assert len(slices) == len(set(slices))  # each has one owner
    assert sum(part.numel for part in slices) == sum(value.numel() for value in alone[0].values())
    assert all(result["owned"] for result in results)  # and each rank owns something


MOVES = [("fsdp", "one"), ("one", "fsdp"), ("pipeline", "fsdp"), ("replicas", "pipeline"), ("fsdp", "fsdp")]


@pytest.mark.parametrize(("before", "after"), MOVES)
@pytest.mark.parametrize("delay", [0, 1])
def test_a_worker_goes_on_from_its_checkpoint_on_another_mesh(tmp_path, two_ranks, alone, before, after, delay):
    """Saved after 6 steps, when fragment 0 has just been sent: with a delay that exchange is under way."""
    with a_server(tmp_path / "server", delay=delay) as server:
        run(two_ranks, before, address_of(server), tmp_path / "run", until=6, saves=True)
        values = run(two_ranks, after, address_of(server), tmp_path / "run", until=10, is_resumed=True)
        assert same(values, alone[delay])
        assert server.status()["workers"]["alpha"]["counted"] == 5  # fragment 0 after 2, 6, 10 steps, 1 after 4, 8


def run(pool: RankPool, mesh: str, *args: Any, **others: Any) -> dict[str, Tensor]:
    if mesh == "one":
        return work(mesh, *args, **others)["values"]
    return pool.run(work, mesh, *args, **others)[0]["values"]


def test_a_worker_that_was_killed_repeats_its_steps_and_counts_once(tmp_path, two_ranks, alone):
    """Saved after 3 steps, and gone after 5: the round of step 4 has its contribution when it comes again."""
    with a_server(tmp_path / "server") as server:
        run(two_ranks, "fsdp", address_of(server), tmp_path / "run", until=3, saves=True)
        run(two_ranks, "fsdp", address_of(server), tmp_path / "run", until=5, is_resumed=True)
        assert server.status()["versions"] == [1, 1]
        values = run(two_ranks, "fsdp", address_of(server), tmp_path / "run", until=10, is_resumed=True)
        assert same(values, alone[0])
        assert server.status()["workers"]["alpha"]["counted"] == 5


class _KilledError(Exception):
    pass


def heard_differently(address: ServerAddress, folder: Path) -> tuple[int, list[str]]:
    """Saves while one rank alone has heard that the round is closed: the round that is saved, and the parts of it."""
    model = model_on("fsdp")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    diloco = DiLoCo(model, optimizer, address, "alpha", say=lambda text: None)
    state = TrainState(model, optimizer, {"diloco": diloco})
    with RunFolder(folder) as run, CheckpointStore(run, asynchronous=False) as store:
        with suppress(_KilledError), diloco:
            while diloco.steps < 2:
                step_of_any_mesh(model, optimizer, diloco.steps)
            exchange = diloco._session.flights.under_way[0].exchange
            exchange.encoded()
            if rank() == 1:
                exchange.round = 1
            store.save(state, 2)
            raise _KilledError
        model = model_on("fsdp")
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        resumed = DiLoCo(model, optimizer, address, "alpha", say=lambda text: None)
        assert store.resume(TrainState(model, optimizer, {"diloco": resumed})) is not None
        with suppress(_KilledError), resumed:
            exchange = resumed._session.flights.under_way[0].exchange
            parts = [f"{part.identity.round}.{part.identity.part}" for part in exchange.parts]
            raise _KilledError
    return exchange.agreed_round, parts


@pytest.mark.parametrize("codec", ["bf16", "int8"])
def test_ranks_that_have_heard_different_things_save_one_contribution(tmp_path, two_ranks, codec):
    """Parts of two rounds would never be complete: after a restart all would wait for ever."""
    values = values_of(small_model())
    chosen = settings_of(values, FRAGMENTS, upload=codec, download=codec, sync_every=4, delay=1)
    with running_server(tmp_path / "server", values, chosen, num_workers=1) as server:
        server.call(lambda: server.coordinator.rounds.change(num_workers=2))  # the round stays open
        results = two_ranks.run(heard_differently, address_of(server), tmp_path / "run")
    assert results == [(0, ["0.0"]), (0, ["0.1"])]
