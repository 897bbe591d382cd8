"""Our checkpoints for PyTorch's own loader, `torch.distributed.checkpoint` (DCP).

    torch.distributed.checkpoint.load(state_dict, storage_reader=Reader("runs/train/checkpoints/step-00000500"))

so that any program with DCP reads them, on any mesh, without a conversion. Names are those of `checkpoint.state`:
`model/model.norm.weight`, `optimizer/model.norm.weight/exp_avg`.
"""

import os
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from forgather.checkpoint.layout import LAYOUT, read_layout
from forgather.checkpoint.storage import dtype_of, read_box
from forgather.errors import CheckpointError


class Reader(StorageReader):
    """Reads the tensors of the checkpoint in `folder` for DCP.

    Whole pieces are checked against their digests as they are read: CheckpointError, naming the file, when one was
    altered or cannot be read, and now when the folder has no layout of tensors.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.layout = read_layout(self.folder)

    def read_metadata(self, *_args: Any, **_options: Any) -> Metadata:
        return Metadata(
            {
                name: TensorStorageMetadata(
                    TensorProperties(dtype=dtype_of(stored)),
                    torch.Size(stored.shape),
                    [
                        ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes))
                        for chunk in stored.chunks
                    ],
                )
                for name, stored in self.layout.items()
            }
        )

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *_args: Any, **_options: Any) -> None:
        """Nothing to prepare: the layout was read when this was made."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for item in plan.items:
            index: MetadataIndex = item.storage_index
            stored = self.layout[index.fqn]
            chunk = next(chunk for chunk in stored.chunks if chunk.offsets == tuple(index.offset or ()))
            start = tuple(at + more for at, more in zip(chunk.offsets, item.storage_offsets, strict=True))
            target = planner.resolve_tensor(item).detach()
            try:
                with (self.folder / chunk.file).open("rb", buffering=0) as file:
                    read_box(file.fileno(), self.folder, index.fqn, stored, chunk, (start, tuple(item.lengths)), target)
            except OSError as error:
                raise CheckpointError(f"cannot read {self.folder / chunk.file}: {error.strerror}") from error
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing to forget: a reader serves one folder."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether there is a layout of tensors in that folder."""
        return (Path(checkpoint_id) / LAYOUT).exists()
