"""From a checkpoint to a Hugging Face folder, in memory that does not grow with the model.

The folder holds the model's package and its weights as safetensors: what `AutoModelForCausalLM.from_pretrained` wants,
with no Forgather installed. Tensors go from the checkpoint's files to the shards in small batches, straight into the
place where they stay; the folder appears by one rename when it is whole.
"""

import json
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

from forgather.checkpoint.folder import saved_steps, step_name
from forgather.checkpoint.manifest import MANIFEST
from forgather.checkpoint.storage import RawReader
from forgather.checkpoint.store import Checkpoint, calling_dcp, load_planner, visible_checkpoint
from forgather.conversion.safetensors_file import SafetensorsFile, TensorKind
from forgather.durable import appearing
from forgather.errors import CheckpointError

PACKAGE = "package"
MAX_SHARD_BYTES = 5 * 10**9
# Read and written together: large enough that planning costs nothing, small beside any model worth cutting.
_BATCH_BYTES = 16 << 20
_NOT_EXPORTED = {"forgather_package.json"}  # tells how the package was generated; it is about another folder


class DamageError(CheckpointError):
    """Files of a checkpoint are not what was saved."""

    def __init__(self, folder: Path, damage: Sequence[str]) -> None:
        super().__init__(f"{folder} is damaged: {'; '.join(damage)}", fix="export another checkpoint of the run")


def export(
    source: Path, destination: Path, *, max_shard_bytes: int = MAX_SHARD_BYTES, dtype: torch.dtype | None = None
) -> Path:
    """Write `destination` from a checkpoint, or from the newest whole checkpoint of a run folder; return it.

    With `dtype`, floating-point weights are converted. A tensor larger than `max_shard_bytes` gets a shard of its own.
    Of a run, damaged checkpoints are named and passed over. CheckpointError when the source is no checkpoint, is
    damaged or goes away, or the destination exists, is being written by another export, or cannot be written.
    """
    destination = destination.absolute()
    _refuse_what_is_there(destination)
    folders = candidates(source)
    with _only_writer(destination):
        _refuse_what_is_there(destination)
        for folder in folders:
            try:
                with appearing(destination) as aside, _explaining_removal(folder):
                    _write(_opened(folder), aside, max_shard_bytes, dtype)
            except DamageError as error:
                if folder == source:
                    raise
                print(f"warning: {error.message}; it is not used", file=sys.stderr)
            else:
                if folder not in (source, folders[0]):
                    print(f"warning: exported {folder}, the newest that is whole", file=sys.stderr)
                return destination
    raise CheckpointError(
        f"every checkpoint in {source / 'checkpoints'} is damaged", fix="bring back the files named above"
    )


def candidates(source: Path) -> list[Path]:
    """The checkpoint that `source` is, or those of the run that it is, newest first."""
    if (source / MANIFEST).exists():
        return [source]
    checkpoints = source / "checkpoints"
    if steps := saved_steps(checkpoints):
        return [checkpoints / step_name(step) for step in reversed(steps)]
    if checkpoints.is_dir():
        aside = sorted(entry.name for entry in checkpoints.glob("step-*.damaged*"))
        why = (
            f"all its checkpoints are damaged, and set aside: {', '.join(aside)}" if aside else "it has saved none yet"
        )
        every = "train until it saves one, which is every `save_every` steps and at the end"
        raise CheckpointError(
            f"the run {source} has no checkpoint to export: {why}", fix="continue its training" if aside else every
        )
    runs = sorted(path.parent for path in source.glob("runs/*/checkpoints")) if source.is_dir() else []
    hint = f"; runs here: {', '.join(map(str, runs))}" if runs else ""
    raise CheckpointError(
        f"{source} is neither a checkpoint nor a run with one",
        fix=f"name a run folder, or one of the folders in its checkpoints/{hint}",
    )


def shards_of(kinds: Mapping[str, TensorKind], max_bytes: int) -> list[list[str]]:
    """Names in the order of the model, cut so that no shard has more than `max_bytes` unless it is one tensor."""
    shards: list[list[str]] = [[]]
    size = 0
    for name in sorted(kinds, key=_natural):
        if shards[-1] and size + kinds[name].num_bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += kinds[name].num_bytes
    return shards


@contextmanager
def _only_writer(destination: Path) -> Iterator[None]:
    """One export at a time to one folder, and what the operating system refuses with the path and what to do."""
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        path = destination.with_name(f".{destination.name}.lock")
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise CheckpointError(
                f"another export is writing {destination}", fix="let it end or stop it, or name another folder"
            ) from None
        try:
            yield
        finally:
            path.unlink(missing_ok=True)  # still held: who has just opened it finds that it has no name, and retries
            lock.release()
    except OSError as error:
        raise CheckpointError(
            f"could not write {destination}: {error.strerror}", fix="name a folder that can be written and has space"
        ) from error


def _refuse_what_is_there(destination: Path) -> None:
    if destination.exists():
        raise CheckpointError(f"{destination} is already there, and nothing is overwritten", fix="name another folder")


@contextmanager
def _explaining_removal(folder: Path) -> Iterator[None]:
    """A live run removes its old checkpoints, whoever is reading them."""
    try:
        yield
    except (OSError, CheckpointError) as error:
        if folder.is_dir():
            raise
        raise CheckpointError(
            f"{folder} was removed while it was exported: a live run keeps only its newest checkpoints",
            fix=f"export {folder.parent.parent}, which has newer ones, or let the run keep more of them (keep_last)",
        ) from error


def _opened(folder: Path) -> Checkpoint:
    """The checkpoint in `folder` where no damage shows; tensors are checked as they are read."""
    manifest = visible_checkpoint(folder)
    if isinstance(manifest, list):
        raise DamageError(folder, manifest)
    return Checkpoint(folder, manifest)


def _write(checkpoint: Checkpoint, folder: Path, max_shard_bytes: int, dtype: torch.dtype | None) -> None:
    package = _verified_package(checkpoint)
    kinds = weight_kinds(checkpoint.layout, dtype)
    for file in package:
        shutil.copy(file, folder / file.name)
    _tell_dtype(folder / "config.json", kinds)
    _write_weights(checkpoint, folder, shards_of(kinds, max_shard_bytes), kinds)


def _write_weights(
    checkpoint: Checkpoint, folder: Path, shards: Sequence[Sequence[str]], kinds: Mapping[str, TensorKind]
) -> None:
    places: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        alone = len(shards) == 1
        file = "model.safetensors" if alone else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        places |= dict.fromkeys(names, file)
        with SafetensorsFile(folder / file, {name: kinds[name] for name in names}) as stream:
            for tensor in _tensors(checkpoint, stream.order):
                stream.write(tensor)
    if len(shards) > 1:
        # The index comes last: it names files that are whole.
        metadata = {
            "total_size": sum(kind.num_bytes for kind in kinds.values()),
            "total_parameters": sum(kind.num_bytes // kind.dtype.itemsize for kind in kinds.values()),
        }
        index = {"metadata": metadata, "weight_map": dict(sorted(places.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _tensors(checkpoint: Checkpoint, names: Sequence[str]) -> Iterator[torch.Tensor]:
    """The weights called `names`, whole, in that order, each checked against its digest.

    A tensor is good until the next is asked for: all are read into one piece of memory, because DCP's planner keeps
    what it has loaded alive until the garbage collector comes by.
    """
    reader = RawReader(checkpoint.path, checkpoint.layout)
    saved = weight_kinds(checkpoint.layout)
    batches = _batches({name: saved[name] for name in names})
    memory = torch.empty(max(sum(_room(kind) for kind in batch.values()) for batch in batches), dtype=torch.uint8)
    for batch in batches:
        tensors = {}
        at = 0
        for name, kind in batch.items():
            tensors[f"model/{name}"] = memory[at : at + kind.num_bytes].view(kind.dtype).view(kind.shape)
            at += _room(kind)
        try:
            with calling_dcp(f"could not read {checkpoint.path}"):
                dcp_load(tensors, storage_reader=reader, planner=load_planner(), no_dist=True)
        except CheckpointError as error:
            raise DamageError(checkpoint.path, [error.message]) from error
        for name in batch:
            yield tensors[f"model/{name}"]


def _batches(kinds: Mapping[str, TensorKind]) -> list[dict[str, TensorKind]]:
    batches: list[dict[str, TensorKind]] = [{}]
    size = 0
    for name, kind in kinds.items():
        if batches[-1] and size + _room(kind) > _BATCH_BYTES:
            batches.append({})
            size = 0
        batches[-1][name] = kind
        size += _room(kind)
    return batches


def _room(kind: TensorKind) -> int:
    """Bytes for a tensor, rounded up so that the next one is aligned for any dtype."""
    return -(-kind.num_bytes // 64) * 64


def weight_kinds(layout: Metadata, dtype: torch.dtype | None = None) -> dict[str, TensorKind]:
    """Shape and dtype of each weight, in `dtype` where it is floating-point and `dtype` is given."""
    kinds = {}
    for key, tensor in layout.state_dict_metadata.items():
        if key.startswith("model/"):
            assert isinstance(tensor, TensorStorageMetadata)
            saved = tensor.properties.dtype
            target = dtype if dtype is not None and saved.is_floating_point else saved
            kinds[key.removeprefix("model/")] = TensorKind(tuple(tensor.size), target)
    return kinds


def _verified_package(checkpoint: Checkpoint) -> list[Path]:
    """The files of the model's package, after every file but the tensors' (checked as they are read) was verified."""
    names = [name for name in checkpoint.manifest.files if not name.endswith(".bin")]
    if damage := checkpoint.manifest.damaged_digests(checkpoint.path, names):
        raise DamageError(checkpoint.path, damage)
    files = [
        checkpoint.path / name
        for name in names
        if name.startswith(f"{PACKAGE}/") and Path(name).name not in _NOT_EXPORTED
    ]
    if f"{PACKAGE}/config.json" not in names:
        raise CheckpointError(
            f"{checkpoint.path} has no model package, so that nothing could load its weights",
            fix=f"put the model's files (config.json, code, tokenizer) into {checkpoint.path / PACKAGE}",
        )
    return files


def _tell_dtype(config: Path, kinds: Mapping[str, TensorKind]) -> None:
    """Let config.json name the weights' dtype, which is what they are loaded in by default."""
    sizes: dict[torch.dtype, int] = {}
    for kind in kinds.values():
        if kind.dtype.is_floating_point:
            sizes[kind.dtype] = sizes.get(kind.dtype, 0) + kind.num_bytes
    if not sizes:
        return  # a model of integers alone loads as it is stored
    content = json.loads(config.read_text())
    content["dtype"] = str(max(sizes, key=lambda dtype: sizes[dtype])).removeprefix("torch.")
    config.write_text(json.dumps(content, indent=2) + "\n")


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts layers.2 before layers.10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
