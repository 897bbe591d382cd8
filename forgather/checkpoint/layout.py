"""Where each tensor's bytes stand: `tensors.json`.

JSON, so that it can be read by eye and by any program, and opening somebody's checkpoint runs none of their code. This
module and those that the background writer is made of know no torch: it starts in a tenth of a second.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from forgather.errors import CheckpointError

LAYOUT = "tensors.json"
FORMAT = 1


class Chunk(NamedTuple):
    """A rectangle of one tensor, stored row-major as `length` raw bytes at `at` of `file`."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    at: int
    length: int
    xxh3: str


@dataclass(frozen=True)
class StoredTensor:
    """Dtype (as torch calls it, without `torch.`), whole shape, and the chunks that make it up."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    @property
    def numel(self) -> int:
        return prod(self.shape)


Layout: TypeAlias = Mapping[str, StoredTensor]


def write_layout(folder: Path, layout: Layout) -> None:
    """Write `tensors.json`."""
    tensors: dict[str, Any] = {}
    for name, tensor in sorted(layout.items()):
        stored = [
            {
                "offsets": chunk.offsets,
                "sizes": chunk.sizes,
                "file": chunk.file,
                "at": chunk.at,
                "bytes": chunk.length,
                "xxh3": chunk.xxh3,
            }
            for chunk in tensor.chunks
        ]
        tensors[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "chunks": stored}
    # One tensor a line: `grep` finds it, and a large checkpoint's file is not longer than it must be.
    lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(entry)}" for name, entry in tensors.items())
    (folder / LAYOUT).write_text(f'{{"format": {FORMAT}, "tensors": {{\n{lines}\n}}}}\n')


def read_layout(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of the checkpoint in `folder` by name; CheckpointError, naming the file, when that cannot be read."""
    path = folder / LAYOUT
    try:
        content = json.loads(path.read_bytes())
        return {
            name: StoredTensor(
                str(entry["dtype"]), tuple(entry["shape"]), tuple(_chunk(stored) for stored in entry["chunks"])
            )
            for name, entry in content["tensors"].items()
        }
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is not a layout of tensors", fix="bring that file back, or use another checkpoint"
        ) from error


def _chunk(stored: Mapping[str, Any]) -> Chunk:
    return Chunk(
        tuple(stored["offsets"]),
        tuple(stored["sizes"]),
        stored["file"],
        stored["at"],
        stored["bytes"],
        stored["xxh3"],
    )
