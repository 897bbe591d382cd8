"""What one process does for all when the ranks' parts are written: check them, make the folder whole, and tidy up."""

import contextlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

from forgather.checkpoint.folder import cause_of, draft_of, refused, remove, saved_steps, step_name
from forgather.checkpoint.keep import Keep
from forgather.checkpoint.layout import StoredTensor, write_layout
from forgather.checkpoint.manifest import FileRecord, Manifest, record_of
from forgather.checkpoint.merged_document import merge as merge_documents
from forgather.checkpoint.part import Part, file_name, read_part, remove_records
from forgather.durable import publish
from forgather.errors import CheckpointError

DOCUMENT = "state.json"


@dataclass(frozen=True)
class Commit:
    """A checkpoint that is to become whole: where, what is known of it, the texts it carries, and what then stays."""

    final: Path
    manifest: Manifest
    keep: Keep
    descriptions: Mapping[str, bytes] = field(default_factory=dict)
    damaged: frozenset[int] = frozenset()  # steps that were found damaged, which are neither counted nor removed


class AbandonedError(Exception):
    """Whoever was waiting is not to wait any longer."""


def wait_for_ever(seconds: float) -> bool:
    """A `given_up` for whoever knows that all parts will come."""
    time.sleep(seconds)
    return False


def commit(job: Commit, given_up: Callable[[float], bool] = wait_for_ever) -> list[str]:
    """Wait for the parts of all ranks, and let `job.final` appear, whole and on the disk; then remove what is to go.

    Returns warnings: what could not be removed. `given_up(seconds)` is called to wait; when it is true, that is an
    AbandonedError. CheckpointError when a rank failed or parts do not fit together; both times the draft is removed,
    and nothing else has changed. ForgatherError when the checkpoint is there, and only its name may be lost in a crash.
    """
    draft = draft_of(job.final)
    try:
        parts = _wait_for_parts(draft, job.manifest.world_size, given_up)
        layout = merge(parts)
        _require_equal_copies(parts)
        for name, content in job.descriptions.items():
            (draft / name).parent.mkdir(parents=True, exist_ok=True)
            (draft / name).write_bytes(content)
        write_layout(draft, layout)
        (draft / DOCUMENT).write_text(json.dumps(_join_documents(parts), indent=1))
        remove_records(draft, len(parts))
        files = {file_name(part.rank): part.file for part in parts}
        replace(job.manifest, files=_records(draft, files)).write(draft)
        publish(draft, job.final, synced={draft / name for name in files})  # those by the writers, each on its host
    except OSError as error:
        discard(draft)
        raise refused(job.final, error) from error
    except CheckpointError as error:
        discard(draft)
        raise CheckpointError(f"could not write {job.final}: {error.message}", fix=error.fix) from error
    except AbandonedError:
        discard(draft)
        raise
    return retain(job.final.parent, job.keep, job.damaged)


def merge(parts: list[Part]) -> dict[str, StoredTensor]:
    """The tensors of all parts; CheckpointError unless each is covered once."""
    chunks: dict[str, list[Any]] = {}
    kinds: dict[str, tuple[str, tuple[int, ...]]] = {}
    for part in parts:
        for name, found in part.chunks.items():
            chunks.setdefault(name, []).extend(found)
            if kinds.setdefault(name, part.kinds[name]) != part.kinds[name]:
                raise CheckpointError(f"{name} is {kinds[name]} on one rank and {part.kinds[name]} on rank {part.rank}")
    for name, found in chunks.items():
        if sum(prod(chunk.sizes) for chunk in found) != prod(kinds[name][1]):
            raise CheckpointError(f"the parts of {name} do not make up its shape {list(kinds[name][1])}")
    return {name: StoredTensor(*kinds[name], tuple(sorted(chunks[name], key=lambda c: c.offsets))) for name in chunks}


def retain(checkpoints: Path, keep: Keep, damaged: frozenset[int] = frozenset()) -> list[str]:
    """Remove the whole checkpoints that `keep` does not keep; returns what could not be removed, as warnings."""
    warnings = []
    whole = whole_manifests(checkpoints, damaged)
    for step in keep.doomed({step: manifest.metrics for step, manifest in whole.items()}):
        try:
            remove(checkpoints / step_name(step))
        except OSError as error:
            warnings.append(f"warning: could not remove an old checkpoint: {cause_of(error)}")
    return warnings


def whole_manifests(checkpoints: Path, damaged: frozenset[int] = frozenset()) -> dict[int, Manifest]:
    """The manifests of the checkpoints that look whole, by step; `damaged` ones are known not to be."""
    found = {}
    for step in saved_steps(checkpoints):
        folder = checkpoints / step_name(step)
        with contextlib.suppress(CheckpointError):
            manifest = Manifest.read(folder)
            if step not in damaged and not manifest.damaged_sizes(folder):
                found[step] = manifest
    return found


def discard(draft: Path) -> None:
    """Remove a draft as far as the disk allows; what stays is a leftover that the next save names and removes."""
    with contextlib.suppress(OSError):
        remove(draft)


def _wait_for_parts(draft: Path, ranks: int, given_up: Callable[[float], bool]) -> list[Part]:
    parts = []
    for rank in range(ranks):
        pause = 0.002
        while (part := read_part(draft, rank)) is None:
            if given_up(pause):
                raise AbandonedError
            pause = min(0.1, 1.5 * pause)  # a slow network file system is not asked a thousand times
        parts.append(part)
    return parts


def _require_equal_copies(parts: list[Part]) -> None:
    """What ranks share under one name is stored once, so it must be the same on all of them."""
    # A rank that a short tensor leaves without elements lists it without a chunk.
    pieces = ((part.rank, name, chunks[0].xxh3) for part in parts for name, chunks in part.chunks.items() if chunks)
    written = {name: (rank, digest) for rank, name, digest in pieces}
    for part in parts:
        for name, digest in part.copies.items():
            if name in written and written[name][1] != digest:
                raise CheckpointError(
                    f"{name} has other values on rank {part.rank} than on rank {written[name][0]}, "
                    "and one of them would be lost",
                    fix="let its state_dict() give the same on every rank, or put the rank into the key",
                )


def _join_documents(parts: list[Part]) -> dict[str, Any]:
    """The state that is no tensor: the extras of all, every rank's random numbers, the optimizer's of all by name."""
    return {
        "optimizer": {name: state for part in parts for name, state in part.document["optimizer"].items()},
        "extras": merge_documents([part.document["extras"] for part in parts]),
        "random": [part.document["random"] for part in parts],
    }


def _records(draft: Path, files: Mapping[str, FileRecord]) -> dict[str, FileRecord]:
    """The record of each file; what no writer has digested is digested here."""
    records = dict(files)
    for path in sorted(draft.rglob("*")):
        name = path.relative_to(draft).as_posix()
        if path.is_file() and name not in records:
            records[name] = record_of(path)
    return records
