"""Safetensors files written as a stream: the header first, then one tensor's bytes after the other.

The library's own writer wants all tensors of a file in memory, and copies each.
"""

import json
import math
import os
import struct
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from forgather.checkpoint.part import write_all
from forgather.checkpoint.storage import raw_bytes
from forgather.errors import CheckpointError

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


# Bytes that the disk is asked to take while the next are made: else it is idle until the end, and then waited for.
_SYNC_BYTES = 64 << 20


@dataclass(frozen=True)
class TensorKind:
    """Shape and dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsFile:
    """`with SafetensorsFile(path, kinds) as file: file.write(tensor)` for each of `file.order`, in that order.

    The file is on the disk when the block ends.
    """

    def __init__(self, path: Path, kinds: Mapping[str, TensorKind]) -> None:
        self.path = path
        self.kinds = kinds
        # Wide types first keeps every tensor aligned to its own width.
        self.order: Sequence[str] = sorted(kinds, key=lambda name: -kinds[name].dtype.itemsize)
        self._written = 0
        self._unsynced = 0  # bytes since the disk was last asked to take them
        self._syncing: Future[None] | None = None

    def __enter__(self) -> Self:
        self._file = self.path.open("xb", buffering=0)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sync")
        header = memoryview(_header([(name, self.kinds[name]) for name in self.order]))
        write_all(self._file.fileno(), header)
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        with self._file:
            self._thread.shutdown()
            if kind is None:
                assert self._written == len(self.order), f"{self.path}: {self._written} of {len(self.order)} tensors"
                self._require_synced()
                os.fsync(self._file.fileno())

    def write(self, tensor: torch.Tensor) -> None:
        """Append the next tensor, converted to its dtype in the file."""
        name = self.order[self._written]
        expected = self.kinds[name]
        assert tuple(tensor.shape) == expected.shape, f"{name} is {list(tensor.shape)}"
        write_all(self._file.fileno(), raw_bytes(tensor.to(expected.dtype).contiguous()))
        self._written += 1
        self._unsynced += expected.num_bytes
        if self._unsynced >= _SYNC_BYTES and (self._syncing is None or self._syncing.done()):
            self._require_synced()
            self._syncing = self._thread.submit(os.fsync, self._file.fileno())
            self._unsynced = 0

    def _require_synced(self) -> None:
        """Raise what the disk has refused: the system says so once, and not again to the sync at the end."""
        if self._syncing is not None:
            self._syncing.result()


def _header(tensors: Sequence[tuple[str, TensorKind]]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, kind in tensors:
        if kind.dtype not in DTYPE_NAMES:
            raise CheckpointError(
                f"{name} is {kind.dtype}, which safetensors has no name for", fix="export with --dtype"
            )
        entries[name] = {
            "dtype": DTYPE_NAMES[kind.dtype],
            "shape": list(kind.shape),
            "data_offsets": [at, at + kind.num_bytes],
        }
        at += kind.num_bytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data begins at a multiple of eight
    return struct.pack("<Q", len(text)) + text
