"""Small training loops around DiLoCo, and what they are compared with."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from forgather.checkpoint.run_folder import RunFolder
from forgather.checkpoint.state import TrainState
from forgather.checkpoint.store import CheckpointStore
from forgather.diloco.address import ServerAddress
from forgather.diloco.worker import DiLoCo
from forgather.distributed.collectives import gather_objects
from forgather.tensor_boxes import local_box
from tests.diloco.running_server import RunningServer


def small_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Four layers that stand in a list, so that they can be fragments; always the same."""
    generator = torch.Generator().manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 20), nn.Linear(20, 20), nn.Linear(20, 20), nn.Linear(20, 3))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return model.to(dtype)


def values_of(model: nn.Module) -> dict[str, Tensor]:
    """What a server of this model begins with."""
    return {name: parameter.detach().float().clone() for name, parameter in model.named_parameters()}


def batch(step: int, rows: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.randn(rows, 6, generator=generator), torch.randn(rows, 3, generator=generator)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Tensor, targets: Tensor) -> None:
    dtype = next(model.parameters()).dtype
    (model(inputs.to(dtype)).float() - targets).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def train(model: nn.Module, steps: Sequence[int], optimizer: torch.optim.Optimizer, rows: slice = slice(None)) -> None:
    for step in steps:
        inputs, targets = batch(step)
        train_step(model, optimizer, inputs[rows], targets[rows])


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.02)


def address_of(server: RunningServer) -> ServerAddress:
    return ServerAddress(server.host, server.port, token=server.token)


def worker(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    server: RunningServer,
    name: str = "alpha",
    say: Callable[[str], None] = lambda text: None,
    **others: Any,
) -> DiLoCo:
    return DiLoCo(model, optimizer, address_of(server), name, say=say, **others)


def equal(left: nn.Module, right: nn.Module) -> bool:
    return all(torch.equal(one, other) for one, other in zip(left.parameters(), right.parameters(), strict=True))


def equals_server(model: nn.Module, server: RunningServer) -> bool:
    """Whether the parameters are what the server has published, to the bit."""
    return all(
        torch.equal(parameter.detach(), server.published(name).to(parameter.dtype))
        for name, parameter in model.named_parameters()
    )


def step_of_any_mesh(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    """A step whose gradients depend on nothing but the step and the parameter: the same on any mesh, to the bit."""
    for name, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(sum(map(ord, name)) + 1000 * number)
        gradient = torch.randn(parameter.shape, generator=generator)
        for dim, (start, size) in enumerate(zip(*local_box(parameter), strict=True)):
            gradient = gradient.narrow(dim, start, size)
        if isinstance(parameter, DTensor):
            parameter.grad = DTensor(gradient.contiguous(), parameter._spec, requires_grad=False)
        else:
            parameter.grad = gradient.contiguous()
    optimizer.step()
    optimizer.zero_grad()


def train_as_worker(
    model: nn.Module,
    address: ServerAddress,
    folder: Path,
    *,
    until: int,
    is_resumed: bool = False,
    end: Callable[[DiLoCo], None] = DiLoCo.settle,
    saves: bool = False,
) -> DiLoCo:
    """Train `model` up to step `until` as the worker alpha, from the start or from the checkpoint in `folder`."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    diloco = DiLoCo(model, optimizer, address, "alpha", say=lambda text: None)
    state = TrainState(model, optimizer, {"diloco": diloco})
    with RunFolder(folder) as run, CheckpointStore(run, asynchronous=False) as store:
        if is_resumed:
            assert store.resume(state) is not None
        with diloco:
            while diloco.steps < until:
                step_of_any_mesh(model, optimizer, diloco.steps)
            if saves:
                store.save(state, until)
            else:
                end(diloco)
    return diloco


def whole(model: nn.Module) -> dict[str, Tensor]:
    """The parameters of the whole model, on every rank; those that several ranks have must be equal. Collective."""
    mine = {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()
        for name, value in model.named_parameters()
    }
    merged: dict[str, Tensor] = {}
    for values in gather_objects(mine):
        for name, value in values.items():
            assert torch.equal(merged.setdefault(name, value), value)
    return merged
