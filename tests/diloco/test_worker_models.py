"""A real model whose embeddings are tied: on any mesh it is the worker that one process is, to the bit."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from forgather.diloco.address import ServerAddress
from forgather.diloco.fragments import divide
from forgather.diloco.outer import Nesterov
from forgather.diloco.worker import DiLoCo
from tests.diloco.loops import address_of, train_as_worker, values_of, whole
from tests.diloco.running_server import running_server, settings_of
from tests.ranks import RankPool
from tests.trainers.staged import Staged

Axes = dict[str, int]
ONE: Axes = {}
TWO: list[Axes] = [{"tensor": 2}, {"pipeline": 2}]
FOUR: list[Axes] = [
    {"replicate": 2, "shard": 2},
    {"tensor": 2, "shard": 2},
    {"tensor": 2, "replicate": 2},
    {"pipeline": 2, "shard": 2},
    {"pipeline": 2, "tensor": 2},
]
MOVES: list[tuple[Axes, Axes]] = [
    ({"tensor": 2, "shard": 2}, {"pipeline": 2, "tensor": 2}),
    ({"pipeline": 2, "shard": 2}, {"replicate": 2, "shard": 2}),
    (ONE, {"tensor": 2, "shard": 2}),
    ({"pipeline": 2, "tensor": 2}, ONE),
]
STEPS, SAVED_AT = 7, 4


def model_on(axes: Axes) -> nn.Module:
    plan = {"schedule": "1f1b"} if axes.get("pipeline", 1) > 1 else None
    return Staged(axes, {"tied": True}, groups=True, plan=plan).model


def work(axes: Axes, address: ServerAddress, folder: Path, **others: Any) -> dict[str, Tensor]:
    """Train to the end, or up to a checkpoint; the parameters of the whole model."""
    model = model_on(axes)
    train_as_worker(model, address, folder, end=DiLoCo.finish, **{"until": STEPS} | others)
    return whole(model)


def a_server(folder: Path, first: dict[str, Tensor]) -> Any:
    fragments = divide({name: value.shape for name, value in first.items()}, 2, "strided")
    settings = settings_of(first, fragments, upload="bf16", download="bf16", sync_every=4, delay=1)
    return running_server(folder, first, settings, Nesterov(0.7, 0.9))


@pytest.fixture(scope="module")
def first() -> dict[str, Tensor]:
    return values_of(model_on(ONE))


@pytest.fixture(scope="module")
def alone(first, tmp_path_factory) -> dict[str, Tensor]:
    folder = tmp_path_factory.mktemp("alone")
    with a_server(folder / "server", first) as server:
        return work(ONE, address_of(server), folder / "run")


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[RankPool]:
    with RankPool(2) as pool:
        yield pool


@pytest.fixture(scope="module")
def four_ranks() -> Iterator[RankPool]:
    with RankPool(4) as pool:
        yield pool


def assert_same(values: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert values.keys() == expected.keys()
    assert [name for name, value in values.items() if not torch.equal(value, expected[name])] == []


@pytest.mark.parametrize("axes", [*TWO, *FOUR], ids=str)
def test_any_mesh_is_the_worker_that_one_process_is(tmp_path, two_ranks, four_ranks, first, alone, axes):
    pool = two_ranks if axes in TWO else four_ranks
    with a_server(tmp_path / "server", first) as server:
        values = pool.run(work, axes, address_of(server), tmp_path / "run")[0]
        assert_same(values, alone)
        assert_same(values, {name: server.published(name) for name in first})
    assert "lm_head.weight" not in values  # one with the embeddings, which two stages of a pipeline have


@pytest.mark.parametrize(("before", "after"), MOVES, ids=str)
def test_it_goes_on_from_its_checkpoint_on_another_mesh(tmp_path, four_ranks, first, alone, before, after):
    """Saved when fragment 1 has just been sent: that exchange is under way."""
    with a_server(tmp_path / "server", first) as server:

        def run(axes: Axes, **others: Any) -> dict[str, Tensor]:
            arguments = (axes, address_of(server), tmp_path / "run")
            return work(*arguments, **others) if axes == ONE else four_ranks.run(work, *arguments, **others)[0]

        run(before, until=SAVED_AT, saves=True)
        assert_same(run(after, is_resumed=True), alone)
