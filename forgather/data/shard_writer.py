"""Writes one split of a prepared dataset, checksumming what passes."""

from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import xxhash
from numpy.typing import NDArray


class _File:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.handle = path.open("wb")
        self.hash = xxhash.xxh3_64()
        self.bytes = 0

    def write(self, data: NDArray[Any]) -> None:
        view = np.ascontiguousarray(data).view(np.uint8).data
        self.handle.write(view)
        self.hash.update(view)
        self.bytes += len(view)

    def close(self) -> dict[str, Any]:
        self.handle.close()
        return {"file": self.path.name, "bytes": self.bytes, "xxh3": self.hash.hexdigest()}


class SplitWriter:
    """Takes a stream of tokens and the lengths of its documents; `close` gives the split's entry of the manifest."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype[Any], shard_tokens: int) -> None:
        self._folder = folder
        self._split = split
        self._dtype = dtype.newbyteorder("<")
        self._shard_tokens = shard_tokens
        self._shards: list[dict[str, Any]] = []
        self._shard: _File | None = None
        self._in_shard = 0
        self._documents = _File(folder / f"{split}-documents.bin")
        self.num_tokens = 0
        self.num_documents = 0
        self._documents_end = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        for file in (self._shard, self._documents):
            if file is not None:
                file.handle.close()

    def add_documents(self, lengths: NDArray[np.int64]) -> None:
        """Says where the next documents of the stream end; their tokens are given to `add_tokens`, in any pieces."""
        ends = self._documents_end + np.cumsum(lengths, dtype=np.int64)
        starts = np.concatenate([[self._documents_end], ends[:-1]]) if len(ends) else ends
        self._documents.write(starts.astype("<i8"))
        self._documents_end = int(ends[-1]) if len(ends) else self._documents_end
        self.num_documents += len(lengths)

    def add_tokens(self, tokens: NDArray[Any]) -> None:
        """Appends to the stream."""
        self.num_tokens += len(tokens)
        while len(tokens):
            if self._shard is None:
                self._shard = _File(self._folder / f"{self._split}-{len(self._shards):05d}.bin")
                self._in_shard = 0
            piece = tokens[: self._shard_tokens - self._in_shard]
            self._shard.write(piece.astype(self._dtype, copy=False))
            self._in_shard += len(piece)
            tokens = tokens[len(piece) :]
            if self._in_shard == self._shard_tokens:
                self._close_shard()

    def close(self) -> dict[str, Any]:
        """Ends the files; the split's entry of the manifest."""
        assert self.num_tokens == self._documents_end, "lengths of documents do not add up to their tokens"
        self._close_shard()
        return {
            "num_tokens": self.num_tokens,
            "num_documents": self.num_documents,
            "shards": self._shards,
            "documents": self._documents.close(),
        }

    def _close_shard(self) -> None:
        if self._shard is not None:
            self._shards.append(self._shard.close() | {"num_tokens": self._in_shard})
            self._shard = None
