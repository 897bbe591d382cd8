"""A mesh is what the processes can make of it, or an error that says which ones they can."""

import os
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from forgather.distributed import collectives
from forgather.distributed.environment import Environment
from forgather.distributed.mesh import Mesh
from forgather.errors import DistributedError
from tests.ranks import run_ranks


def environment(world_size: int) -> Environment:
    return SimpleNamespace(world_size=world_size, describe=lambda: "somewhere")  # type: ignore[return-value]


class Unbuilt(Mesh):
    """The arithmetic without the process groups."""

    def _build_device_mesh(self):
        return None


@pytest.mark.parametrize(
    ("world", "replicate", "shard", "expected"),
    [(1, 1, "auto", (1, 1)), (8, 1, "auto", (1, 8)), (8, 2, "auto", (2, 4)), (8, "auto", 2, (4, 2)), (6, 3, 2, (3, 2))],
)
def test_auto_is_what_the_other_axis_leaves(world, replicate, shard, expected):
    mesh = Unbuilt(environment(world), replicate, shard)
    assert (mesh.replicate, mesh.shard) == expected
    assert mesh.data_ranks == world
    assert mesh.describe().startswith(f"replicate {expected[0]} x shard {expected[1]}")


@pytest.mark.parametrize(
    ("replicate", "shard", "message", "fix"),
    [
        (
            3,
            "auto",
            "takes 3 processes, and there are 4",
            "replicate 1 x shard 4 or replicate 2 x shard 2 or replicate 4 x",
        ),
        (2, 4, "replicate 2 x shard 4 takes 8 processes, and there are 4", "replicate 2 x shard 2"),
        ("auto", "auto", "both auto", "give one of them a number"),
        (0, "auto", "mesh.replicate is 0", "from 1"),
        (1, "Auto", "mesh.shard is 'Auto'", "auto"),
    ],
)
def test_a_mesh_that_does_not_fit_says_which_does(replicate, shard, message, fix):
    with pytest.raises(DistributedError, match=message) as error:
        Unbuilt(environment(4), replicate, shard)
    assert fix in error.value.fix


@pytest.mark.parametrize(("device", "message"), [("gpu", "device is 'gpu'"), ("cuda", "sees no CUDA device")])
def test_a_device_that_is_not_there_is_an_error(device, message):
    with pytest.raises(DistributedError, match=message):
        Environment(device=device)


def test_a_rank_that_is_no_number_is_an_error(monkeypatch):
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(DistributedError, match="RANK is 'first'"):
        Environment(device="cpu")


def test_a_world_of_one_agrees_with_itself():
    assert "RANK" not in os.environ
    with Environment(device="cpu") as env:
        mesh = Mesh(env)
    assert mesh.device_mesh is None
    assert (collectives.rank(), collectives.world_size()) == (0, 1)
    assert collectives.agree(True)
    assert not collectives.agree(False)
    assert collectives.gather_objects("x") == ["x"]
    assert collectives.broadcast_object("x") == "x"
    collectives.require_equal("it", "x")
    collectives.barrier()


def agreements() -> dict[str, object]:
    env = Environment(device="cpu")
    mesh = Mesh(env, replicate=2)
    try:
        collectives.require_equal("the seed", f"{min(env.rank, 1)}")
        differing = ""
    except DistributedError as error:
        differing = error.message
    collectives.barrier()
    return {
        "all": collectives.agree(True),
        "some": collectives.agree(env.rank != 2),
        "gathered": collectives.gather_objects(env.rank),
        "told": collectives.broadcast_object(env.rank, source=1),
        "differing": differing,
        "mesh": (mesh.device_mesh.mesh_dim_names, tuple(mesh.device_mesh.shape), mesh.data_rank, mesh.data_ranks),
    }


def test_ranks_agree():
    for rank, seen in enumerate(run_ranks(4, agreements)):
        assert seen == {
            "all": True,
            "some": False,
            "gathered": [0, 1, 2, 3],
            "told": 1,
            "differing": "the seed is not the same on all ranks (rank 0: 0, rank 1: 1, rank 2: 1, rank 3: 1)",
            "mesh": (("replicate", "shard"), (2, 2), rank, 4),
        }


def draws() -> list[tuple[float, float, float]]:
    """What each of two seeds begins with, and the first of them once more."""
    drawn = []
    for seed in (1, 2, 1):
        Environment(device="cpu", seed=seed)
        drawn.append((random.random(), float(np.random.rand()), torch.rand(()).item()))
    return drawn


def test_a_seed_and_a_rank_decide_what_is_drawn():
    ranks = run_ranks(2, draws)
    for one, two, again in ranks:
        assert one == again
        assert set(one).isdisjoint(two)
    assert set(ranks[0][0]).isdisjoint(ranks[1][0])
