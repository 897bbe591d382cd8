"""What `forgather model test` feeds to a model: random tokens, or rows of a dataset, packed or a document a row.

Each batch is what a causal language model of transformers is called with. `labels` are the inputs, not shifted; -100
stands where nothing is to be predicted, the first token of each document included, as what precedes it is another.
Shapes: B rows, L tokens.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from forgather.data.batch import NO_TARGET
from forgather.data.loader import Loader
from forgather.data.order import Permutation
from forgather.data.packing import PackedBlocks
from forgather.data.shards import ShardSet

Inputs = dict[str, Tensor]


def random_batches(vocab_size: int, *, rows: int, length: int, packed: bool, seed: int = 0) -> Iterator[Inputs]:
    """Ids drawn evenly from the vocabulary, without end; packed rows hold documents of 2 to L tokens."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        input_ids = torch.randint(vocab_size, (rows, length), generator=generator)
        if not packed:
            yield {"input_ids": input_ids, "labels": input_ids.clone()}
            continue
        position_ids = torch.stack([_random_positions(length, generator) for _ in range(rows)])
        yield _packed(input_ids, input_ids.clone(), position_ids)


def document_batches(shards: ShardSet, *, rows: int, length: int, seed: int = 0) -> Iterator[Inputs]:
    """A document a row, cut at L tokens or filled up with padding that is masked, without end."""
    order = Permutation(size=shards.num_documents, seed=seed)
    first = 0
    while True:
        input_ids = torch.full((rows, length), shards.padding_id, dtype=torch.int64)
        attention_mask = torch.zeros((rows, length), dtype=torch.int64)
        for row, number in enumerate(order.samples(first, rows).tolist()):
            tokens = torch.from_numpy(shards.document(number)[:length].astype("int64"))
            input_ids[row, : len(tokens)] = tokens
            attention_mask[row, : len(tokens)] = 1
        first += rows
        labels = input_ids.masked_fill(attention_mask == 0, NO_TARGET)
        yield {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def packed_batches(shards: ShardSet, *, rows: int, length: int, seed: int = 0) -> Iterator[Inputs]:
    """Rows of L tokens cut from the stream of documents, as a run is trained on, without end."""
    blocks = PackedBlocks(shards, length)
    loader = Loader(blocks, Permutation(size=len(blocks), seed=seed), rows_per_step=rows, rows_per_forward=rows)
    try:
        while True:
            [batch] = loader.take()
            labels = torch.full_like(batch.targets, NO_TARGET)
            labels[:, 1:] = batch.targets[:, :-1]
            yield {"input_ids": batch.input_ids, "labels": labels, "position_ids": batch.position_ids}
    finally:
        loader.close()


def _random_positions(length: int, generator: torch.Generator) -> Tensor:
    """Positions [L] of documents that follow one another."""
    pieces: list[Tensor] = []
    left = length
    while left:
        drawn = int(torch.randint(2, max(3, length // 2 + 1), (), generator=generator))
        size = left if left - drawn < 2 else drawn
        pieces.append(torch.arange(size))
        left -= size
    return torch.cat(pieces)


def _packed(input_ids: Tensor, labels: Tensor, position_ids: Tensor) -> Inputs:
    labels = labels.masked_fill(position_ids == 0, NO_TARGET)
    return {"input_ids": input_ids, "labels": labels, "position_ids": position_ids}
