"""Sources: documents as they are, and errors that name file and place."""

import gzip
import json
import os
from time import process_time

import pytest

from forgather.data.sources import HuggingFace, JsonLines, Parquet, TextFiles
from forgather.errors import DataError


def write(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def test_globs_take_and_leave_out_files_in_order_of_name(tmp_path):
    write(tmp_path, {name: name for name in ("b.py", "a/x.py", "a/test/y.py", "a/z.txt", "test/t.py", "a.py")})
    source = TextFiles(tmp_path, include=["**/*.py"], exclude=["**/test/**"])
    assert list(source.documents()) == ["a.py", "a/x.py", "b.py"]
    assert list(TextFiles(tmp_path, include=["*.py", "a/?.txt"]).documents()) == ["a.py", "a/z.txt", "b.py"]
    assert list(TextFiles(tmp_path / "b.py").documents()) == ["b.py"]
    assert source.size_bytes() == len("a.pya/x.pyb.py")


def test_text_is_not_changed(tmp_path):
    text = "\ufeffTab\tCR\r\nÄ  two spaces \n\n"
    write(tmp_path, {"a.txt": text, "empty.txt": ""})
    assert list(TextFiles(tmp_path).documents()) == [text]


def test_a_separator_cuts_a_file_into_documents(tmp_path, monkeypatch):
    monkeypatch.setattr("forgather.data.sources._CHUNK", 5)  # separators lie across chunks
    write(tmp_path, {"a.txt": "one<|end|>twö<|end|>\n<|end|>three"})
    assert list(TextFiles(tmp_path, separator="<|end|>").documents()) == ["one", "twö", "three"]


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("separator", ["aa", "aab", "-", "abab"])
def test_pieces_do_not_depend_on_how_the_file_is_read(tmp_path, monkeypatch, chunk, separator):
    monkeypatch.setattr("forgather.data.sources._CHUNK", chunk)
    text = "aaab-aabab-abababab-aaaa-b-aa"
    write(tmp_path, {"a.txt": text})
    pieces = [piece for piece in text.split(separator) if piece]
    assert list(TextFiles(tmp_path, separator=separator).documents()) == pieces


def test_a_long_document_is_searched_once(tmp_path, monkeypatch):
    monkeypatch.setattr("forgather.data.sources._CHUNK", 16)
    write(tmp_path, {"a.txt": "text" * 2**18})
    start = process_time()
    assert len(list(TextFiles(tmp_path, separator="<|end|>").documents())) == 1
    assert process_time() - start < 2  # of time that grows with the square, it would be twenty times that


def test_what_is_not_utf8_is_named_with_its_offset(tmp_path):
    write(tmp_path, {"a.txt": "fine", "sub/bad.txt": b"abc|d\xe9f"})
    for separator in (None, "|"):
        with pytest.raises(DataError, match=r"sub/bad\.txt is not UTF-8: byte 0xe9 at offset 5(.|\n)*exclude"):
            list(TextFiles(tmp_path, separator=separator).documents())


def test_an_empty_corpus_says_where_it_looked(tmp_path):
    with pytest.raises(DataError, match=r"empty corpus: no file below .* matches include \['\*\*/\*\.txt'\]"):
        TextFiles(tmp_path).digest()
    (tmp_path / "a.md").touch()
    with pytest.raises(DataError, match=r"there are a\.md\n  fix: .*TextFiles.*such as --text-path"):
        TextFiles(tmp_path).digest()
    with pytest.raises(DataError, match=r"no such file or folder: .*\n  fix: make it, .*such as --text-path"):
        list(TextFiles(tmp_path / "nowhere").documents())


def test_the_digest_sees_names_sizes_and_times(tmp_path):
    write(tmp_path, {"a.txt": "a", "b.txt": "b"})
    os.utime(tmp_path / "a.txt", ns=(1, 1))
    source = TextFiles(tmp_path)
    before = source.digest()
    assert TextFiles(tmp_path).digest() == before
    os.utime(tmp_path / "a.txt", ns=(2, 2))
    assert source.digest() != before
    os.utime(tmp_path / "a.txt", ns=(1, 1))
    assert source.digest() == before
    assert TextFiles(tmp_path, separator="|").digest() != before
    (tmp_path / "c.txt").write_text("")
    assert source.digest() != before


def test_jsonl(tmp_path):
    rows = [{"text": "one", "n": 1}, {"text": ""}, {"text": None}, {"text": "zwö"}]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    write(tmp_path, {"a.jsonl": lines + b"\n", "b.jsonl.gz": gzip.compress(lines), "c.json": b"not read"})
    assert list(JsonLines(tmp_path).documents()) == ["one", "zwö", "one", "zwö"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{oops", r"a\.jsonl:2: not JSON"),
        (b'{"body": "x", "id": 3}', r"a\.jsonl:2: no field 'text'; there is body, id"),
        (b"[1]", r"a\.jsonl:2: no field 'text'; there is a list"),
        (b'{"text": 5}', r"a\.jsonl:2: field 'text' is a int, not text"),
        (b'{"text": "\\ud800"}', r"a\.jsonl:2: field 'text' holds half of a surrogate pair"),
        (b'{"text": "\xff"}', r"a\.jsonl is not UTF-8: byte 0xff at offset 26"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    write(tmp_path, {"a.jsonl": b'{"text": "x"}  \n' + line})
    with pytest.raises(DataError, match=message):
        list(JsonLines(tmp_path).documents())


def test_parquet(tmp_path):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"text": ["one", None, "zwö"], "n": [1, 2, 3]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert list(Parquet(tmp_path).documents()) == ["one", "zwö"]
    with pytest.raises(DataError, match=r"a\.parquet has no column 'body'; there is text, n"):
        list(Parquet(tmp_path, column="body").documents())
    write(tmp_path, {"b.parquet": b"no parquet"})
    with pytest.raises(DataError, match=r"b\.parquet is not a Parquet file"):
        list(Parquet(tmp_path).documents())


def test_hugging_face(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    data = datasets.Dataset.from_dict({"text": ["one", "", "zwö"], "n": [1, 2, 3]})
    data.save_to_disk(tmp_path / "saved")
    saved = HuggingFace(str(tmp_path / "saved"))
    assert list(saved.documents()) == ["one", "zwö"]
    assert saved.digest() == HuggingFace(str(tmp_path / "saved")).digest()

    write(tmp_path, {"rows.jsonl": b'{"body": "one"}\n{"body": "two"}\n'})
    loaded = HuggingFace("json", data_files=str(tmp_path / "rows.jsonl"), field="body", streaming=True)
    before = loaded.digest()
    assert list(loaded.documents()) == ["one", "two"]
    write(tmp_path, {"rows.jsonl": b'{"body": "three"}\n'})
    assert loaded.digest() != before

    with pytest.raises(DataError, match="has no field 'body'; there is text, n"):
        list(HuggingFace(str(tmp_path / "saved"), field="body").documents())
    with pytest.raises(DataError, match=r"cannot load dataset .*/nowhere"):
        list(HuggingFace(str(tmp_path / "nowhere")).documents())

    write(tmp_path, {"part-1.json": b'{"body": "one"}\n'})
    several = HuggingFace("json", data_files=str(tmp_path / "part-*.json"), field="body", streaming=True)
    before = several.digest()
    write(tmp_path, {"part-2.json": b'{"body": "two"}\n'})
    assert several.digest() != before
    write(tmp_path, {"part-2.json": b"oops"})
    with pytest.raises(DataError, match=r"cannot load dataset 'json' (.|\n)*JSON parse error"):
        list(HuggingFace("json", data_files=str(tmp_path / "part-*.json"), field="body").documents())


def test_a_link_to_nothing_and_a_folder_that_cannot_be_listed_are_named(tmp_path, monkeypatch):
    write(tmp_path, {"a.txt": "a", "sub/b.txt": "b"})
    (tmp_path / "sub" / "#b.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"sub/#b\.txt is a link to nothing(.|\n)*exclude: \['\*\*/#b\.txt'\]"):
        TextFiles(tmp_path).digest()
    assert list(TextFiles(tmp_path, exclude=["**/#b.txt"]).documents()) == ["a", "b"]

    def scandir(path):  # the tests may run as root, who may list anything
        if os.fspath(path).endswith("sub"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return listing(path)

    listing = os.scandir
    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DataError, match=r"cannot list .*/sub: Permission denied"):
        TextFiles(tmp_path).digest()
    assert list(TextFiles(tmp_path, exclude=["sub/**"]).documents()) == ["a"]


@pytest.mark.parametrize(
    "content", [b"no gzip", gzip.compress(b'{"text": "x"}\n' * 1000)[:-10]], ids=["no gzip", "cut off"]
)
def test_a_compressed_file_that_cannot_be_unpacked_is_named(tmp_path, content):
    write(tmp_path, {"a.jsonl.gz": content})
    with pytest.raises(DataError, match=r"a\.jsonl\.gz cannot be unpacked"):
        list(JsonLines(tmp_path).documents())


def test_an_empty_separator_is_refused(tmp_path):
    with pytest.raises(DataError, match="separator is empty"):
        TextFiles(tmp_path, separator="")
