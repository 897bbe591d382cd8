"""Preparing: whole or not at all, once, split by document, every source where it belongs."""

import errno
import threading
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest

from forgather.data.prepare import PreparedDataset
from forgather.data.shard_writer import SplitWriter
from forgather.data.sources import JsonLines, TextFiles
from forgather.data.tokenize_pool import TokenizePool
from forgather.data.tokenizers import character
from forgather.errors import DataError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "a.txt").write_text("abcdefghijklmnopqrstuvwxyz 0123456789.\n<|>")
    return character(sources={"text": TextFiles(folder)}, folder=folder)


def texts(folder: Path, count: int, *, word: str = "text", length: int = 3) -> TextFiles:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        (folder / f"{number:04d}.txt").write_text(f"{word} {number}." * length)
    return TextFiles(folder)


def dataset(folder: Path, tokenizer, sources, **changes) -> PreparedDataset:
    settings = {"name": "made", "tokenizer": tokenizer, "sources": sources, "folder": folder} | changes
    return PreparedDataset(**settings)


def decoded(prepared: PreparedDataset, split: str) -> list[str]:
    shards = prepared.split(split)
    return [
        prepared.tokenizer.decode(shards.document(i), skip_special_tokens=True) for i in range(shards.num_documents)
    ]


def test_both_splits_hold_the_corpus_and_share_nothing(tmp_path, tokenizer):
    source = texts(tmp_path / "corpus", 100)
    (tmp_path / "corpus" / "copy.txt").write_text((tmp_path / "corpus" / "0007.txt").read_text())
    prepared = dataset(tmp_path / "out", tokenizer, {"text": source}, validation_fraction=0.1, shard_tokens=100)
    train, validation = decoded(prepared, "train"), decoded(prepared, "validation")
    assert sorted(train + validation) == sorted(source.documents())
    assert not set(train) & set(validation)
    held = prepared.split("validation").num_tokens / (
        prepared.split("train").num_tokens + prepared.split("validation").num_tokens
    )
    assert 0.1 <= held < 0.13
    shards = prepared.split("train")
    shards.verify()
    assert shards.dtype == np.uint16
    document = shards.document(0)
    assert (document[0], document[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)


def test_a_second_time_nothing_is_done(tmp_path, tokenizer, capsys):
    source = texts(tmp_path / "corpus", 10)
    folder = dataset(tmp_path / "out", tokenizer, {"text": source}).prepare()
    assert "preparing made" in capsys.readouterr().err
    assert dataset(tmp_path / "out", tokenizer, {"text": source}).prepare() == folder
    assert capsys.readouterr().err == ""
    (tmp_path / "corpus" / "new.txt").write_text("new text")
    assert dataset(tmp_path / "out", tokenizer, {"text": source}).prepare() != folder
    assert folder.is_dir()


def test_processes_make_the_same_shards(tmp_path, tokenizer):
    source = texts(tmp_path / "corpus", 30, length=2000)  # several batches
    one = dataset(tmp_path / "one", tokenizer, {"text": source}, processes=1)
    two = dataset(tmp_path / "two", tokenizer, {"text": source}, processes=2)
    for split in ("train", "validation"):
        assert one.split(split).digest == two.split(split).digest


def test_of_two_at_once_one_prepares(tmp_path, tokenizer, capsys):
    source = texts(tmp_path / "corpus", 50)
    threads = [
        threading.Thread(target=dataset(tmp_path / "out", tokenizer, {"text": source}).prepare) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert capsys.readouterr().err.count("preparing made") == 1


def test_a_failure_leaves_nothing_and_a_killed_one_is_swept_up(tmp_path, tokenizer, monkeypatch):
    prepared = dataset(tmp_path / "out", tokenizer, {"text": texts(tmp_path / "corpus", 10)})
    with monkeypatch.context() as patch:

        def full(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr(SplitWriter, "add_tokens", full)
        with pytest.raises(DataError, match=r"cannot write .*made-.*: No space left(.|\n)*free some space"):
            prepared.prepare()
    assert [path for path in (tmp_path / "out").iterdir() if path.is_dir()] == []
    leftover = tmp_path / "out" / f".{prepared.folder.name}.partial"
    leftover.mkdir()
    (leftover / "train-00000.bin").write_bytes(b"half")
    prepared.split("train").verify()
    assert not leftover.exists()


def test_a_folder_that_may_not_be_written_is_named(tmp_path, tokenizer, monkeypatch):
    def refused(self, *_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    prepared = dataset(tmp_path / "out", tokenizer, {"text": texts(tmp_path / "corpus", 10)})
    monkeypatch.setattr(Path, "mkdir", refused)  # the tests may run as root, who may write anywhere
    with pytest.raises(
        DataError, match=r"Permission denied: .*out(.|\n)*fix: set another folder, one that can be written"
    ):
        prepared.prepare()


def test_a_mixture_has_exact_shares_and_every_source_validates(tmp_path, tokenizer):
    sources = {
        "many": texts(tmp_path / "many", 300, word="many"),
        "some": texts(tmp_path / "some", 200, word="some", length=5),
        "left_out": None,
        "few": texts(tmp_path / "few", 60, word="few"),
    }
    weights = {"many": 3, "some": 2, "few": 1}
    prepared = dataset(
        tmp_path / "out", tokenizer, sources, weights=weights, validation_fraction=0.1, total_tokens=3000
    )
    manifest = prepared.manifest()
    assert [source["train"]["tokens"] for source in manifest["sources"]] == [1500, 1000, 500]
    assert manifest["splits"]["train"]["num_tokens"] == 3000
    validation = [source["validation"]["tokens"] for source in manifest["sources"]]
    total = sum(validation)
    assert [round(tokens / total, 2) for tokens in validation] == [0.5, 0.33, 0.17]
    words = {text.split()[0] for text in decoded(prepared, "validation") if " " in text}
    assert words == {"many", "some", "few"}
    assert not set(decoded(prepared, "train")) & set(decoded(prepared, "validation"))


def test_what_validates_in_one_source_is_trained_on_in_none(tmp_path, tokenizer, capsys):
    texts(tmp_path / "shared", 100)
    texts(tmp_path / "more", 300, word="more", length=9)
    texts(tmp_path / "more", 100)  # the texts of the first source, again
    sources = {"all": TextFiles(tmp_path / "more"), "part": TextFiles(tmp_path / "shared")}
    sources["more"] = texts(tmp_path / "other", 100, word="more", length=9)
    prepared = dataset(tmp_path / "out", tokenizer, sources, validation_fraction=0.2)
    train, validation = set(decoded(prepared, "train")), set(decoded(prepared, "validation"))
    assert not train & validation
    written = {text for source in sources.values() for text in source.documents()}
    assert train | validation == written
    assert "whose text validates in another source; they are left out of training" in capsys.readouterr().err
    assert any("left out of training" in warning for warning in prepared.manifest()["warnings"])


def test_another_padding_token_makes_another_folder(tmp_path, tokenizer):
    source = {"text": texts(tmp_path / "corpus", 10)}
    one = dataset(tmp_path / "out", tokenizer, source)
    changed = deepcopy(tokenizer)
    changed.pad_token = changed.eos_token
    other = dataset(tmp_path / "out", changed, source)
    assert one.split("train").padding_id == tokenizer.pad_token_id
    assert other.split("train").padding_id == tokenizer.eos_token_id


def test_a_shortfall_is_said_and_kept(tmp_path, tokenizer, capsys):
    sources = {"small": texts(tmp_path / "small", 20), "large": texts(tmp_path / "large", 300, word="more")}
    prepared = dataset(tmp_path / "out", tokenizer, sources, weights={"small": 1, "large": 1}, total_tokens=4000)
    manifest = prepared.manifest()
    assert manifest["splits"]["train"]["num_tokens"] == 4000
    assert "warning: source small has" in capsys.readouterr().err
    assert "source small has" in manifest["warnings"][0]


def test_without_validation(tmp_path, tokenizer, monkeypatch):
    (tmp_path / "one.txt").write_text("one document")
    source = {"text": TextFiles(tmp_path / "one.txt")}
    with monkeypatch.context() as patch:
        patch.setattr(TokenizePool, "_ask", lambda *_: pytest.fail("a corpus that is refused was tokenized first"))
        with pytest.raises(DataError, match="one document only"):
            dataset(tmp_path / "out", tokenizer, source, processes=2).prepare()
    prepared = dataset(tmp_path / "out", tokenizer, source, validation_fraction=0)
    assert decoded(prepared, "train") == ["one document"]
    with pytest.raises(DataError, match="has no validation split"):
        prepared.split("validation")


def test_bad_input(tmp_path, tokenizer):
    source = texts(tmp_path / "corpus", 5)
    (tmp_path / "rows.jsonl").write_text('{"text": ""}\n')
    for changes, message in [
        ({"sources": {"rows": JsonLines(tmp_path / "rows.jsonl")}}, "source rows has no document with text"),
        ({"sources": {"text": None}}, "has no source"),
        ({"validation_fraction": 0.7}, r"validation_fraction is 0\.7"),
        ({"weights": {"txet": 1}}, "weights are given for txet; the sources are text"),
        ({"weights": {"text": 0}}, "weights must be above 0"),
        ({"total_tokens": 1}, "too small a corpus for a train split"),
    ]:
        with pytest.raises(DataError, match=message):
            dataset(tmp_path / "out", tokenizer, **({"sources": {"text": source}} | changes)).prepare()


def test_a_tokenizing_process_that_dies_is_an_error():
    with pytest.raises(DataError, match="a tokenizing process ended"), TokenizePool("no json", [], [], 2) as pool:
        list(pool.encode([[b"text"]]))


def test_ids_with_gaps_keep_their_numbers(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<end>": 0, "low": 1, "high": 2**16 + 1}, unk_token="<end>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>")
    (tmp_path / "a.txt").write_text("low high low")
    prepared = dataset(
        tmp_path / "out", tokenizer, {"text": TextFiles(tmp_path / "a.txt")}, validation_fraction=0, processes=1
    )
    assert prepared.split("train").tokens().tolist() == [1, 2**16 + 1, 1, 0]
