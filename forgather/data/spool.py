"""A source's documents as tokens in one file, with the length and hash of each, before it is decided where they go."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from forgather.data.progress import Progress
from forgather.data.shard_writer import SplitWriter
from forgather.data.tokenize_pool import TokenizePool

_BATCH_BYTES = 2**18
_COPY_TOKENS = 2**22
_MASK = 2**64 - 1


class Spool:
    """The tokenized documents of a source: 16 bytes of memory a document, the tokens on disk."""

    def __init__(self, path: Path, dtype: np.dtype[Any]) -> None:
        self.path = path
        self.dtype = dtype
        self.lengths = np.empty(0, np.int64)
        self.hashes = np.empty(0, np.uint64)

    def fill(self, documents: Iterable[str], pool: TokenizePool, seed: int, progress: Progress) -> None:
        """Tokenizes all documents."""
        lengths: list[NDArray[np.int64]] = []
        hashes: list[NDArray[np.uint64]] = []
        sizes: list[int] = []

        def counted() -> Iterator[Sequence[bytes]]:
            for batch in _batches(documents):
                hashes.append(
                    np.array([xxhash.xxh3_64_intdigest(text, seed=seed & _MASK) for text in batch], np.uint64)
                )
                sizes.append(sum(len(document) for document in batch))
                yield batch

        with self.path.open("wb") as file:
            for number, (counts, tokens) in enumerate(pool.encode(counted())):
                file.write(tokens.astype(self.dtype).tobytes())
                lengths.append(counts)
                progress.add(sizes[number], len(tokens))
        self.lengths = np.concatenate(lengths) if lengths else self.lengths
        self.hashes = np.concatenate(hashes) if hashes else self.hashes

    def copy(self, taken: NDArray[np.int64], writer: SplitWriter) -> None:
        """Appends the first `taken[i]` tokens of each document i to a split; documents with none are left out."""
        used = np.flatnonzero(taken)
        writer.add_documents(taken[used])
        starts = np.cumsum(self.lengths) - self.lengths
        firsts, stops = starts[used], starts[used] + taken[used]
        # Documents that lie one after another are copied as one.
        breaks = np.flatnonzero(firsts[1:] != stops[:-1]) + 1
        with self.path.open("rb") as file:
            for run in np.split(np.arange(len(used)), breaks):
                first, stop = (int(firsts[run[0]]), int(stops[run[-1]])) if len(run) else (0, 0)
                file.seek(first * self.dtype.itemsize)
                while first < stop:
                    tokens = np.fromfile(file, self.dtype, min(_COPY_TOKENS, stop - first))
                    writer.add_tokens(tokens)
                    first += len(tokens)


def _batches(documents: Iterable[str]) -> Iterator[list[bytes]]:
    batch: list[bytes] = []
    size = 0
    for text in documents:
        batch.append(text.encode())
        size += len(batch[-1])
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
