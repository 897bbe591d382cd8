"""Tensors by name, out of whatever weights come in: each is read when it is asked for, and no more than it.

    source = open_weights(path)
    source.kinds["lm_head.weight"].shape, source.read("lm_head.weight")

A checkpoint of ours, a Hugging Face folder and a file look the same from here on.
"""

import json
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import xxhash
from safetensors import SafetensorError, safe_open

from forgather.checkpoint.layout import LAYOUT
from forgather.checkpoint.loading import Checkpoint, load_weights, visible_checkpoint
from forgather.checkpoint.manifest import MANIFEST, record_of
from forgather.checkpoint.storage import read_tensor
from forgather.conversion.checkpoint_model import candidates, weight_kinds
from forgather.conversion.safetensors_file import DTYPE_NAMES, TensorKind
from forgather.errors import CheckpointError

# In the order in which transformers looks for them, so that both of us load the same.
HUGGING_FACE_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# Those names, and what an index may name.
HUGGING_FACE_WEIGHTS = re.compile(r"(pytorch_)?model(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index\.json)?")
# Gives a weight by its name.
Read = Callable[[str], torch.Tensor]
_PICKLES = (".bin", ".pt", ".pth")
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
# What reading a file that was cut off, or was never one of torch's, ends in.
_UNREADABLE = (EOFError, RuntimeError, ValueError, LookupError, TypeError, AttributeError, struct.error)


class WeightSource(Protocol):
    """Weights that stand somewhere; `kinds` has the shape and dtype of each, in the order of the source."""

    @property
    def path(self) -> Path: ...

    @property
    def kinds(self) -> Mapping[str, TensorKind]: ...

    @property
    def files(self) -> Sequence[Path]:
        """The files by which it is known: as long as they are the same, so are the weights."""

    def read(self, name: str) -> torch.Tensor:
        """The tensor, on the CPU. It may be a view of the file: copy it before writing into it."""


def fingerprint(source: WeightSource) -> str:
    """Equal for equal weights, as far as that can be told from names, shapes, sizes of files, and digests in them."""
    digest = xxhash.xxh3_64(repr([(name, kind.shape, kind.dtype) for name, kind in source.kinds.items()]).encode())
    for file in source.files:
        # A manifest has the digests of all that belongs to it.
        content = record_of(file).xxh3 if file.name == MANIFEST else file.stat().st_size
        digest.update(f"{file.name} {content}".encode())
    return digest.hexdigest()


def open_weights(path: Path) -> WeightSource:
    """The weights in `path`, of which nothing but names, shapes and dtypes has been read.

    `path` is a checkpoint or a run of ours (its newest checkpoint), a Hugging Face folder (whole or sharded), one of
    its files or its index; files other than safetensors are read as data only, never as programs. CheckpointError when
    it is none of these, is damaged, or is a pickle of something else.
    """
    if path.is_dir():
        if not (path / MANIFEST).exists():
            for name in HUGGING_FACE_FILES:
                if (path / name).exists():
                    return open_weights(path / name)
        return CheckpointSource(path)
    if not path.exists():
        raise CheckpointError(f"{path} is not there", fix="name a checkpoint, a run, a Hugging Face folder, or a file")
    if path.name.endswith(".index.json"):
        return _ShardedSource(path)
    if path.suffix == ".safetensors":
        return _SafetensorsSource(path)
    if path.suffix in _PICKLES:
        return _PickleSource(path)
    has_weights = any((path.parent / name).exists() for name in (MANIFEST, *HUGGING_FACE_FILES))
    folder = f"name its folder, {path.parent}, or " if has_weights else "name "
    raise CheckpointError(
        f"{path} has the name of no weights",
        fix=f"{folder}a file that ends in .safetensors, .index.json, {', '.join(_PICKLES)}",
    )


class CheckpointSource:
    """The model's part of a checkpoint; of a run, its newest where no damage shows.

    Where its tensors stand is verified here, and each when it is read.
    """

    def __init__(self, path: Path) -> None:
        self._checkpoint = _newest_whole(path)
        self.path = self._checkpoint.path
        self.files = [self.path / MANIFEST]
        self.kinds: Mapping[str, TensorKind] = weight_kinds(self._checkpoint.layout)

    def read(self, name: str) -> torch.Tensor:
        return read_tensor(self.path, self._checkpoint.layout, f"model/{name}")

    def read_into(self, targets: Mapping[str, torch.Tensor]) -> None:
        """Fill what this rank has of each of `targets`. Collective: together ranks verify all weights there.

        CheckpointError, on every rank, when they are not those that were saved.
        """
        load_weights(self._checkpoint, targets)


def _newest_whole(path: Path) -> Checkpoint:
    damage = []
    for folder in candidates(path):
        opened = visible_checkpoint(folder)
        # Places that are wrong would pass for right: a tensor's own digest stands beside its place.
        seen = opened.manifest.damaged_digests(folder, [LAYOUT]) if isinstance(opened, Checkpoint) else opened
        if isinstance(opened, Checkpoint) and not seen:
            return opened
        damage.append(f"{folder}: {', '.join(seen)}")
    raise CheckpointError(
        f"no checkpoint here is whole: {'; '.join(damage)}",
        fix="bring back the files named above, or name another run or checkpoint",
    )


class _SafetensorsSource:
    """One file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = [path]
        try:
            file: Any = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path} cannot be read as safetensors: {error}", fix="fetch it anew, or name another file"
            ) from error
        self._file = file
        kinds = {}
        for name in file.keys():  # noqa: SIM118 - a safe_open is no dict
            entry = file.get_slice(name)
            dtype = _DTYPES.get(entry.get_dtype())
            if dtype is None:
                raise CheckpointError(
                    f"{path}: {name} is {entry.get_dtype()}, which no model here holds", fix="convert it to BF16 or F32"
                )
            kinds[name] = TensorKind(tuple(entry.get_shape()), dtype)
        self.kinds: Mapping[str, TensorKind] = kinds

    def read(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._file.get_tensor(name)
        return tensor


class _PickleSource:
    """One file of `torch.save`, mapped into memory where its format allows it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = [path]
        self._tensors = _tensors_of_pickle(path)
        self.kinds: Mapping[str, TensorKind] = {
            name: TensorKind(tuple(tensor.shape), tensor.dtype) for name, tensor in self._tensors.items()
        }

    def read(self, name: str) -> torch.Tensor:
        return self._tensors[name]


class _ShardedSource:
    """Several files and their index. One is open at a time, so reading in the order of `kinds` opens each once."""

    def __init__(self, index: Path) -> None:
        self.path = index
        self._places = _weight_map(index)
        self._open: WeightSource | None = None
        kinds: dict[str, TensorKind] = {}
        names_of = dict.fromkeys(self._places.values())
        self.files = [index, *(index.parent / file for file in names_of)]
        for file in names_of:
            names = [name for name, place in self._places.items() if place == file]
            there = self._source(file).kinds
            if missing := [name for name in names if name not in there]:
                raise CheckpointError(
                    f"{index} names tensors that {file} does not hold: {_shortened(missing)}", fix="fetch both anew"
                )
            kinds |= {name: there[name] for name in names}
        self.kinds: Mapping[str, TensorKind] = kinds

    def read(self, name: str) -> torch.Tensor:
        return self._source(self._places[name]).read(name)

    def _source(self, file: str) -> WeightSource:
        path = self.path.parent / file
        if self._open is None or self._open.path != path:
            self._open = None  # before the next: memory is for one
            self._open = open_weights(path)
        return self._open


def _weight_map(index: Path) -> dict[str, str]:
    """Which file of the index's own folder has which tensor."""
    try:
        places: Any = json.loads(index.read_bytes())["weight_map"]
        files = sorted({str(file) for file in places.values()})
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index} is no index of weights ({error})", fix="fetch it anew") from error
    foreign = [file for file in files if Path(file).name != file or file.endswith(".index.json")]
    if foreign:
        raise CheckpointError(f"{index} names what is no file beside it: {_shortened(foreign)}", fix="fetch it anew")
    if absent := [file for file in files if not (index.parent / file).is_file()]:
        raise CheckpointError(f"{index} names files that are not there: {_shortened(absent)}", fix="fetch them too")
    return dict(places)


def _tensors_of_pickle(path: Path) -> dict[str, torch.Tensor]:
    try:
        with warnings.catch_warnings():
            # A pickle of another protocol is read all the same, or refused.
            warnings.filterwarnings("ignore", "Detected pickle protocol", UserWarning)
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is a pickle of more than tensors, and was not loaded: nothing that it asks for was run",
            fix="name a file of weights; of a model from elsewhere, the .safetensors",
        ) from error
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}", fix="name a file that can be read") from error
    except _UNREADABLE as error:
        raise CheckpointError(f"{path} is no file of torch.save, or is damaged", fix="fetch it anew") from error
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{path} holds a {type(content).__name__}, and not tensors by their names",
            fix="save the model's state_dict() alone",
        )
    if foreign := [str(name) for name, value in content.items() if not _is_weight(name, value)]:
        raise CheckpointError(
            f"{path} holds other things than named tensors: {_shortened(foreign)}",
            fix="save the model's state_dict() alone",
        )
    return dict(content)


def _is_weight(name: object, value: object) -> bool:
    """Whether it is numbers that can be copied: some tensors have a name and no values, or values of other kinds."""
    if not isinstance(name, str) or not isinstance(value, torch.Tensor):
        return False
    return value.layout == torch.strided and value.device.type == "cpu" and not (value.is_nested or value.is_quantized)


def _shortened(names: Iterable[str], most: int = 10) -> str:
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
