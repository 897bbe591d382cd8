"""Steps of the tiny Llama with the options that are off by default, and everything that such a step changes."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from forgather.distributed import fsdp
from forgather.distributed.compilation import apply_compile
from forgather.distributed.environment import Environment
from forgather.distributed.mesh import Mesh
from forgather.distributed.offload import apply_offload
from forgather.distributed.recompute import apply_recompute
from forgather.optim.groups import build_optimizer
from forgather.optim.schedules import constant
from forgather.trainers.loss import CausalLoss
from forgather.trainers.step import LocalStep
from forgather.trainers.update import Update
from tests.trainers.tiny import microbatches, tiny_llama

ADAMW = partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1, fused=True)
SGD = partial(torch.optim.SGD, lr=1e-2, momentum=0.9)


def build(
    mesh: Mesh,
    *,
    optimizer: Callable[..., Optimizer] = ADAMW,
    schedule: Callable[[int], float] | None = None,
    precision: Any = "fp32",
    tied: bool = False,
    dropout: float = 0.0,
    recompute: str | int = "none",
    compile: bool | Mapping[str, Any] = False,
    offload_from: int | None = None,
    **update: Any,
) -> LocalStep:
    """A step whose model is cut by blocks; `update` goes to `Update`. `offload_from` is the least bytes to offload."""
    model = tiny_llama(tied, dropout)
    apply_recompute(model, recompute)
    apply_compile(model, compile)
    if offload_from is not None:
        apply_offload(model, torch.device("cpu"), min_bytes=offload_from)
    limit, fsdp.ONE_GROUP_BELOW = fsdp.ONE_GROUP_BELOW, 0
    try:
        fsdp.apply_fsdp(model, mesh, precision)
    finally:
        fsdp.ONE_GROUP_BELOW = limit
    model.train()
    made = build_optimizer(model, optimizer, {"no_decay": {"match": "norm", "weight_decay": 0.0}})
    loss = CausalLoss(model, chunk_rows=8)
    update = {"max_grad_norm": None, "precision": precision} | update
    return LocalStep(model, loss, Update(made, schedule or constant(), mesh, **update), mesh)


def run(steps: int = 3, *, accumulate: int = 1, **options: Any) -> dict[str, Any]:
    """Make steps on this rank; their losses and norms, and this rank's part of every parameter after them."""
    mesh = Mesh(Environment(device="cpu"))
    step = build(mesh, **options)
    results = [
        step(number, microbatches(number, mesh.data_rank, mesh.data_ranks, accumulate)) for number in range(steps)
    ]
    return {
        "losses": [result.loss_sum.item() for result in results],
        "norms": [result.grad_norm.item() for result in results],
        "parameters": parameters(step.model),
    }


def parameters(model: nn.Module) -> list[Tensor]:
    return [local(parameter).detach().clone() for parameter in model.parameters()]


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def assert_equal_bits(ours: dict[str, Any], expected: dict[str, Any]) -> None:
    assert ours["losses"] == expected["losses"]
    assert ours["norms"] == expected["norms"]
    for mine, theirs in zip(ours["parameters"], expected["parameters"], strict=True):
        assert torch.equal(mine, theirs)
