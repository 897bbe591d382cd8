"""A dataset's recipe, and the folder of shards that it becomes."""

import json
import os
import sys
from collections.abc import Iterator, Mapping
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from forgather.data.once import made_once
from forgather.data.progress import Progress
from forgather.data.selection import (
    documents_to_train,
    mixture_shares,
    one_document_only,
    split_documents,
    take_tokens,
)
from forgather.data.shard_writer import SplitWriter
from forgather.data.shards import FORMAT, MANIFEST, ShardSet, read_manifest
from forgather.data.sources import Source
from forgather.data.spool import Spool
from forgather.data.tokenize_pool import TokenizePool
from forgather.data.tokenizers import backend_json, tokenizer_digest
from forgather.errors import DataError
from forgather.models.vocabulary import vocab_size

# A process is worth its start when it has this much to do.
_BYTES_PER_PROCESS = 4 * 2**20


class PreparedDataset:
    """Sources, a tokenizer and how to split them; `prepare` makes the shards, once.

    The folder is named by the digest of the recipe, so other settings, another tokenizer or changed files make another
    folder and nothing is overwritten. `weights` are the sources' shares of the tokens, `total_tokens` how many there
    shall be for training (default: without weights all, with weights as many as keep the shares exact).
    """

    def __init__(
        self,
        *,
        name: str,
        tokenizer: Any,
        sources: Mapping[str, Source | None],
        folder: Path | str,
        weights: Mapping[str, float] | None = None,
        total_tokens: int | None = None,
        validation_fraction: float = 0.02,
        seed: int = 0,
        shard_tokens: int = 2**27,
        processes: int | None = None,
    ) -> None:
        self.name = name
        self.tokenizer = tokenizer
        self.sources = {key: source for key, source in sources.items() if source is not None}
        self.weights = dict(weights) if weights is not None else None
        self.total_tokens = total_tokens
        self.validation_fraction = validation_fraction
        self.seed = seed
        self.shard_tokens = shard_tokens
        self.processes = processes
        self._parent = Path(folder)
        self._check()

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """All that decides what the shards hold."""
        return {
            "format": FORMAT,
            "name": self.name,
            "tokenizer": tokenizer_digest(self.tokenizer),
            "padding_id": self._padding_id,
            "sources": {name: source.digest() for name, source in self.sources.items()},
            "weights": self.weights,
            "total_tokens": self.total_tokens,
            "validation_fraction": self.validation_fraction,
            "seed": self.seed,
            "shard_tokens": self.shard_tokens,
        }

    @property
    def folder(self) -> Path:
        """Where the shards are, or will be."""
        digest = xxhash.xxh3_64_hexdigest(json.dumps(self.recipe, sort_keys=True).encode())
        return self._parent / f"{self.name}-{digest}"

    def prepare(self) -> Path:
        """The folder of the shards, made when it is not there; of several processes one makes it, the others wait."""
        with made_once(self.folder) as folder:
            if folder is not None:
                manifest = self._write(folder)
                (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
                print(f"  {summary(manifest)}, in {self.folder}", file=sys.stderr)
        return self.folder

    def split(self, name: str) -> ShardSet:
        """The shards of `train` or `validation`, prepared first where needed."""
        shards = ShardSet(self.prepare(), name)
        shards.require_tokenizer(self.recipe["tokenizer"])
        return shards

    def manifest(self) -> dict[str, Any]:
        """What the shards hold, prepared first where needed."""
        return read_manifest(self.prepare())

    def _check(self) -> None:
        if not self.sources:
            raise DataError(f"dataset {self.name} has no source", fix="name one under `sources`")
        if not 0 <= self.validation_fraction <= 0.5:
            raise DataError(f"validation_fraction is {self.validation_fraction}", fix="set it between 0 and 0.5")
        if self.tokenizer.eos_token_id is None:
            raise DataError("the tokenizer has no eos_token, which ends a document", fix="give it one")
        if self.weights is not None:
            if self.weights.keys() != self.sources.keys():
                raise DataError(
                    f"weights are given for {', '.join(self.weights)}; the sources are {', '.join(self.sources)}",
                    fix="give each source one weight; leave a source out by setting it to null",
                )
            if min(self.weights.values()) <= 0:
                raise DataError(
                    f"weights must be above 0: {self.weights}", fix="leave a source out by setting it to null"
                )

    def _write(self, folder: Path) -> dict[str, Any]:
        num_ids = vocab_size(self.tokenizer)
        # What does not fit into a dtype would come back as another token.
        dtype = np.dtype("uint16" if num_ids <= 2**16 else "uint32")
        tokenizer_json = backend_json(self.tokenizer)
        (folder / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")

        spools = self._tokenize(folder, dtype, tokenizer_json)
        splits, sources, warnings = self._assemble(folder, dtype, spools)
        for spool in spools.values():
            spool.path.unlink()
        for warning in warnings:
            print(f"warning: {warning}", file=sys.stderr)
        return {
            "format": FORMAT,
            "name": self.name,
            "dtype": dtype.name,
            "tokenizer": {
                "digest": self.recipe["tokenizer"],
                "vocab_size": num_ids,
                "padding_id": self._padding_id,
            },
            "splits": splits,
            "sources": sources,
            "warnings": warnings,
            "recipe": self.recipe,
        }

    def _tokenize(self, folder: Path, dtype: np.dtype[Any], tokenizer_json: str) -> dict[str, Spool]:
        sizes = [source.size_bytes() for source in self.sources.values()]
        total = None if None in sizes else sum(size or 0 for size in sizes)
        processes = self.processes if self.processes is not None else _processes_for(total)
        print(f"preparing {self.name} with {processes} tokenizing process{'es' * (processes != 1)}", file=sys.stderr)
        before = [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]
        spools = {}
        with (
            Progress(self.name, total) as progress,
            TokenizePool(tokenizer_json, before, [self.tokenizer.eos_token_id], processes) as pool,
        ):
            for number, (name, source) in enumerate(self.sources.items()):
                spool = spools[name] = Spool(folder / f"source-{number}.tokens", dtype)
                spool.fill(self._documents(name, source), pool, self.seed, progress)
        return spools

    def _documents(self, name: str, source: Source) -> Iterator[str]:
        """The documents of a source; too few are an error before the first is tokenized, which may take hours."""
        documents = source.documents()
        first = list(islice(documents, 2))
        if not first:
            raise DataError(
                f"empty corpus: source {name} has no document with text",
                fix=f"put text into the files of source {name}, give it another path (a parameter such as --text-path),"
                " or leave the source out by setting it to null",
            )
        if len(first) == 1 and self.validation_fraction:
            raise one_document_only(name)
        yield from first
        del first
        yield from documents

    def _assemble(
        self, folder: Path, dtype: np.dtype[Any], spools: dict[str, Spool]
    ) -> tuple[dict[str, Any], list[dict[str, Any]], list[str]]:
        """Decides which documents go where and writes the splits."""
        validates = {
            name: split_documents(spool.lengths, spool.hashes, self.validation_fraction, name)
            for name, spool in spools.items()
        }
        trains = documents_to_train({name: spool.hashes for name, spool in spools.items()}, validates)
        sources = [
            {"name": name, "documents": len(spool.lengths), "tokens": int(spool.lengths.sum())}
            for name, spool in spools.items()
        ]
        available = {name: int(spool.lengths[trains[name]].sum()) for name, spool in spools.items()}
        targets, warnings = self._targets(available)
        for name, spool in spools.items():
            if count := np.count_nonzero(neither := ~trains[name] & ~validates[name]):
                warnings.append(
                    f"source {name} has {count:,} documents ({spool.lengths[neither].sum():,} tokens) whose text "
                    "validates in another source; they are left out of training"
                )
        splits = {}
        for split in ("train", "validation") if self.validation_fraction else ("train",):
            if split == "validation":
                held = {name: int(spool.lengths[validates[name]].sum()) for name, spool in spools.items()}
                # The shares of what is trained on, so that both losses mean the same mixture.
                targets = held if self._takes_all else mixture_shares(held, targets, None)[0]
            if min(targets.values()) < 2:
                raise DataError(
                    f"too small a corpus for a {split} split with every source in it: its tokens would be {targets}",
                    fix="give more documents, or raise total_tokens or validation_fraction (0 is no validation split)",
                )
            with SplitWriter(folder, split, dtype, self.shard_tokens) as writer:
                for entry, (name, spool) in zip(sources, spools.items(), strict=True):
                    chosen = validates[name] if split == "validation" else trains[name]
                    taken = take_tokens(spool.lengths, spool.hashes, chosen, targets[name])
                    spool.copy(taken, writer)
                    entry[split] = {"documents": int(np.count_nonzero(taken)), "tokens": targets[name]}
                splits[split] = writer.close()
        return splits, sources, warnings

    @property
    def _padding_id(self) -> int:
        padding_id: int | None = self.tokenizer.pad_token_id
        return int(self.tokenizer.eos_token_id) if padding_id is None else padding_id

    @property
    def _takes_all(self) -> bool:
        return self.weights is None and self.total_tokens is None

    def _targets(self, available: dict[str, int]) -> tuple[dict[str, int], list[str]]:
        if self._takes_all:
            return available, []
        # Without weights, a total is taken from each source in proportion to what it has.
        return mixture_shares(available, self.weights or available, self.total_tokens)


def summary(manifest: dict[str, Any]) -> str:
    """One line: tokens and documents of each split."""
    return ", ".join(
        f"{name}: {split['num_tokens']:,} tokens in {split['num_documents']:,} documents"
        for name, split in manifest["splits"].items()
    )


def _processes_for(total_bytes: int | None) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores if total_bytes is None else max(1, min(cores, total_bytes // _BYTES_PER_PROCESS))
