"""Batches of a trial: what a row holds, where labels are, and that packed documents are apart."""

from itertools import islice, pairwise

import pytest
import torch

from forgather.data.batch import NO_TARGET
from forgather.data.prepare import PreparedDataset
from forgather.data.shards import ShardSet
from forgather.data.sources import TextFiles
from forgather.trainers.trial_batches import document_batches, packed_batches, random_batches
from tests.models.example import tokenizer

LENGTH = 24


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    folder = tmp_path_factory.mktemp("trial")
    texts = folder / "texts"
    texts.mkdir()
    for number in range(9):
        (texts / f"{number}.txt").write_text(f"document {number}: " + "that was then, this is the hat. " * (number % 3))
    dataset = PreparedDataset(
        name="trial",
        tokenizer=tokenizer(),
        sources={"texts": TextFiles(path=texts, include=["*.txt"])},
        folder=folder / "prepared",
        validation_fraction=0.1,
        processes=1,
    )
    return dataset.split("train")


def test_random_rows() -> None:
    first, second = islice(random_batches(30, rows=4, length=50, packed=False), 2)
    assert first["input_ids"].shape == (4, 50)
    assert first["input_ids"].unique().tolist() == list(range(30))
    assert torch.equal(first["labels"], first["input_ids"])
    assert not torch.equal(first["input_ids"], second["input_ids"])
    [again] = islice(random_batches(30, rows=4, length=50, packed=False), 1)
    assert torch.equal(again["input_ids"], first["input_ids"])


@pytest.mark.parametrize("length", [2, 3, 5, 40])
def test_packed_random_rows_hold_documents_of_two_tokens_or_more(length: int) -> None:
    for batch in islice(random_batches(30, rows=3, length=length, packed=True), 20):
        assert batch["position_ids"].shape == (3, length)
        for positions, labels, ids in zip(batch["position_ids"], batch["labels"], batch["input_ids"], strict=True):
            starts = positions == 0
            assert starts[0]
            edges = [*starts.nonzero().flatten().tolist(), length]
            sizes = [end - start for start, end in pairwise(edges)]
            assert min(sizes) >= 2
            assert torch.equal(positions, torch.cat([torch.arange(size) for size in sizes]))
            assert torch.equal(labels, ids.masked_fill(starts, NO_TARGET))
    if length == 40:
        assert batch["position_ids"].eq(0).sum() > 3  # rows do hold several


def test_a_document_a_row(shards: ShardSet) -> None:
    seen = set()
    for batch in islice(document_batches(shards, rows=3, length=LENGTH), shards.num_documents):
        ids, mask, labels = batch["input_ids"], batch["attention_mask"], batch["labels"]
        assert ids.shape == mask.shape == labels.shape == (3, LENGTH)
        assert torch.equal(labels, ids.masked_fill(mask == 0, NO_TARGET))
        for row, length in zip(ids, mask.sum(1).tolist(), strict=True):
            tokens = row[:length].tolist()
            matching = [n for n in range(shards.num_documents) if shards.document(n)[:LENGTH].tolist() == tokens]
            assert matching
            seen.add(matching[0])
            assert row[length:].eq(shards.padding_id).all()
        assert mask.diff(dim=1).le(0).all()  # padding stands on the right
    assert seen == set(range(shards.num_documents))


def test_packed_documents(shards: ShardSet) -> None:
    stream = shards.tokens(0, shards.num_tokens).tolist()
    starts = set(shards.document_starts.tolist())
    for batch in islice(packed_batches(shards, rows=2, length=LENGTH), 4):
        assert set(batch) == {"input_ids", "labels", "position_ids"}
        for ids, labels, positions in zip(
            *(batch[name] for name in ("input_ids", "labels", "position_ids")), strict=True
        ):
            place = next(
                p for p in range(0, len(stream), LENGTH) if stream[p : p + LENGTH] == ids.tolist()[: len(stream) - p]
            )
            for column in range(min(LENGTH, len(stream) - place)):
                begins = column == 0 or place + column in starts
                assert (positions[column] == 0) == begins
                assert labels[column] == (NO_TARGET if begins else ids[column])
