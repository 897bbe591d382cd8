"""Where each tensor's bytes stand: `tensors.json`, and what DCP's planner wants to know of it.

DCP keeps this in a pickle. Ours is JSON: it can be read by eye and by any program, and opening somebody's checkpoint
runs none of their code.
"""

import json
from dataclasses import dataclass
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

from forgather.errors import CheckpointError

LAYOUT = "tensors.json"
FORMAT = 1


@dataclass(frozen=True)
class Chunk:
    """A rectangle of one tensor, stored row-major as `length` raw bytes at `offset` of `file`."""

    file: str
    offset: int
    length: int
    xxh3: str


def write_layout(folder: Path, metadata: Metadata, chunks: dict[MetadataIndex, Chunk]) -> None:
    """Write `tensors.json` for the tensors of a plan and the places that the writers gave their chunks."""
    tensors: dict[str, Any] = {}
    for name, tensor in sorted(metadata.state_dict_metadata.items()):
        assert isinstance(tensor, TensorStorageMetadata), f"{name} is no tensor"
        stored = []
        for piece in tensor.chunks:
            if 0 in piece.sizes:
                continue  # a rank whose shard of an unevenly divided tensor is empty
            chunk = chunks[MetadataIndex(name, piece.offsets)]
            stored.append(
                {
                    "offsets": list(piece.offsets),
                    "sizes": list(piece.sizes),
                    "file": chunk.file,
                    "at": chunk.offset,
                    "bytes": chunk.length,
                    "xxh3": chunk.xxh3,
                }
            )
        tensors[name] = {
            "dtype": str(tensor.properties.dtype).removeprefix("torch."),
            "shape": list(tensor.size),
            "chunks": stored,
        }
    # One tensor a line: `grep` finds it, and a large checkpoint's file is not longer than it must be.
    lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(entry)}" for name, entry in tensors.items())
    (folder / LAYOUT).write_text(f'{{"format": {FORMAT}, "tensors": {{\n{lines}\n}}}}\n')


def read_layout(folder: Path) -> Metadata:
    """DCP's metadata of the checkpoint in `folder`; each chunk's place is in `storage_data`."""
    path = folder / LAYOUT
    try:
        content = json.loads(path.read_bytes())
        tensors: dict[str, TensorStorageMetadata] = {}
        places: dict[MetadataIndex, Chunk] = {}
        for name, entry in content["tensors"].items():
            pieces = []
            for stored in entry["chunks"]:
                piece = ChunkStorageMetadata(torch.Size(stored["offsets"]), torch.Size(stored["sizes"]))
                pieces.append(piece)
                places[MetadataIndex(name, piece.offsets)] = Chunk(
                    stored["file"], stored["at"], stored["bytes"], stored["xxh3"]
                )
            dtype = getattr(torch, entry["dtype"])
            tensors[name] = TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(entry["shape"]), pieces)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a layout of tensors ({error})") from error
    return Metadata(state_dict_metadata=dict(tensors), storage_data=places)
