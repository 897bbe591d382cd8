"""What watches a run sees the same on any mesh: norms, tokens, FLOPs, and replicas that are or are not equal."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from forgather.distributed.environment import Environment
from forgather.distributed.mesh import Mesh
from forgather.distributed.pipeline_plan import PipelinePlan
from forgather.errors import TrainingError
from forgather.metrics.flops import count_flops_of
from forgather.metrics.meter import Meter
from forgather.optim.schedules import constant
from forgather.trainers.assemble import assemble
from forgather.trainers.events import StepEnded
from forgather.trainers.norms import Norms
from forgather.trainers.replicas import ReplicaCheck
from forgather.trainers.strategy import build_loss, build_step
from forgather.trainers.update import Update
from tests.ranks import RankPool
from tests.trainers.test_meshes import Source
from tests.trainers.tiny import LENGTH, ROWS, microbatches

MESHES: list[dict[str, int]] = [
    {"tensor": 2, "shard": 2},
    {"tensor": 2, "replicate": 2},
    {"pipeline": 2, "shard": 2},
    {"pipeline": 2, "tensor": 2},
]
PATTERNS = {"embeddings": "embed", "attention": "self_attn", "norms": "norm", "all": "."}


@pytest.fixture(scope="module")
def four_ranks() -> Iterator[RankPool]:
    with RankPool(4) as pool:
        yield pool


def watch(axes: dict[str, int], damaged: str | None = None, steps: int = 4) -> dict[str, Any]:
    """The metrics of some watched steps; or what is found when `damaged` is another parameter on the last rank."""
    mesh = Mesh(Environment(device="cpu"), **{"shard": 1, **axes})
    rows = ROWS // mesh.data_ranks
    plan = PipelinePlan(mesh, rows=rows, rows_per_forward=rows, length=LENGTH)
    source = Source(tied=True)
    model = assemble(source, mesh, pipeline=plan, seed=3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    meter = Meter(mesh.environment.device, count_flops_of(source, LENGTH).per_token, peak=1e9)
    step = build_step(model, build_loss(model), Update(optimizer, constant(), mesh), mesh)
    norms = Norms(model, optimizer, mesh, patterns=PATTERNS, every=1)
    meter.start()
    for number in range(steps):
        batches = microbatches(number, mesh.data_rank, mesh.data_ranks, accumulate=2)
        with meter.watching():
            result = step(number, batches)
        meter.add(result)
        norms.on_step_end(StepEnded(number + 1, result))
    metrics = meter.flush(steps) | norms.metrics()
    check = ReplicaCheck(model, optimizer, meter)
    check.check(steps)
    if damaged is not None:
        if dist.get_rank() == dist.get_world_size() - 1:
            parameter = dict(model.named_parameters())[damaged]
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            with torch.no_grad():
                local.view(-1)[-1].mul_(1 + 2**-20)
        try:
            check.check(steps)
        except TrainingError as error:
            return {"found": error.message}
    return metrics


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return watch({})


@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_every_mesh_has_the_numbers_of_one_process(four_ranks, alone, axes):
    everywhere = four_ranks.run(watch, axes)
    assert all(metrics == everywhere[0] for metrics in everywhere)
    (metrics, *_) = everywhere
    seen = [name for name in alone if "/" in name or name in ("loss", "grad_norm", "lr")]
    assert [metrics[name] for name in seen] == pytest.approx([alone[name] for name in seen], rel=1e-5)
    tokens = metrics["tokens_per_s"] * metrics["step_s"]
    assert tokens == pytest.approx(ROWS * LENGTH)  # ranks that read the same rows count once
    # The whole model's operations, and the peaks of all ranks.
    flops = alone["mfu"] / alone["tokens_per_s"] * 1e9
    assert metrics["mfu"] == pytest.approx(flops * metrics["tokens_per_s"] / 4e9)
    assert metrics["bytes_sent"] > 0


@pytest.mark.training_case(31)
@pytest.mark.parametrize(
    ("axes", "sides"),
    [({"tensor": 2, "shard": 2}, "rank 2 from rank 3"), ({"tensor": 2, "replicate": 2}, "0, 1, 2 from rank 3")],
)
def test_a_norm_that_ranks_share_is_compared_among_those(four_ranks, axes, sides):
    name = "model.norm.weight"
    found = four_ranks.run(watch, axes, name)
    assert all(name in one["found"] and sides in one["found"] for one in found), found[0]["found"]
