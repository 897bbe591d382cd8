"""Everything that decides how a run goes on: weights, optimizer, loader, hooks, random numbers.

`capture` gives it as named tensors and a JSON document; `targets` and `accept` bring it back, on any mesh. The tensors
are the live ones, DTensors where the model is sharded: each rank's part is written, and read straight into. Names:

    model/model.layers.0.self_attn.q_proj.weight
    optimizer/model.layers.0.self_attn.q_proj.weight/exp_avg
    extras/<hook>/<path in its state>
    random/<rank>/torch

What differs from rank to rank has the rank in its name: of tensors that share one, as copies do, one is stored.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from forgather.checkpoint.document import Json, join, split
from forgather.checkpoint.layout import Layout
from forgather.checkpoint.optimizer_state import optimizer_state_by_name, prepare_state
from forgather.checkpoint.random_state import capture_random, reseed_random, restore_random
from forgather.checkpoint.storage import dtype_of
from forgather.distributed.collectives import rank, world_size
from forgather.errors import CheckpointError
from forgather.models.names import plain_name


@runtime_checkable
class Scattered(Protocol):
    """An extra of which each rank has tensors of its own; see `TrainState`."""

    def load_targets(
        self, saved: Mapping[str, Any], stored: Mapping[str, tuple[Sequence[int], torch.dtype]]
    ) -> Mapping[str, torch.Tensor]: ...


@dataclass
class TrainState:
    """A run's live objects. `extras` have a `state_dict` and a `load_state_dict`, and are saved under their names.

    What an extra gives is the same on every rank, or a DTensor; tensors that differ are refused, and of the rest rank
    0's is saved. `mesh` is the size of each axis that the run is spread over.
    """

    model: nn.Module
    optimizer: Optimizer
    extras: Mapping[str, Stateful] = field(default_factory=dict)
    mesh: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.extras:
            if "/" in name:
                raise CheckpointError(
                    f"{name!r} cannot be saved under that name: a '/' divides the names of tensors",
                    fix=f"name it {name.replace('/', '_')!r}",
                )

    def capture(self) -> tuple[dict[str, torch.Tensor], dict[str, Json]]:
        """This rank's named tensors, and its part of the document of the rest."""
        weights = self.weights()
        tensors = {f"model/{name}": tensor for name, tensor in weights.items()}
        optimizer, optimizer_tensors = self._optimizer_state(_names(weights))
        extras, extra_tensors = split({name: extra.state_dict() for name, extra in self.extras.items()}, "extras")
        own, random_tensors = split(capture_random(self.device), f"random/{rank()}")
        document: dict[str, Json] = {
            "optimizer": optimizer,
            "extras": extras,
            "random": own,
        }
        return tensors | optimizer_tensors | extra_tensors | random_tensors, document

    def targets(self, saved: Layout, document: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """The tensors to read a checkpoint into: the live weights and optimizer state, and room for the rest."""
        weights = self.weights()
        names = _names(weights)
        targets = {f"model/{name}": tensor for name, tensor in weights.items()}
        trained = {key.split("/")[1] for key in _keys(saved, "optimizer/")} | set(document["optimizer"])
        prepare_state(self.optimizer, names, trained)
        targets |= self._optimizer_state(names)[1]
        whole = {name: extra.state_dict() for name, extra in self.extras.items() if not isinstance(extra, Scattered)}
        _, live = split(whole, "extras")
        for name, extra in self.extras.items():
            keys = _keys(saved, f"extras/{name}/")
            if isinstance(extra, Scattered):
                prefix = f"extras/{name}/"
                stored = {key.removeprefix(prefix): (saved[key].shape, dtype_of(saved[key])) for key in keys}
                own = extra.load_targets(document["extras"].get(name, {}), stored)
                targets |= {f"{prefix}{path}": tensor for path, tensor in own.items()}
                continue
            for key in keys:
                # An extra may have another shape of state today (a list that grew); what is sharded has its place.
                here = live.get(key)
                targets[key] = here if isinstance(here, DTensor) else _room(saved, key)
        source = rank() if len(document["random"]) == world_size() else 0
        targets |= {key: _room(saved, key) for key in _keys(saved, f"random/{source}/")}
        return targets

    def accept(self, document: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        """Take what was read into `targets`: states that are no tensors, extras, random numbers."""
        for name, values in document["optimizer"].items():
            if (parameter := tensors.get(f"model/{name}")) is not None:  # not that of another stage
                self.optimizer.state[parameter].update(join(values, tensors))
        for name, extra in self.extras.items():
            if name in document["extras"]:
                is_scattered = isinstance(extra, Scattered)
                extra.load_state_dict(join(document["extras"][name], tensors, partly=is_scattered))
        if len(document["random"]) == world_size():
            restore_random(join(document["random"][rank()], tensors), self.device)
        else:
            reseed_random(join(document["random"][0], tensors), rank(), world_size())

    def weights(self) -> dict[str, torch.Tensor]:
        """Parameters and persistent buffers by name; tied ones once, under the name that the others are tied to.

        That holds also where the others are on other ranks, as an embedding that a head on the last stage is tied to.
        """
        followers = getattr(self.model, "all_tied_weights_keys", None) or {}
        state = {plain_name(name): tensor for name, tensor in self.model.state_dict(keep_vars=True).items()}
        named: dict[torch.Tensor, str] = {}
        for name, tensor in state.items():
            if tensor not in named or named[tensor] in followers:
                named[tensor] = name
        return {
            name if name not in followers or followers[name] in state else followers[name]: tensor
            for tensor, name in named.items()
        }

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return next((parameter.device for parameter in self.model.parameters()), torch.device("cpu"))

    def _optimizer_state(self, names: Mapping[torch.Tensor, str]) -> tuple[dict[str, Json], dict[str, torch.Tensor]]:
        """What the optimizer knows of each parameter: values that are no tensors by name, and the live tensors."""
        values: dict[str, Json] = {}
        tensors: dict[str, torch.Tensor] = {}
        for name, state in optimizer_state_by_name(self.optimizer, names).items():
            tensors |= {
                f"optimizer/{name}/{key}": part for key, part in state.items() if isinstance(part, torch.Tensor)
            }
            others = {key: part for key, part in state.items() if not isinstance(part, torch.Tensor)}
            if others:
                values[name], nested = split(others, f"optimizer/{name}")
                tensors |= nested
        return values, tensors


def _names(weights: Mapping[str, torch.Tensor]) -> dict[torch.Tensor, str]:
    return {tensor: name for name, tensor in weights.items()}


def _keys(saved: Layout, prefix: str) -> list[str]:
    return [key for key in saved if key.startswith(prefix)]


def _room(saved: Layout, key: str) -> torch.Tensor:
    return torch.empty(saved[key].shape, dtype=dtype_of(saved[key]))
