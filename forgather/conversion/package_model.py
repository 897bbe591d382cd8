"""The model in a folder that holds a package and its weights, as `forgather import` and `save_pretrained` leave it."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch

from forgather.conversion.json_mapping import read_mapping
from forgather.conversion.safetensors_file import TensorKind
from forgather.conversion.weight_sources import HUGGING_FACE_FILES, Read, open_weights
from forgather.errors import ModelError

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".index.json")


class StoredModel(Protocol):
    """A package in the folder `package`, and the weights that are its own, of which one is in memory at a time."""

    @property
    def path(self) -> Path: ...

    @property
    def package(self) -> Path: ...

    @property
    def kinds(self) -> Mapping[str, TensorKind]: ...

    def files(self) -> list[Path]:
        """The files of the package, all that belongs to them verified."""

    def reader(self) -> Read: ...

    def stream(self, names: Sequence[str]) -> Iterator[torch.Tensor]:
        """The weights of these names, in this order; each is good until the next is asked for."""


class PackageModel:
    """The model in `folder`. ModelError where its config.json names no code, CheckpointError without weights."""

    def __init__(self, folder: Path) -> None:
        self.path = self.package = folder
        if "AutoModelForCausalLM" not in read_mapping(folder / "config.json").get("auto_map", {}):
            raise ModelError(
                f"{folder} is no model package: its config.json names no code of its own",
                fix="`forgather import` makes a package of a Hugging Face folder",
            )
        self._source = open_weights(folder)
        self.kinds = self._source.kinds

    def files(self) -> list[Path]:
        """What lies in the folder and is not weights."""
        return sorted(path for path in self.path.iterdir() if path.is_file() and _belongs(path.name))

    def reader(self) -> Read:
        """Gives weights by name, as views of the files, which it closes when it goes."""
        return open_weights(self._source.path).read

    def stream(self, names: Sequence[str]) -> Iterator[torch.Tensor]:
        """The weights of these names, in this order."""
        return map(self.reader(), names)


def is_package(folder: Path) -> bool:
    """Whether `folder` is one with config.json and weights, and not a run, which may hold a package, too."""
    return (folder / "config.json").is_file() and any((folder / name).is_file() for name in HUGGING_FACE_FILES)


def _belongs(name: str) -> bool:
    return not name.startswith(".") and not name.endswith(_WEIGHTS)
