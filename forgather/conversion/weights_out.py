"""Weights of a model in memory into a folder, as the files in which Hugging Face keeps them."""

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from forgather.conversion.safetensors_file import TensorKind
from forgather.conversion.shards import MAX_SHARD_BYTES, shards_of, tell_dtype, write_index, write_shards
from forgather.conversion.weight_sources import HUGGING_FACE_FILES, HUGGING_FACE_WEIGHTS
from forgather.durable import sync, sync_all
from forgather.errors import CheckpointError
from forgather.models.names import plain_name


def save_weights(
    model: nn.Module, folder: Path, *, max_shard_bytes: int = MAX_SHARD_BYTES, safetensors: bool = True
) -> list[Path]:
    """Write the parameters and saved buffers of `model` into `folder`, over the weights there; return the new files.

    A tied weight is written once, under the name that transformers ties the others to. No file is larger than
    `max_shard_bytes` unless it holds one tensor; the index names the file of each. Without `safetensors` the files are
    those of `torch.save`. config.json, where there is one, is told the dtype. All is written aside first: at no moment
    does the folder hold weights of two models that would load as one. CheckpointError when the model is on the meta
    device or sharded, or the folder cannot be written.
    """
    weights = _weights(model)
    kinds = {name: TensorKind(tuple(weight.shape), weight.dtype) for name, weight in weights.items()}

    def stream(names: Sequence[str]) -> Iterator[torch.Tensor]:
        return (weights[name].cpu() for name in names)

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".weights-") as temporary:
            aside = Path(temporary)
            if safetensors:
                places = write_shards(aside, kinds, max_shard_bytes, stream)
                write_index(aside / "model.safetensors.index.json", kinds, places)
            else:
                _write_pickles(aside, kinds, max_shard_bytes, weights)
            if (folder / "config.json").exists():
                shutil.copy(folder / "config.json", aside)
                tell_dtype(aside / "config.json", kinds)
            return _move_in(aside, folder)
    except OSError as error:
        raise CheckpointError(
            f"could not write weights into {folder}: {error.strerror}",
            fix="name a folder that can be written and has space",
        ) from error


def _weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Each tensor once."""
    targets = getattr(model, "all_tied_weights_keys", {})
    state = {plain_name(name): tensor for name, tensor in model.state_dict(keep_vars=True).items()}
    if without := [name for name, tensor in state.items() if tensor.is_meta]:
        raise CheckpointError(
            f"a model on the meta device has no values to save: {without[0]}, ...",
            fix="construct it on a device (--device cpu)",
        )
    if any(isinstance(tensor, DTensor) for tensor in state.values()):
        raise CheckpointError(
            "the model is sharded over ranks, of which each would write its part",
            fix="save a checkpoint of the run, and `forgather export` it",
        )
    owners: dict[int, str] = {}
    for name in sorted(state, key=lambda name: name in targets):
        owners.setdefault(id(state[name]), name)
    return {name: tensor.detach() for name, tensor in state.items() if owners[id(tensor)] == name}


def _write_pickles(
    folder: Path, kinds: Mapping[str, TensorKind], max_bytes: int, weights: Mapping[str, torch.Tensor]
) -> None:
    shards = shards_of(kinds, max_bytes)
    places: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = "pytorch_model.bin" if len(shards) == 1 else f"pytorch_model-{number:05d}-of-{len(shards):05d}.bin"
        places |= dict.fromkeys(names, file)
        # Cloned, because torch.save writes all of the memory that a tensor is a view of.
        torch.save({name: weights[name].cpu().clone() for name in names}, folder / file)
    write_index(folder / "pytorch_model.bin.index.json", kinds, places)


def _move_in(aside: Path, folder: Path) -> list[Path]:
    """Let the files in `aside` take the place of the weights in `folder`."""
    files = sorted(path.name for path in aside.iterdir())
    weights = [name for name in files if HUGGING_FACE_WEIGHTS.fullmatch(name)]
    sync_all(aside.iterdir())
    if len(weights) > 2:  # several shards and their index
        # Without what names them, old shards are no weights; so new and old ones never load together.
        for name in HUGGING_FACE_FILES:
            (folder / name).unlink(missing_ok=True)
        sync(folder)
    for name in sorted(files, key=lambda name: name.endswith(".json")):
        (aside / name).replace(folder / name)
    for path in folder.iterdir():
        if HUGGING_FACE_WEIGHTS.fullmatch(path.name) and path.name not in weights:
            path.unlink()
    sync(folder)
    return [folder / name for name in weights]
