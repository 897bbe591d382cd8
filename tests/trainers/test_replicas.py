"""Replicas that have gone their own way are found, and named by tensor and rank."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from forgather.distributed.environment import Environment
from forgather.distributed.mesh import Mesh
from forgather.errors import TrainingError
from forgather.metrics.meter import Meter
from forgather.trainers.assemble import assemble
from forgather.trainers.events import StepEnded
from forgather.trainers.replicas import ReplicaCheck, hash_tensor
from tests.ranks import RankPool
from tests.trainers.small_run import TinySource, make_trainer, write_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus")).folder


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[RankPool]:
    with RankPool(2) as pool:
        yield pool


def found_by_check(damaged: str | None, state: str | None, axes: dict[str, int]) -> str | None:
    """What the check says after a step of every optimizer state, with one last element changed on rank 1."""
    mesh = Mesh(Environment(device="cpu"), **axes)
    model = assemble(TinySource(), mesh, seed=5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    if damaged is not None and dist.get_rank() == 1:
        parameter = model.get_parameter(damaged)
        tensor = parameter if state is None else optimizer.state[parameter][state]
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        with torch.no_grad():
            local.view(-1)[-1].mul_(1 + 2**-20)
    meter = Meter(mesh.environment.device)
    try:
        ReplicaCheck(model, optimizer, meter).check(7)
    except TrainingError as error:
        return error.message
    return None


HEAD = "lm_head.weight"


@pytest.mark.training_case(31)
def test_one_bit_in_the_last_element_of_a_replica_is_found(two_ranks):
    replicas = {"replicate": 2, "shard": 1}
    assert two_ranks.run(found_by_check, None, None, replicas) == [None, None]
    expected = f"after step 7 replicas differ: {HEAD} (rank 0 from rank 1)"
    assert two_ranks.run(found_by_check, HEAD, None, replicas) == [expected, expected]
    expected = f"after step 7 replicas differ: exp_avg of {HEAD} (rank 0 from rank 1)"
    assert two_ranks.run(found_by_check, HEAD, "exp_avg", replicas) == [expected, expected]


def test_shards_of_one_tensor_are_no_replicas(two_ranks):
    assert two_ranks.run(found_by_check, HEAD, None, {"replicate": 1, "shard": 2}) == [None, None]


def test_a_hash_is_that_of_the_bits():
    assert hash_tensor(torch.zeros(3)) != hash_tensor(-torch.zeros(3))
    for dtype in (torch.bfloat16, torch.float32, torch.int64, torch.bool):
        x = torch.arange(6).to(dtype).reshape(2, 3)
        assert hash_tensor(x) == hash_tensor(x.T.contiguous().T)
    assert hash_tensor(torch.empty(0)) == hash_tensor(torch.empty(0, 3))


class StopsAt:
    def __init__(self, step: int | None) -> None:
        self.at, self.step = step, 0

    def on_step_end(self, event: StepEnded) -> None:
        self.step = event.step

    def wants_stop(self) -> bool:
        return self.step == self.at


def run_with_check(folder: Path, corpus: Path, stop_at: int | None = None) -> list[int]:
    trainer = make_trainer(folder, corpus, steps=5)
    seen: list[int] = []

    class Watched(ReplicaCheck):
        def check(self, step: int) -> None:
            seen.append(step)
            super().check(step)

    check = Watched(trainer.model, trainer.state.optimizer, trainer.meter, every=2)
    trainer.hooks = type(trainer.hooks)({"replicas": check, "stopper": StopsAt(stop_at)})
    trainer.run()
    trainer.checkpoints.run.close()
    assert trainer.meter.ledger.seconds()["inspection"] > 0
    return seen


def test_a_sound_run_passes_at_its_interval_and_at_its_end(tmp_path, corpus, two_ranks):
    assert two_ranks.run(run_with_check, tmp_path, corpus) == [[2, 4, 5], [2, 4, 5]]


def test_a_run_that_is_told_to_stop_is_not_checked_once_more(tmp_path, corpus, two_ranks):
    assert two_ranks.run(run_with_check, tmp_path, corpus, 3) == [[2], [2]]
