"""Shards: what was written comes back, and damage is named."""

import os
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forgather.data import shards as shards_module
from forgather.data.packing import PackedBlocks
from forgather.data.shards import MANIFEST, ShardSet
from forgather.errors import DataError
from tests.data.corpora import random_documents, write_shards


def test_counts_and_files(tmp_path):
    shards = write_shards(tmp_path, [list(range(20)), list(range(5))], shard_tokens=10)
    entry = shards.manifest["splits"]["train"]
    assert [shard["num_tokens"] for shard in entry["shards"]] == [10, 10, 5]
    assert (shards.num_tokens, shards.num_documents) == (25, 2)
    assert shards.document(1).tolist() == [0, 1, 2, 3, 4]
    assert shards.document_lengths().tolist() == [20, 5]
    shards.verify()


@given(st.integers(0, 25), st.integers(0, 25), st.integers(1, 30))
@settings(max_examples=30, deadline=None)
def test_any_range_over_any_shards(tmp_path_factory, first, count, shard_tokens):
    stream = list(range(100, 125))
    shards = write_shards(tmp_path_factory.mktemp("shards"), [stream], shard_tokens=shard_tokens)
    assert shards.tokens(first, first + count).tolist() == stream[first : first + count]


def test_a_token_of_no_vocabulary_is_told_where_it_is_read(tmp_path):
    shards = write_shards(tmp_path, [[1, 2, 3, 50303], [4, 50304]])
    assert PackedBlocks(shards, 2)[0].input_ids.tolist() == [1, 2]
    with pytest.raises(DataError, match=r"(?s)hold the token 50304.*vocabulary has 50,304.*fix: remove"):
        PackedBlocks(shards, 2)[2]


def test_a_folder_without_manifest_is_not_one_to_remove(tmp_path):
    write_shards(tmp_path / "made-1", [[1, 2]])
    with pytest.raises(DataError, match="holds no prepared dataset") as caught:
        ShardSet(tmp_path)
    assert "remove" not in str(caught.value)
    assert "below this one: made-1" in str(caught.value)


@pytest.mark.parametrize(("dtype", "largest"), [("uint16", 2**16 - 1), ("uint32", 2**32 - 1)])
def test_largest_ids_come_back(tmp_path, dtype, largest):
    assert write_shards(tmp_path, [[0, largest]], dtype=dtype).tokens().tolist() == [0, largest]


def test_an_index_handed_back_is_read_again(tmp_path, monkeypatch):
    documents = random_documents(50)
    shards = write_shards(tmp_path, documents, shard_tokens=100)
    monkeypatch.setattr(shards_module, "_RESIDENT_BYTES", 0)
    for _ in range(2):
        assert shards.tokens().tolist() == [token for document in documents for token in document]
        assert shards.document(7).tolist() == documents[7]


def test_long_ranges_are_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module, "_READ_TOKENS", 7)
    shards = write_shards(tmp_path, [list(range(95))], shard_tokens=30)
    assert shards.tokens().tolist() == list(range(95))


def test_a_shard_cut_short_under_a_reader_is_an_error(tmp_path):
    shards = write_shards(tmp_path, [list(range(25))])
    shards.tokens()
    with (tmp_path / "train-00001.bin").open("r+b") as file:
        file.truncate(19)
    with pytest.raises(DataError, match=r"train-00001\.bin was cut short"):
        shards.tokens()


def test_a_shard_set_travels_to_another_process(tmp_path):
    shards = write_shards(tmp_path, [[1, 2, 3]])
    shards.tokens()
    assert pickle.loads(pickle.dumps(shards)).tokens().tolist() == [1, 2, 3]


def test_equal_content_has_an_equal_digest(tmp_path):
    one = write_shards(tmp_path / "one", [[1, 2], [3]])
    assert one.digest == write_shards(tmp_path / "two", [[1, 2], [3]]).digest
    assert one.digest != write_shards(tmp_path / "three", [[1, 2], [4]]).digest
    assert one.digest != write_shards(tmp_path / "four", [[1], [2, 3]]).digest


def test_a_truncated_shard_is_refused_by_name(tmp_path):
    write_shards(tmp_path, [list(range(25))])
    with (tmp_path / "train-00001.bin").open("r+b") as file:
        file.truncate(19)
    with pytest.raises(DataError, match=r"train-00001\.bin has 19 bytes instead of 20(.|\n)*dataset prepare"):
        ShardSet(tmp_path)


def test_a_missing_shard_is_refused_by_name(tmp_path):
    write_shards(tmp_path, [list(range(25))])
    (tmp_path / "train-documents.bin").unlink()
    with pytest.raises(DataError, match=r"train-documents\.bin is missing"):
        ShardSet(tmp_path)


def test_each_damaged_file_is_named(tmp_path):
    shards = write_shards(tmp_path, [list(range(25))])
    for name in ("train-00000.bin", "train-00002.bin"):
        data = bytearray((tmp_path / name).read_bytes())
        data[3] ^= 1
        (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=r"train-00000\.bin, \S*train-00002\.bin") as error:
        shards.verify()
    assert "train-00001" not in error.value.message


def test_what_is_no_prepared_folder(tmp_path):
    with pytest.raises(DataError, match="holds no prepared dataset"):
        ShardSet(tmp_path)
    write_shards(tmp_path, [[1, 2]])
    with pytest.raises(DataError, match="no validation split, only train"):
        ShardSet(tmp_path, "validation")
    (tmp_path / MANIFEST).write_text('{"format": 99}')
    with pytest.raises(DataError, match="has format 99"):
        ShardSet(tmp_path)
    (tmp_path / MANIFEST).write_text("{")
    with pytest.raises(DataError, match="is damaged"):
        ShardSet(tmp_path)


def test_another_tokenizer_is_refused_with_both_named(tmp_path):
    shards = write_shards(tmp_path, [[1, 2]])
    shards.require_tokenizer("made up")
    with pytest.raises(DataError, match=r"made by tokenizer made up .* in use is other"):
        shards.require_tokenizer("other")


def test_read_fills_only_what_there_is(tmp_path):
    out = np.full(4, -1)
    assert write_shards(tmp_path, [[1, 2, 3]]).read(1, out) == 2
    assert out.tolist() == [2, 3, -1, -1]


def test_a_shard_that_could_not_be_opened_is_opened_later(tmp_path, monkeypatch):
    shards = write_shards(tmp_path, [list(range(25))])
    opened = iter([os.open, None])

    def refuse_the_second(*arguments):
        if (function := next(opened)) is None:
            raise OSError(24, "Too many open files")
        return function(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse_the_second)
        with pytest.raises(OSError, match="Too many"):
            shards.tokens()
    assert shards.tokens().tolist() == list(range(25))
