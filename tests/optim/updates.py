"""A few parameters with made-up gradients, and optimizers that step over them, in one process or spread over a mesh."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from forgather.checkpoint.run_folder import RunFolder
from forgather.checkpoint.state import TrainState
from forgather.checkpoint.store import CheckpointStore
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
    return Run("alone", kind, dtype, **options).step(range(steps)).gathered()


def step_spread(
    mesh_name: str, kind: str, steps: int = 3, dtype: torch.dtype = torch.float32, **options: Any
) -> dict[str, Any]:
    """The same on the ranks of a mesh."""
    return Run(mesh_name, kind, dtype, **options).step(range(steps)).gathered()


def step_and_save(folder: Path, mesh_name: str, kind: str, **options: Any) -> None:
    """Two steps, and a checkpoint of them."""
    run = Run(mesh_name, kind, **options).step(range(2))
    with RunFolder(folder) as place, CheckpointStore(place, asynchronous=False) as store:
        store.save(run.state(), 2)


def load_and_step(folder: Path, mesh_name: str, kind: str, **options: Any) -> dict[str, Any]:
    """Values and states after two more steps from that checkpoint."""
    run = Run(mesh_name, kind, **options)
    for parameter in run.parameters.values():
        torch.nn.init.zeros_(parameter)
    with RunFolder(folder) as place, CheckpointStore(place, asynchronous=False) as store:
        checkpoint = store.resume(run.state())
        assert checkpoint is not None
    return run.step(range(2, 4)).gathered()


class Run:
    """The parameters on a mesh, and an optimizer over them."""

    def __init__(self, mesh_name: str, kind: str, dtype: torch.dtype = torch.float32, **options: Any) -> None:
        self.mesh_name = mesh_name
        self.mesh = Mesh(Environment(device="cpu"), **MESHES.get(mesh_name, {}))
        self.dtype = dtype
        self.parameters = {name: nn.Parameter(self.spread(name, value_of(name, dtype))) for name in SHAPES}
        if kind == "muon":
            options["mesh"] = self.mesh
        self.optimizer = make_optimizer(kind, self.parameters, **options)

    def step(self, steps: range) -> Self:
        for step in steps:
            for name, parameter in self.parameters.items():
                parameter.grad = self.spread(name, gradient_of(name, step, self.dtype))
            self.optimizer.step()
            self.optimizer.zero_grad()
        return self

    def state(self) -> TrainState:
        model = nn.Module()
        for name, parameter in self.parameters.items():
            *path, last = name.split(".")
            owner = model
            for part in path:
                if not hasattr(owner, part):
                    owner.add_module(part, nn.Module())
                owner = owner.get_submodule(part)
            owner.register_parameter(last, parameter)
        return TrainState(model, self.optimizer)

    def gathered(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, parameter in self.parameters.items():
            found[name] = _full(parameter.detach())
            found |= {f"{name}/{key}": _full(state) for key, state in self.optimizer.state[parameter].items()}
        return found

    def spread(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        return _spread(tensor, self.mesh, self.mesh_name)


def _spread(tensor: torch.Tensor, mesh: Mesh, mesh_name: str) -> torch.Tensor:
    if mesh_name in ("alone", "copies"):
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


def _full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
