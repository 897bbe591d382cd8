"""Prepared tokens on disk: raw little-endian integers in shards, where each document begins, and a manifest of both.

manifest.json               what is here: dtype, counts, sizes, checksums, tokenizer, sources, recipe
tokenizer.json              what made the tokens, so that the folder explains itself
train-00000.bin ...         the token stream of a split, cut anywhere
train-documents.bin         int64: the place in the stream where each document begins
validation-00000.bin ...
"""

import json
import mmap
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
# What is mapped counts as resident once touched, and one touch can map 2 MiB where the page cache holds large pages: of
# the tokens, and of the index. All is handed back after this many bytes, so reading a terabyte at random takes no more
# memory than reading a gigabyte. It stays in the page cache.
_RESIDENT_BYTES = 64 * 2**20
_BYTES_PER_TOUCH = 4 * 2**20


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a prepared folder; DataError when there is none that this version reads."""
    path = folder / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(
            f"{folder} holds no prepared dataset: {MANIFEST} is missing", fix=_prepare_again(folder)
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is damaged: {error}", fix=_prepare_again(folder)) from error
    if manifest.get("format") != FORMAT:
        raise DataError(
            f"{path} has format {manifest.get('format')}, this version reads {FORMAT}", fix=_prepare_again(folder)
        )
    return manifest


class ShardSet:
    """One split of a prepared dataset, memory-mapped: tokens by place, and where documents begin.

    Opening checks the size of every file and reads none; `verify` reads all and compares checksums. The files are
    mapped at the first read, in each process anew, so a ShardSet can be sent to worker processes.
    """

    def __init__(self, folder: Path | str, split: str = "train") -> None:
        self.folder = Path(folder)
        self.split = split
        self.manifest = read_manifest(self.folder)
        if split not in self.manifest["splits"]:
            raise DataError(
                f"{self.folder} has no {split} split, only {', '.join(self.manifest['splits'])}",
                fix="prepare it with a validation_fraction above 0, for example 0.02",
            )
        self._entry = self.manifest["splits"][split]
        self.num_tokens: int = self._entry["num_tokens"]
        self.num_documents: int = self._entry["num_documents"]
        self.vocab_size: int = self.manifest["tokenizer"]["vocab_size"]
        self.tokenizer_digest: str = self.manifest["tokenizer"]["digest"]
        self.padding_id: int = self.manifest["tokenizer"]["padding_id"]
        self.dtype = np.dtype(self.manifest["dtype"]).newbyteorder("<")
        self._first_tokens = list(accumulate((shard["num_tokens"] for shard in self._entry["shards"]), initial=0))
        self._maps: list[mmap.mmap] | None = None
        self._touched = 0
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
        self._map()
        return self._starts

    def read(self, first: int, out: NDArray[np.int64]) -> int:
        """Fills `out` with the tokens from place `first` on, as far as the stream goes; returns how many there were."""
        self._map()
        done = 0
        wanted = min(len(out), self.num_tokens - first)
        shard = bisect_right(self._first_tokens, first) - 1
        while done < wanted:
            tokens = self._tokens[shard]
            offset = first + done - self._first_tokens[shard]
            piece = tokens[offset : offset + wanted - done]
            out[done : done + len(piece)] = piece
            done += len(piece)
            shard += 1
        self._touched += done * self.dtype.itemsize + _BYTES_PER_TOUCH
        if self._touched > _RESIDENT_BYTES:
            self._touched = 0
            for mapped in self._maps or ():
                mapped.madvise(mmap.MADV_DONTNEED)
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

    def verify(self) -> None:
        """Reads everything and compares checksums; DataError names each damaged file."""
        damaged = [file["file"] for file in self._files() if _checksum(self.folder / file["file"]) != file["xxh3"]]
        if damaged:
            names = ", ".join(str(self.folder / name) for name in damaged)
            raise DataError(
                f"damaged, the checksum differs from the manifest's: {names}", fix=_prepare_again(self.folder)
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

    def _map(self) -> None:
        if self._maps is not None:
            return
        self._maps = []
        arrays = []
        for file in self._files():
            with (self.folder / file["file"]).open("rb") as handle:
                mapped = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
            # Blocks are read at random: reading ahead would fetch what nobody asked for.
            mapped.madvise(mmap.MADV_RANDOM)
            self._maps.append(mapped)
            arrays.append(mapped)
        self._tokens = [np.frombuffer(mapped, self.dtype) for mapped in arrays[:-1]]
        self._starts: NDArray[np.int64] = np.frombuffer(arrays[-1], np.dtype("<i8"))


def _checksum(path: Path) -> str:
    state = xxhash.xxh3_64()
    with path.open("rb") as handle:
        while piece := handle.read(2**22):
            state.update(piece)
    return state.hexdigest()


def _prepare_again(folder: Path) -> str:
    return f"remove {folder} and make it again with `forgather dataset prepare`"
