"""The model in a checkpoint: which checkpoint it is, the files of its package, and its weights, one after the other.

Tensors come from the checkpoint's files in small batches, the next of which is read while the last is used.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch

from forgather.checkpoint.folder import saved_steps, step_name
from forgather.checkpoint.layout import Layout
from forgather.checkpoint.loading import visible_checkpoint
from forgather.checkpoint.manifest import MANIFEST
from forgather.checkpoint.storage import DamagedFileError, dtype_of, read_into, read_tensor
from forgather.conversion.safetensors_file import TensorKind
from forgather.errors import CheckpointError

PACKAGE = "package"
# Read and written together, at most: large enough that planning costs nothing, small beside a file worth cutting.
_BATCH_BYTES = 16 << 20


class DamageError(CheckpointError):
    """Files of a checkpoint are not what was saved."""

    def __init__(self, folder: Path, damage: Sequence[str]) -> None:
        super().__init__(f"{folder} is damaged: {'; '.join(damage)}", fix="export another checkpoint of the run")


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
            f"the run {source} has no checkpoint: {why}", fix="continue its training" if aside else every
        )
    if (source / "config.json").is_file():
        raise CheckpointError(
            f"{source} has a config.json and no weights",
            fix="give it weights: forgather model --device cpu --save-checkpoint construct",
        )
    runs = sorted(path.parent for path in source.glob("runs/*/checkpoints")) if source.is_dir() else []
    hint = f"; runs here: {', '.join(map(str, runs))}" if runs else ""
    raise CheckpointError(
        f"{source} is neither a checkpoint nor a run with one, and no package with weights",
        fix=f"name a run folder, one of the folders in its checkpoints/, or a package with weights{hint}",
    )


class CheckpointModel:
    """The model that a checkpoint holds. DamageError when damage shows, at once or in what is read later."""

    def __init__(self, folder: Path) -> None:
        opened = visible_checkpoint(folder)
        if isinstance(opened, list):
            raise DamageError(folder, opened)
        self._checkpoint = opened
        self.path = folder
        self.package = folder / PACKAGE
        self.kinds: Mapping[str, TensorKind] = weight_kinds(self._checkpoint.layout)

    def files(self) -> list[Path]:
        """The files of the model's package, after all of the checkpoint but its tensors was verified."""
        names = [name for name in self._checkpoint.manifest.files if not name.endswith(".bin")]
        if damage := self._checkpoint.manifest.damaged_digests(self.path, names):
            raise DamageError(self.path, damage)
        if f"{PACKAGE}/config.json" not in names:
            raise CheckpointError(
                f"{self.path} has no model package, so that nothing could load its weights",
                fix=f"put the model's files (config.json, code, tokenizer) into {self.package}",
            )
        return [self.path / name for name in names if name.startswith(f"{PACKAGE}/")]

    def reader(self) -> Callable[[str], torch.Tensor]:
        """Gives weights by name, each checked against its digest."""
        return lambda name: read_tensor(self.path, self._checkpoint.layout, f"model/{name}")

    def stream(self, names: Sequence[str]) -> Iterator[torch.Tensor]:
        """The weights called `names`, whole, in that order, each checked against its digest.

        A tensor is good until the next is asked for: there are two pieces of memory, and while what is in one is used,
        the other is read into.
        """
        batches = _batches({name: self.kinds[name] for name in names})
        rooms = [_memory_for(batches[0::2]), _memory_for(batches[1::2])]
        with ThreadPoolExecutor(1, thread_name_prefix="read ahead") as reader:
            coming = reader.submit(self._read, batches[0], rooms[0])
            for number, batch in enumerate(batches, 1):
                tensors = coming.result()
                if number < len(batches):
                    coming = reader.submit(self._read, batches[number], rooms[number % 2])
                for name in batch:
                    yield tensors[f"model/{name}"]

    def _read(self, batch: Mapping[str, TensorKind], room: torch.Tensor) -> dict[str, torch.Tensor]:
        tensors = {}
        at = 0
        for name, kind in batch.items():
            tensors[f"model/{name}"] = room[at : at + kind.num_bytes].view(kind.dtype).view(kind.shape)
            at += _room(kind)
        try:
            read_into(self.path, self._checkpoint.layout, tensors)
        except DamagedFileError as error:
            raise DamageError(self.path, [error.line]) from error
        return tensors


def weight_kinds(layout: Layout) -> dict[str, TensorKind]:
    """Shape and dtype of each weight of a checkpoint."""
    return {
        name.removeprefix("model/"): TensorKind(stored.shape, dtype_of(stored))
        for name, stored in layout.items()
        if name.startswith("model/")
    }


@contextmanager
def explaining_removal(folder: Path) -> Iterator[None]:
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


def _batches(kinds: Mapping[str, TensorKind]) -> list[dict[str, TensorKind]]:
    batches: list[dict[str, TensorKind]] = [{}]
    most = min(_BATCH_BYTES, sum(map(_room, kinds.values())) // 8)
    size = 0
    for name, kind in kinds.items():
        if batches[-1] and size + _room(kind) > most:
            batches.append({})
            size = 0
        batches[-1][name] = kind
        size += _room(kind)
    return batches


def _memory_for(batches: Sequence[Mapping[str, TensorKind]]) -> torch.Tensor:
    """Room for any one of them."""
    return torch.empty(max((sum(map(_room, batch.values())) for batch in batches), default=0), dtype=torch.uint8)


def _room(kind: TensorKind) -> int:
    """Bytes for a tensor, rounded up so that the next one is aligned for any dtype."""
    return -(-kind.num_bytes // 64) * 64
