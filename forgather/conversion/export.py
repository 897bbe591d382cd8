"""From a run, a checkpoint or a package with weights to a Hugging Face folder, in memory that does not grow with it.

The folder holds the model's package and its weights as safetensors, which `AutoModelForCausalLM.from_pretrained` loads
with no Forgather installed; or, as `native`, a model of transformers' own classes. Tensors go from file to file one
after the other; the folder appears by one rename when it is whole.
"""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from forgather.conversion.checkpoint_model import CheckpointModel, DamageError, candidates, explaining_removal
from forgather.conversion.native import write_native
from forgather.conversion.new_folder import only_writer, refuse_what_is_there
from forgather.conversion.package_model import PackageModel, StoredModel, is_package
from forgather.conversion.shards import MAX_SHARD_BYTES, converted, tell_dtype, write_shards
from forgather.durable import appearing
from forgather.errors import CheckpointError
from forgather.models.package import MANIFEST as PACKAGE_MANIFEST

# Writes a model into a folder: what, where, the largest shard, the dtype that is wanted.
Form = Callable[[StoredModel, Path, int, torch.dtype | None], None]


def export(
    source: Path,
    destination: Path,
    *,
    native: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write `destination` from a checkpoint, the newest whole checkpoint of a run, or a package; return it.

    With `dtype`, floating-point weights are converted. A tensor larger than `max_shard_bytes` gets a shard of its own.
    Of a run, damaged checkpoints are named and passed over. CheckpointError when the source is no checkpoint, is
    damaged or goes away, or the destination exists, is being written by another export, or cannot be written;
    ModelError when the model is none of transformers' own, and `native` was asked for.
    """
    destination = destination.absolute()
    refuse_what_is_there(destination)
    write: Form = write_native if native else _write_package
    if is_package(source):
        with only_writer(destination), appearing(destination) as aside:
            write(PackageModel(source), aside, max_shard_bytes, dtype)
        return destination
    folders = candidates(source)
    with only_writer(destination):
        for folder in folders:
            try:
                with appearing(destination) as aside, explaining_removal(folder):
                    write(CheckpointModel(folder), aside, max_shard_bytes, dtype)
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


def _write_package(model: StoredModel, folder: Path, max_shard_bytes: int, dtype: torch.dtype | None) -> None:
    """The package as it is, but for what tells how it was generated, which is about another folder."""
    kinds = converted(model.kinds, dtype)
    for file in model.files():
        if file.name != PACKAGE_MANIFEST:
            shutil.copy(file, folder / file.name)
    tell_dtype(folder / "config.json", kinds)
    write_shards(folder, kinds, max_shard_bytes, model.stream)
