"""The shipped dataset and tokenizer projects, and the command that drives them."""

import json
from pathlib import Path

import pytest

from forgather import Project
from forgather.cli.main import main
from forgather.data.sources import TextFiles
from forgather.data.tokenizers import character

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(40):
        (folder / f"{number}.txt").write_text(f"This is document number {number}.\n" * 5)
    return folder


@pytest.fixture(scope="module")
def tokenizer(corpus, tmp_path_factory):
    return character(sources={"text": TextFiles(corpus)}, folder=tmp_path_factory.mktemp("tokenizer"))


def build(name: str, folder: Path, tokenizer, **args):
    project = Project(CONFIGS / "datasets" / name, args={"dataset_dir": str(folder)} | args)
    return project.build(["train", "validation"], given={"tokenizer": tokenizer})


def test_local_text(corpus, tmp_path, tokenizer):
    train, validation = build("local_text", tmp_path, tokenizer, text_path=str(corpus))
    assert train.num_documents + validation.num_documents == 40
    assert tokenizer.decode(train.document(0), skip_special_tokens=True).startswith("This is document number")


def test_jsonl_parquet_and_hugging_face_give_the_same_tokens(tmp_path, tokenizer):
    import datasets

    rows = [{"body": f"document {number}. " * 3, "id": number} for number in range(30)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = datasets.Dataset.from_list(rows)
    datasets.disable_progress_bars()
    data.to_parquet(tmp_path / "rows.parquet")
    data.save_to_disk(tmp_path / "saved")
    given = {
        "jsonl": {"jsonl_path": str(tmp_path / "rows.jsonl"), "text_field": "body"},
        "parquet": {"parquet_path": str(tmp_path / "rows.parquet"), "text_column": "body"},
        "huggingface": {"hf_path": str(tmp_path / "saved"), "text_field": "body"},
    }
    built = [build(name, tmp_path / "out", tokenizer, **args) for name, args in given.items()]
    assert len({(train.digest, validation.digest) for train, validation in built}) == 1


def test_the_standard_library_is_found_without_its_tests():
    sources = Project(CONFIGS / "datasets" / "python_stdlib").build("sources")
    names = {file.relative_to(sources["python_stdlib"].path).as_posix() for file in sources["python_stdlib"].files()}
    assert {"argparse.py", "asyncio/tasks.py"} <= names
    assert not [name for name in names if "/test/" in f"/{name}" or "site-packages" in name]


def test_the_sources_of_the_mixture_share_no_file():
    sources = Project(CONFIGS / "datasets" / "mixture").build("sources")
    library, part = (set(source.files()) for source in sources.values())
    assert part
    assert not library & part


def test_prepare_and_inspect_with_a_tokenizer_of_the_same_text(corpus, tmp_path, capsys):
    flags = ["-p", str(CONFIGS / "datasets/local_text"), "-t", "own_tokenizer", "--text-path", str(corpus)]
    flags += ["--vocab-size", "300", "--dataset-dir", str(tmp_path / "d"), "--validation-fraction", "0.1"]
    flags += [f"_tokenizer.args.tokenizer_dir={tmp_path / 't'}"]
    assert main(["dataset", "prepare", *flags]) == 0
    folder = Path(capsys.readouterr().out.strip())
    assert folder.parent == tmp_path / "d"
    assert (folder / "manifest.json").is_file()

    assert main(["dataset", "inspect", "--verify", "--documents", "2", *flags]) == 0
    out = capsys.readouterr().out
    assert "300 tokens, stored as uint16" in out
    assert "validation: all checksums match" in out
    assert "train: a document has " in out
    assert out.count("<|startoftext|>This is document number") == 4

    (folder / "train-00000.bin").write_bytes(b"short")
    assert main(["dataset", "inspect", *flags]) == 2
    assert "train-00000.bin has 5 bytes instead of" in capsys.readouterr().err


def test_a_bad_file_ends_with_two_and_its_name(tmp_path, capsys):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    flags = ["--text-path", str(tmp_path), "--dataset-dir", str(tmp_path / "d"), "--vocab-size", "300"]
    flags += [f"_tokenizer.args.tokenizer_dir={tmp_path / 't'}"]
    assert main(["dataset", "prepare", "-p", str(CONFIGS / "datasets/local_text"), "-t", "own_tokenizer", *flags]) == 2
    error = capsys.readouterr().err
    assert "latin.txt is not UTF-8: byte 0xe9 at offset 3" in error
    assert "fix: " in error
