"""Prepared tokens on disk: raw little-endian integers in shards, where each document begins, and a manifest of both.

manifest.json               what is here: dtype, counts, sizes, checksums, tokenizer, sources, recipe
tokenizer.json              what made the tokens, so that the folder explains itself
train-00000.bin ...         the token stream of a split, cut anywhere
train-documents.bin         int64: the place in the stream where each document begins
validation-00000.bin ...
"""

import json
import mmap
import os
import weakref
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from forgather.errors import DataError

FORMAT = 1
MANIFEST = "manifest.json"
# An index larger than this is handed back to the kernel between uses: what is mapped counts as resident once touched,
# and one touch can map 2 MiB where the page cache holds large pages.
_RESIDENT_BYTES = 32 * 2**20
_READ_TOKENS = 2**28  # Linux reads at most 2 GiB a call


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a prepared folder; DataError when there is none that this version reads."""
    path = folder / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(
            f"{folder} holds no prepared dataset: {MANIFEST} is missing",
            fix="name a folder that `forgather dataset prepare` printed" + _prepared_below(folder),
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is damaged: {error}", fix=_prepare_again(folder)) from error
    if manifest.get("format") != FORMAT:
        raise DataError(
            f"{path} has format {manifest.get('format')}, this version reads {FORMAT}", fix=_prepare_again(folder)
        )
    return manifest


class ShardSet:
    """One split of a prepared dataset, left on disk: tokens by place, and where documents begin.

    Opening checks the size of every file and reads none; `verify` reads all and compares checksums. Files are opened at
    the first read, in each process anew, so a ShardSet can be sent to worker processes. Tokens are read where they are
    asked for (`pread`: three times as fast as touching a mapping, never resident, and a file cut short while a run
    reads it is an error instead of a killed process); the index of documents is mapped.
    """

    def __init__(self, folder: Path | str, split: str = "train") -> None:
        self.folder = Path(folder)
        self.split = split
        self.manifest = read_manifest(self.folder)
        if split not in self.manifest["splits"]:
            raise DataError(
                f"{self.folder} has no {split} split, only {', '.join(self.manifest['splits'])}",
                fix="prepare it with a validation_fraction above 0, for example 0.02; "
                "or, to do without, train with `main.evaluation=null`",
            )
        self._entry = self.manifest["splits"][split]
        self.num_tokens: int = self._entry["num_tokens"]
        self.num_documents: int = self._entry["num_documents"]
        self.vocab_size: int = self.manifest["tokenizer"]["vocab_size"]
        self.tokenizer_digest: str = self.manifest["tokenizer"]["digest"]
        self.padding_id: int = self.manifest["tokenizer"]["padding_id"]
        self.dtype = np.dtype(self.manifest["dtype"]).newbyteorder("<")
        self._first_tokens = list(accumulate((shard["num_tokens"] for shard in self._entry["shards"]), initial=0))
        self._files_open: list[int] = []
        self._index: mmap.mmap | None = None
        self._check_sizes()

    def __reduce__(self) -> tuple[object, ...]:
        return (ShardSet, (self.folder, self.split))

    @property
    def digest(self) -> str:
        """A hash of the split's content, from the manifest's checksums: equal tokens and documents, equal digest."""
        content = [self.manifest["dtype"], [file["xxh3"] for file in self._files()]]
        return xxhash.xxh3_64_hexdigest(json.dumps(content).encode())

    @property
    def document_starts(self) -> NDArray[np.int64]:
        """The places where documents begin, ascending; the first is 0."""
        if self._index is None:
            with (self.folder / self._entry["documents"]["file"]).open("rb") as file:
                self._index = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            # It is searched: reading ahead would fetch what nobody asked for.
            self._index.madvise(mmap.MADV_RANDOM)
        elif len(self._index) > _RESIDENT_BYTES:
            self._index.madvise(mmap.MADV_DONTNEED)
        return np.frombuffer(self._index, np.dtype("<i8"))

    def read(self, first: int, out: NDArray[np.int64]) -> int:
        """Fills `out` with the tokens from place `first` on, as far as the stream goes; returns how many there were."""
        if not self._files_open:
            self._open()
        done = 0
        wanted = min(len(out), self.num_tokens - first)
        shard = bisect_right(self._first_tokens, first) - 1
        itemsize = self.dtype.itemsize
        while done < wanted:
            place = first + done
            count = min(wanted - done, self._first_tokens[shard + 1] - place, _READ_TOKENS)
            data = os.pread(self._files_open[shard], count * itemsize, (place - self._first_tokens[shard]) * itemsize)
            if len(data) < count * itemsize:
                path = self.folder / self._entry["shards"][shard]["file"]
                raise DataError(f"{path} was cut short while it was read", fix=_prepare_again(self.folder))
            out[done : done + count] = np.frombuffer(data, self.dtype)
            done += count
            shard += place + count == self._first_tokens[shard + 1]
        return done

    def tokens(self, first: int = 0, stop: int | None = None) -> NDArray[np.int64]:
        """The tokens of places first .. stop - 1, copied."""
        stop = self.num_tokens if stop is None else min(stop, self.num_tokens)
        out = np.empty(max(0, stop - first), np.int64)
        self.read(first, out)
        return out

    def document(self, number: int) -> NDArray[np.int64]:
        """The tokens of one document, its beginning and end tokens included."""
        starts = self.document_starts
        stop = int(starts[number + 1]) if number + 1 < self.num_documents else self.num_tokens
        return self.tokens(int(starts[number]), stop)

    def document_lengths(self) -> NDArray[np.int64]:
        """The number of tokens of each document."""
        return np.diff(self.document_starts, append=self.num_tokens)

    def verify(self) -> None:
        """Reads everything and compares checksums; DataError names each damaged file."""
        damaged = [file["file"] for file in self._files() if _checksum(self.folder / file["file"]) != file["xxh3"]]
        if damaged:
            names = ", ".join(str(self.folder / name) for name in damaged)
            raise DataError(
                f"damaged, the checksum differs from the manifest's: {names}", fix=_prepare_again(self.folder)
            )

    def require_known(self, tokens: NDArray[np.int64]) -> None:
        """DataError when one of the tokens, which are at least one, is not in the vocabulary."""
        largest = int(tokens.max())
        if largest >= self.vocab_size:
            raise DataError(
                f"the {self.split} shards in {self.folder} are damaged: they hold the token {largest}, and the "
                f"vocabulary has {self.vocab_size:,}; `forgather dataset inspect --verify` names the files",
                fix=_prepare_again(self.folder),
            )

    def require_tokenizer(self, digest: str) -> None:
        """DataError unless the tokens were made by the tokenizer with this digest (`tokenizers.tokenizer_digest`)."""
        if digest != self.tokenizer_digest:
            raise DataError(
                f"{self.folder} was made by tokenizer {self.tokenizer_digest} ({self.vocab_size} tokens), "
                f"but the tokenizer in use is {digest}",
                fix="give the dataset project the model's tokenizer (`with: {tokenizer: !ref tokenizer}`), "
                "so that it prepares a set of its own",
            )

    def _files(self) -> list[dict[str, Any]]:
        return [*self._entry["shards"], self._entry["documents"]]

    def _check_sizes(self) -> None:
        for file in self._files():
            path = self.folder / file["file"]
            size = path.stat().st_size if path.exists() else None
            if size != file["bytes"]:
                found = "is missing" if size is None else f"has {size} bytes instead of {file['bytes']}"
                raise DataError(f"{path} {found}", fix=_prepare_again(self.folder))

    def _open(self) -> None:
        opened = []
        for shard in self._entry["shards"]:
            descriptor = os.open(self.folder / shard["file"], os.O_RDONLY)
            weakref.finalize(self, os.close, descriptor)
            opened.append(descriptor)
        # All at once: another thread, or the next read after a failure, must not find some of them.
        self._files_open = opened


def _checksum(path: Path) -> str:
    state = xxhash.xxh3_64()
    with path.open("rb") as handle:
        while piece := handle.read(2**22):
            state.update(piece)
    return state.hexdigest()


def _prepared_below(folder: Path) -> str:
    found = sorted(path.parent.name for path in folder.glob(f"*/{MANIFEST}"))
    return f"; below this one: {', '.join(found[:3])}" + (", ..." if len(found) > 3 else "") if found else ""


def _prepare_again(folder: Path) -> str:
    return f"remove {folder} and make it again with `forgather dataset prepare`"
