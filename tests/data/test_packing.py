"""Packing: blocks put together give the stream back, and documents stay apart."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forgather.data.packing import PackedBlocks
from forgather.errors import DataError
from tests.data.corpora import write_shards

documents = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=12), min_size=1, max_size=8)


@given(documents, st.integers(1, 9), st.integers(1, 20))
@settings(max_examples=80, deadline=None)
def test_blocks_hold_the_stream_and_know_its_documents(tmp_path_factory, documents, block_length, shard_tokens):
    blocks = PackedBlocks(
        write_shards(tmp_path_factory.mktemp("shards"), documents, shard_tokens=shard_tokens), block_length
    )
    all_blocks = blocks.gather(np.arange(len(blocks)))

    stream = [token for document in documents for token in document]
    following = [token for document in documents for token in [*document[1:], -100]]
    padding = len(blocks) * block_length - len(stream)
    assert 0 <= padding < block_length
    assert all_blocks.input_ids.ravel().tolist() == stream + [0] * padding
    assert all_blocks.targets.ravel().tolist() == following + [-100] * padding

    starts = {sum(map(len, documents[:i])) for i in range(len(documents) + 1)}
    position, expected = 0, []
    for place in range(len(blocks) * block_length):
        position = 0 if place in starts or place % block_length == 0 else position + 1
        expected.append(position)
    assert all_blocks.position_ids.ravel().tolist() == expected


def test_gathered_blocks_are_the_single_blocks(tmp_path):
    blocks = PackedBlocks(write_shards(tmp_path, [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11]], shard_tokens=4), 4)
    chosen = np.array([2, 0, 2])
    gathered = blocks.gather(chosen)
    for row, index in enumerate(chosen):
        for several, single in zip(gathered, blocks[int(index)], strict=True):
            assert several.dtype == np.int64
            assert several[row].tolist() == single.tolist()


def test_bounds(tmp_path):
    shards = write_shards(tmp_path, [[1, 2, 3]])
    with pytest.raises(IndexError):
        PackedBlocks(shards, 2)[2]
    with pytest.raises(DataError, match="block_length is 0"):
        PackedBlocks(shards, 0)
