"""Weights from a checkpoint, a Hugging Face folder or a file into a model, by name."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from forgather.conversion.listing import listed
from forgather.conversion.safetensors_file import TensorKind
from forgather.conversion.weight_sources import WeightSource
from forgather.conversion.weight_sources import open_weights as open_weights
from forgather.errors import CheckpointError
from forgather.models.initialize import make_whole
from forgather.models.names import plain_name


@dataclass(frozen=True)
class LoadReport:
    """What became of each name; a tied weight is loaded under all its names by any of them."""

    path: Path
    loaded: tuple[str, ...]
    missing: tuple[str, ...]  # of the model, parameters and saved buffers, not in the checkpoint
    unexpected: tuple[str, ...]  # of the checkpoint, not in the model

    def warning(self) -> str | None:
        """What the user should know; None where model and checkpoint have the same names."""
        lines = []
        if self.missing:
            lines.append(f"not in {self.path}, and left as they were:{listed(self.missing)}")
        if self.unexpected:
            lines.append(f"in {self.path}, and not in the model:{listed(self.unexpected)}")
        return "\n".join(lines) or None


def load_weights(
    model: nn.Module, path: Path, *, strict: bool = False, device: str | torch.device | None = None
) -> LoadReport:
    """Copy what `path` holds into the parameters and saved buffers of `model`, in the model's own dtypes.

    A model on the meta device is given memory on `device` (the CPU) first; then its ties hold and what no checkpoint
    holds, such as rotary frequencies, is computed. Any other model stays where it is. What the checkpoint lacks keeps
    its value, and is an error with `strict` or where there is no value; what it holds beyond the model is only
    reported. CheckpointError, before anything is written, when shapes differ (all names, both shapes), when not one
    name is common, when weights that the model ties differ, or when the model is sharded over ranks.
    """
    source = open_weights(path)
    state = _state(model)
    if any(isinstance(tensor, DTensor) for tensor in state.values()):
        raise CheckpointError(
            "the model is sharded over ranks, and weights are loaded whole",
            fix="load them before fully_shard, or resume a run from its checkpoint",
        )
    on_meta = any(tensor.is_meta for tensor in state.values())
    groups = _groups(state)
    chosen, report = _match(groups, source)
    _require_fit({name: state[name] for name in chosen}, source)
    if report.missing and (strict or on_meta):
        raise CheckpointError(
            f"{source.path} has no value for{listed(report.missing)}",
            fix="load a checkpoint of this model"
            + ("" if strict else ", or construct the model on a device, where what is missing gets a first value"),
        )
    if on_meta:
        _materialise(model, groups, torch.device("cpu" if device is None else device))
    state, wanted = _state(model), set(chosen)
    with torch.no_grad():
        for name in source.kinds:  # in the order of the source, which is that of its files
            if name in wanted:
                state[name].copy_(source.read(name))
    return report


def _state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and saved buffers, under every name that they have."""
    return {plain_name(name): tensor for name, tensor in model.state_dict(keep_vars=True).items()}


def _groups(state: Mapping[str, torch.Tensor]) -> list[list[str]]:
    """The names, those of one tensor together."""
    groups: dict[int, list[str]] = {}
    for name, tensor in state.items():
        groups.setdefault(id(tensor), []).append(name)
    return list(groups.values())


def _match(groups: Iterable[list[str]], source: WeightSource) -> tuple[list[str], LoadReport]:
    """The names to read, one for each tensor of the model, and the report of the load."""
    chosen, loaded, missing = [], [], []
    for names in groups:
        there = [name for name in names if name in source.kinds]
        if there:
            _require_equal(there, source)
            chosen.append(there[0])
            loaded += names
        else:
            missing += names[:1]
    expected = {name for names in groups for name in names}
    report = LoadReport(
        path=source.path,
        loaded=tuple(loaded),
        missing=tuple(missing),
        unexpected=tuple(name for name in source.kinds if name not in expected),
    )
    if not chosen:
        raise CheckpointError(
            f"{source.path} and the model have no name in common; it holds{listed(report.unexpected)}\n"
            f"  the model has{listed(missing)}",
            fix="load a checkpoint of this architecture; another's is brought in by `forgather import`",
        )
    return chosen, report


def _require_equal(names: list[str], source: WeightSource) -> None:
    """One tensor of the model cannot take two values."""
    for other in names[1:]:
        if not torch.equal(source.read(names[0]), source.read(other)):
            raise CheckpointError(
                f"the model ties {names[0]} and {other}, which differ in {source.path}",
                fix="construct the model with tie_word_embeddings: false",
            )


def _require_fit(targets: Mapping[str, torch.Tensor], source: WeightSource) -> None:
    """Same shapes, and numbers that are of the same sort."""
    shapes, dtypes = [], []
    for name, target in targets.items():
        kind, own = source.kinds[name], TensorKind(tuple(target.shape), target.dtype)
        if kind.shape != own.shape:
            shapes.append(f"{name} {list(kind.shape)}, {list(own.shape)}")
        elif kind.dtype.is_floating_point != own.dtype.is_floating_point:
            dtypes.append(f"{name} {kind.dtype}, {own.dtype}")
    if shapes:
        raise CheckpointError(
            f"{source.path} is of another model; in the checkpoint, and in the model:{listed(shapes + dtypes)}",
            fix="construct the model with the sizes of the checkpoint",
        )
    if dtypes:
        raise CheckpointError(
            f"{source.path} has numbers of another sort; in the checkpoint, and in the model:{listed(dtypes)}",
            fix="save these tensors in the model's dtype; integers of quantized weights must be dequantized first",
        )


def _materialise(model: nn.Module, groups: Iterable[list[str]], device: torch.device) -> None:
    """Memory for a model on the meta device, whose ties `to_empty` would undo."""
    model.to_empty(device=device)
    for first, *others in groups:
        for name in others:
            _assign(model, name, _state(model)[first])
    make_whole(model)


def _assign(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    module, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(module), attribute, tensor)
