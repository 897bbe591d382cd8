"""A few parameters with made-up gradients, and optimizers that step over them, in one process or spread over a mesh."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from forgather.distributed.environment import Environment
from forgather.distributed.mesh import Mesh
from forgather.optim.adafactor import Adafactor
from forgather.optim.adamw import AdamW
from forgather.optim.muon import Muon
from forgather.optim.sgd import SGD

# Odd numbers, so that nothing divides evenly; the vector is shorter than four ranks need; one stack of matrices.
SHAPES = {
    "embed_tokens.weight": (13, 6),
    "q_proj.weight": (12, 6),
    "o_proj.weight": (6, 10),
    "experts.up": (3, 6, 8),
    "norm.weight": (6,),
    "scale": (3,),
    "lm_head.weight": (13, 6),
}

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": partial(AdamW, lr=0.02, weight_decay=0.1),
    "sgd": partial(SGD, lr=0.05, momentum=0.9, weight_decay=0.01, nesterov=True),
    "muon": partial(Muon, lr=0.02, compute_in="fp32"),
    "adafactor": partial(Adafactor, lr=0.05, weight_decay=0.01),
}

# name: axes of the mesh, and how the parameters are cut: by FSDP along 0, or by tensor parallelism and then FSDP.
MESHES: dict[str, dict[str, int]] = {
    "shard 4": {"shard": 4},
    "replicate 2 x shard 2": {"replicate": 2, "shard": 2},
    "tensor 2 x shard 2, columns and rows": {"tensor": 2, "shard": 2},
    "tensor 2 x shard 2, rows of rows": {"tensor": 2, "shard": 2},
    "copies": {"replicate": 4},
}


def value_of(name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(name))
    return torch.randn(SHAPES[name], generator=generator).to(dtype)


def gradient_of(name: str, step: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * step + len(name))
    return torch.randn(SHAPES[name], generator=generator).to(dtype)


def make_optimizer(kind: str, parameters: dict[str, nn.Parameter], **options: Any) -> torch.optim.Optimizer:
    norms = [(name, parameter) for name, parameter in parameters.items() if parameter.dim() < 2]
    rest = [(name, parameter) for name, parameter in parameters.items() if parameter.dim() >= 2]
    groups = [{"name": "norms", "params": norms, "weight_decay": 0.0}, {"name": "rest", "params": rest}]
    return OPTIMIZERS[kind](groups, **options)


def step_alone(kind: str, steps: int = 3, dtype: torch.dtype = torch.float32, **options: Any) -> dict[str, Any]:
    """Values and states after some steps of one process, by name."""
    parameters = {name: nn.Parameter(value_of(name, dtype)) for name in SHAPES}
    optimizer = make_optimizer(kind, parameters, **options)
    for step in range(steps):
        for name, parameter in parameters.items():
            parameter.grad = gradient_of(name, step, dtype)
        optimizer.step()
        optimizer.zero_grad()
    return _gathered(parameters, optimizer)


def step_spread(
    mesh_name: str, kind: str, steps: int = 3, dtype: torch.dtype = torch.float32, **options: Any
) -> dict[str, Any]:
    """The same on the ranks of a mesh."""
    mesh = Mesh(Environment(device="cpu"), **MESHES[mesh_name])
    spread = partial(_spread, mesh=mesh, mesh_name=mesh_name)
    parameters = {name: nn.Parameter(spread(name, value_of(name, dtype))) for name in SHAPES}
    if kind == "muon":
        options["mesh"] = mesh
    optimizer = make_optimizer(kind, parameters, **options)
    for step in range(steps):
        for name, parameter in parameters.items():
            parameter.grad = spread(name, gradient_of(name, step, dtype))
        optimizer.step()
        optimizer.zero_grad()
    return _gathered(parameters, optimizer)


def _spread(name: str, tensor: torch.Tensor, *, mesh: Mesh, mesh_name: str) -> torch.Tensor:
    if mesh_name == "copies":
        return tensor
    if mesh.tensor == 1:
        assert mesh.data_mesh is not None
        return distribute_tensor(tensor, mesh.data_mesh, [Replicate()] * (mesh.data_mesh.ndim - 1) + [Shard(0)])
    assert mesh.device_mesh is not None
    if tensor.dim() < 2:
        return distribute_tensor(tensor, mesh.device_mesh, [Shard(0), Replicate()])
    if "columns" in mesh_name:
        return distribute_tensor(tensor, mesh.device_mesh, [Shard(0), Shard(tensor.dim() - 1)])
    if tensor.shape[0] % 4:  # FSDP takes rows that tensor parallelism has cut only where they divide
        return distribute_tensor(tensor, mesh.device_mesh, [Shard(tensor.dim() - 1), Shard(0)])
    return _fully_sharded(tensor, mesh)


def _fully_sharded(tensor: torch.Tensor, mesh: Mesh) -> torch.Tensor:
    from torch.distributed.fsdp import fully_shard

    assert mesh.tensor_mesh is not None
    module = nn.Module()
    module.weight = nn.Parameter(distribute_tensor(tensor, mesh.tensor_mesh, [Shard(0)]))
    fully_shard(module, mesh=mesh.data_mesh)
    return module.weight.detach()


def _gathered(parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, parameter in parameters.items():
        found[name] = _full(parameter.detach())
        found |= {f"{name}/{key}": _full(state) for key, state in optimizer.state[parameter].items()}
    return found


def _full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
