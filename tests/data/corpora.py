"""Small prepared folders, made without a tokenizer."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from forgather.data.shard_writer import SplitWriter
from forgather.data.shards import FORMAT, MANIFEST, ShardSet


def write_shards(
    folder: Path,
    documents: Sequence[Sequence[int]],
    *,
    dtype: str = "uint16",
    shard_tokens: int = 10,
    padding_id: int = 0,
) -> ShardSet:
    """A train split of these documents."""
    folder.mkdir(parents=True, exist_ok=True)
    with SplitWriter(folder, "train", np.dtype(dtype), shard_tokens) as writer:
        writer.add_documents(np.array([len(document) for document in documents]))
        for document in documents:
            writer.add_tokens(np.array(document))
        entry = writer.close()
    tokenizer = {"digest": "made up", "vocab_size": 50304, "padding_id": padding_id}
    manifest = {"format": FORMAT, "dtype": dtype, "tokenizer": tokenizer, "splits": {"train": entry}}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return ShardSet(folder)


def random_documents(count: int, *, mean: int = 30, seed: int = 0) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.integers(1, 50304, length).tolist() for length in random.geometric(1 / mean, count) + 1]
