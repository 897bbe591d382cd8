"""The token stream of a shard set cut into blocks, with the documents inside a block told apart.

Shapes: B blocks, L tokens.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from forgather.data.batch import NO_TARGET
from forgather.data.shards import ShardSet
from forgather.data.tokenizers import tokenizer_digest
from forgather.errors import DataError


class Blocks(NamedTuple):
    """Equal-shaped int64 arrays, [L] for one block and [B, L] for several."""

    input_ids: NDArray[np.int64]
    targets: NDArray[np.int64]
    position_ids: NDArray[np.int64]


class PackedBlocks:
    """Block i is tokens [i L, (i + 1) L) of the stream of documents, and the token that follows each.

    The target of a block's last token is the first token of the next block, so no token is lost between blocks; the
    target of a document's last token is -100, because what follows belongs to another document. Positions count from
    0 at each document and at the start of the block. The end of the last block is filled up with padding that has no
    targets and positions of its own. With `tokenizer`, that of the model, shards made by another one are refused.
    """

    def __init__(self, shards: ShardSet, block_length: int, tokenizer: Any = None) -> None:
        if block_length < 1:
            raise DataError(f"block_length is {block_length}", fix="set a positive length, for example 512")
        if tokenizer is not None:
            shards.require_tokenizer(tokenizer_digest(tokenizer))
        self.shards = shards
        self.block_length = block_length

    def __len__(self) -> int:
        return -(-self.shards.num_tokens // self.block_length)

    def __getitem__(self, index: int) -> Blocks:
        if not 0 <= index < len(self):
            raise IndexError(f"block {index} of {len(self)}")
        return Blocks(*(array[0] for array in self.gather(np.array([index], np.int64))))

    def describe(self) -> str:
        """One line that is equal exactly when the blocks are."""
        return f"blocks of {self.block_length} tokens of {self.shards.digest}"

    def gather(self, indices: NDArray[np.int64]) -> Blocks:
        """Several blocks at once, in the order asked for."""
        length = self.block_length
        firsts = indices.astype(np.int64) * length
        stream = self._read(firsts)
        targets = stream[:, 1:].copy()

        starts = self.shards.document_starts
        # Documents that begin in (first, first + L]: each ends its predecessor one token earlier, and all but one at
        # the very end restart the positions. Searching with int64 in int64 matters: otherwise numpy converts the index.
        lows = np.searchsorted(starts, firsts, side="right")
        counts = np.searchsorted(starts, firsts + length, side="right") - lows
        rows = np.repeat(np.arange(len(firsts)), counts)
        within = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
        columns = starts[lows[rows] + within] - firsts[rows]
        targets[rows, columns - 1] = NO_TARGET

        # The stream's own end is the end of the last document; padding after it is a document without targets.
        ends = self.shards.num_tokens - firsts
        for row in np.flatnonzero(ends <= length):
            targets[row, ends[row] - 1 :] = NO_TARGET

        begins = np.zeros((len(firsts), length + 1), np.int64)
        begins[rows, columns] = columns
        for row in np.flatnonzero(ends < length):
            begins[row, ends[row]] = ends[row]
        begins = np.maximum.accumulate(begins[:, :length], axis=1)
        return Blocks(np.ascontiguousarray(stream[:, :-1]), targets, np.arange(length) - begins)

    def _read(self, firsts: NDArray[np.int64]) -> NDArray[np.int64]:
        """L + 1 tokens from each place; beyond the stream's end, the padding token."""
        stream = np.full((len(firsts), self.block_length + 1), self.shards.padding_id, np.int64)
        for row, first in enumerate(firsts.tolist()):
            self.shards.read(first, stream[row])
        if stream.size:
            self.shards.require_known(
                stream
            )  # once a batch: an id of no embedding would be an error far from its cause
        return stream
