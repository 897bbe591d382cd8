"""Where documents come from: text files, JSONL, Parquet, Hugging Face datasets. Documents are given one at a time."""

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from glob import glob
from pathlib import Path
from typing import IO, Any, Protocol

import xxhash

from forgather.data.listing import list_files
from forgather.errors import DataError

_CHUNK = 2**20


class Source(Protocol):
    """A corpus. Documents come in the same order every time."""

    def documents(self) -> Iterator[str]:
        """The text of each document; empty ones are left out."""

    def digest(self) -> str:
        """Changes when the documents may have changed; cheap, so it looks at names, sizes and times, not at content."""

    def size_bytes(self) -> int | None:
        """Bytes to read, for progress; None when not known beforehand."""


class _Files:
    """What the sources that read files have in common."""

    def __init__(self, path: Path | str, include: Sequence[str], exclude: Sequence[str]) -> None:
        self.path = Path(path).expanduser()
        self.include = list(include)
        self.exclude = list(exclude)

    def files(self) -> list[Path]:
        """The files in order of name; DataError when there are none."""
        return list_files(self.path, self.include, self.exclude)

    def size_bytes(self) -> int | None:
        return sum(file.stat().st_size for file in self.files())

    def digest(self) -> str:
        return _digest([type(self).__name__, self._settings(), _listing(self.path, self.files())])

    def _settings(self) -> list[Any]:
        raise NotImplementedError


class TextFiles(_Files):
    """Text or source files below `path` that match `include` and not `exclude`; a file is a document.

    With `separator`, such as `<|endoftext|>`, a file holds many documents and is read piece by piece. The text is
    taken as it is: no newline, case or space is changed.
    """

    def __init__(
        self,
        path: Path | str,
        include: Sequence[str] = ("**/*.txt",),
        exclude: Sequence[str] = (),
        separator: str | None = None,
    ) -> None:
        super().__init__(path, include, exclude)
        if separator == "":
            raise DataError("separator is empty", fix="set it to the text between documents, or to null")
        self.separator = separator

    def documents(self) -> Iterator[str]:
        for file in self.files():
            with file.open("rb") as handle:
                pieces = [(0, handle.read())] if self.separator is None else _split(handle, self.separator.encode())
                for offset, data in pieces:
                    text = _decode(data, file, offset)
                    if text if self.separator is None else text.strip():
                        yield text

    def _settings(self) -> list[Any]:
        return [self.separator]


class JsonLines(_Files):
    """One JSON object a line, the document under `field`. Files that end in .gz are read compressed."""

    def __init__(
        self,
        path: Path | str,
        include: Sequence[str] = ("**/*.jsonl", "**/*.jsonl.gz"),
        exclude: Sequence[str] = (),
        field: str = "text",
    ) -> None:
        super().__init__(path, include, exclude)
        self.field = field

    def documents(self) -> Iterator[str]:
        for file in self.files():
            with gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb") as handle:
                offset = 0
                for number, line in enumerate(_whole_lines(handle, file), 1):
                    if line.strip():
                        text = self._text(_decode(line, file, offset), f"{file}:{number}")
                        if text:
                            yield text
                    offset += len(line)

    def _text(self, line: str, place: str) -> str:
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{place}: not JSON: {error}", fix="write one JSON object a line") from error
        if not isinstance(row, dict) or self.field not in row:
            there = ", ".join(row) if isinstance(row, dict) else f"a {type(row).__name__}"
            raise DataError(
                f"{place}: no field {self.field!r}; there is {there}", fix="set `field` to the text's field"
            )
        return _as_text(row[self.field], f"{place}: field {self.field!r}")

    def _settings(self) -> list[Any]:
        return [self.field]


class Parquet(_Files):
    """Parquet files, a document a row under `column`; read row group by row group."""

    def __init__(
        self,
        path: Path | str,
        include: Sequence[str] = ("**/*.parquet",),
        exclude: Sequence[str] = (),
        column: str = "text",
    ) -> None:
        super().__init__(path, include, exclude)
        self.column = column

    def documents(self) -> Iterator[str]:
        import pyarrow  # heavy, and needed by this source alone
        import pyarrow.parquet

        for path in self.files():
            try:
                file = pyarrow.parquet.ParquetFile(path)
            except pyarrow.ArrowInvalid as error:
                raise DataError(f"{path} is not a Parquet file: {error}", fix="leave it out with `exclude`") from error
            if self.column not in file.schema_arrow.names:
                raise DataError(
                    f"{path} has no column {self.column!r}; there is {', '.join(file.schema_arrow.names)}",
                    fix="set `column` to the text's column",
                )
            for batch in file.iter_batches(batch_size=1024, columns=[self.column]):
                for value in batch.column(0).to_pylist():
                    text = _as_text(value, f"{path}: column {self.column!r}")
                    if text:
                        yield text

    def _settings(self) -> list[Any]:
        return [self.column]


class HuggingFace:
    """A dataset that the `datasets` library loads, by name on the Hub or by path, a document a row under `field`.

    `path` may be a folder that `save_to_disk` wrote. A name without `revision` is looked up once: when the Hub has a
    newer version, pin it here to prepare it.
    """

    def __init__(
        self,
        path: str,
        name: str | None = None,
        split: str = "train",
        field: str = "text",
        revision: str | None = None,
        data_files: str | Sequence[str] | None = None,
        streaming: bool = False,
    ) -> None:
        self.path = path
        self.name = name
        self.split = split
        self.field = field
        self.revision = revision
        self.data_files = [data_files] if isinstance(data_files, str) else data_files
        self.streaming = streaming

    def documents(self) -> Iterator[str]:
        dataset = self._load()
        names = dataset.column_names or []
        if names and self.field not in names:
            raise DataError(
                f"dataset {self.path} has no field {self.field!r}; there is {', '.join(names)}",
                fix="set `field` to the text's field",
            )
        for number, row in enumerate(dataset.select_columns([self.field])):
            text = _as_text(row[self.field], f"dataset {self.path}, row {number}: field {self.field!r}")
            if text:
                yield text

    def digest(self) -> str:
        named = [file for pattern in self.data_files or [self.path] for file in _local(pattern)]
        files = [file for path in named for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]
        settings = [self.path, self.name, self.split, self.field, self.revision]
        return _digest(["HuggingFace", settings, _listing(Path(), [file for file in files if file.is_file()])])

    def size_bytes(self) -> int | None:
        return None

    def _load(self) -> Any:
        import datasets  # pulls in pandas and pyarrow: half a second that no other source should pay

        try:
            if any((Path(self.path) / mark).is_file() for mark in ("state.json", "dataset_dict.json")):
                saved = datasets.load_from_disk(self.path)
                return saved[self.split] if isinstance(saved, datasets.DatasetDict) else saved
            return datasets.load_dataset(
                self.path,
                self.name,
                split=self.split,
                revision=self.revision,
                data_files=self.data_files,
                streaming=self.streaming,
            )
        except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
            cause = error.__cause__ or error  # "an error occurred while generating", says the library
            raise DataError(
                f"cannot load dataset {self.path!r} ({self.name or 'default'}, split {self.split}): {cause}",
                fix="check path, name and split; a name on the Hub needs the network or a filled cache",
            ) from error


def _local(pattern: str) -> list[Path]:
    """The files or folders on this machine that a name of the `datasets` library means, by itself or as a glob."""
    found = [pattern] if Path(pattern).exists() else sorted(glob(pattern, recursive=True))  # noqa: PTH207  any pattern
    return [Path(name) for name in found]


def _whole_lines(handle: Iterable[bytes], path: Path) -> Iterator[bytes]:
    """The lines of a file; DataError when it is compressed and cannot be unpacked to its end."""
    try:
        yield from handle
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be unpacked: {error}", fix="bring it back whole, or leave it out") from error


def _split(handle: IO[bytes], separator: bytes) -> Iterator[tuple[int, bytes]]:
    """The pieces of a file between separators, each with its offset in the file."""
    offset, pending = 0, bytearray()
    while chunk := handle.read(_CHUNK):
        # What is pending was searched, but for a separator that begins at its end.
        unsearched = max(0, len(pending) - len(separator) + 1)
        pending += chunk
        start = 0
        while (end := pending.find(separator, unsearched)) >= 0:
            yield offset + start, bytes(pending[start:end])
            start = unsearched = end + len(separator)
        del pending[:start]
        offset += start
    yield offset, bytes(pending)


def _decode(data: bytes, path: Path, offset: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8: byte 0x{data[error.start]:02x} at offset {offset + error.start}",
            fix=f"convert it (iconv -f latin1 -t utf-8), or leave it out with `exclude: ['**/{path.name}']`",
        ) from error


def _as_text(value: object, place: str) -> str:
    """A null is an empty document."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{place} is a {type(value).__name__}, not text", fix="name the field that holds the text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{place} holds half of a surrogate pair: {error}", fix="repair or drop the row") from error
    return value


def _listing(root: Path, files: Sequence[Path]) -> list[list[Any]]:
    listing = []
    for file in files:
        status = file.stat()
        name = file.relative_to(root) if file.is_relative_to(root) and file != root else Path(file.name)
        listing.append([name.as_posix(), status.st_size, status.st_mtime_ns])
    return listing


def _digest(value: object) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(value, default=list).encode())
