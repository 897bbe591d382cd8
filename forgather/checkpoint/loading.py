"""A checkpoint that is there: opening it, and reading it into a run, each byte once.

The manifest has a digest of itself and one of every file; `tensors.json`, one of those files, has one of every piece of
a tensor. So everything but the tensors is verified when a checkpoint is opened, and the tensors as they are read.

All of this is collective, `visible_checkpoint` excepted.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from forgather.checkpoint.commit import DOCUMENT
from forgather.checkpoint.folder import step_name
from forgather.checkpoint.layout import Layout, StoredTensor, read_layout
from forgather.checkpoint.manifest import MANIFEST, Manifest, ManifestError
from forgather.checkpoint.part import file_name
from forgather.checkpoint.state import TrainState
from forgather.checkpoint.storage import Check, DamagedFileError, Read, perform, reads_of
from forgather.distributed.collectives import (
    broadcast_object,
    failing_together,
    gather_objects,
    rank,
    sum_ranks,
    world_size,
)
from forgather.errors import CheckpointError

CONFIG = "config.yaml"


@dataclass(frozen=True)
class Checkpoint:
    """A folder in which no damage shows; its tensors are verified when they are read."""

    path: Path
    manifest: Manifest

    @property
    def step(self) -> int:
        return self.manifest.step

    @property
    def config(self) -> str | None:
        """The resolved configuration that it was saved with, if it carries one."""
        path = self.path / CONFIG
        return path.read_text() if path.exists() else None

    @cached_property
    def document(self) -> Mapping[str, Any]:
        """The state that is no tensor."""
        document: Mapping[str, Any] = json.loads((self.path / DOCUMENT).read_bytes())
        return document

    @cached_property
    def layout(self) -> dict[str, StoredTensor]:
        return read_layout(self.path)


def visible_checkpoint(folder: Path) -> Checkpoint | list[str]:
    """The checkpoint in `folder`, or what is wrong with it that shows without reading its files."""
    try:
        manifest = Manifest.read(folder)
    except ManifestError as error:
        return [error.line]
    expected = step_name(manifest.step)
    if folder.name.startswith("step-") and folder.name != expected:
        return [f"{MANIFEST}: it is of {expected}"]
    return manifest.damaged_sizes(folder) or Checkpoint(folder, manifest)


def open_checkpoint(folder: Path) -> Checkpoint | list[str]:
    """The checkpoint in `folder`, all but its tensors verified; or what is wrong with it, one line a file."""
    opened: Checkpoint | list[str] = broadcast_object(visible_checkpoint(folder) if rank() == 0 else [])
    if isinstance(opened, list):
        return opened
    manifest = opened.manifest
    tensor_files = {file_name(number) for number in range(manifest.world_size)}
    names = sorted((name for name in manifest.files if name not in tensor_files), key=lambda n: -manifest.files[n].size)
    share = names[rank() :: world_size()]
    damage = [line for part in gather_objects(manifest.damaged_digests(folder, share)) for line in part]
    return sorted(damage) or opened


def load_checkpoint(state: TrainState, checkpoint: Checkpoint) -> list[str]:
    """Read `checkpoint` into the live objects of `state`; returns the damage that was found, one line a file.

    With damage, weights and optimizer state are a mixture, to be loaded again from elsewhere, and nothing else has
    changed. CheckpointError, listing both sides, when names, shapes or dtypes differ; no weight is changed then.
    """
    targets = state.targets(checkpoint.layout, checkpoint.document)
    _require_fit(checkpoint, targets)
    reads = reads_of(checkpoint.layout, targets)
    checks = _share_of_checks(checkpoint.layout, reads)
    found: set[str] = set()
    with failing_together():
        try:
            perform(checkpoint.path, [*reads, *checks])
        except DamagedFileError as error:
            found.add(error.line)
    damage = sorted(set[str]().union(*gather_objects(found)))
    if not damage:
        with failing_together():
            state.accept(checkpoint.document, targets)
    return damage


def _share_of_checks(layout: Layout, reads: Sequence[Read]) -> list[Check]:
    """Of the chunks that no rank reads whole, so that nobody would notice damage, those that this rank is to check."""
    checks = [Check(name, chunk) for name, stored in layout.items() for chunk in stored.chunks]
    places = {(check.chunk.file, check.chunk.at): number for number, check in enumerate(checks)}
    readers = torch.zeros(len(checks), dtype=torch.int32)
    for read in reads:
        if read.is_whole:
            readers[places[read.chunk.file, read.chunk.at]] = 1
    unread = [checks[number] for number in (sum_ranks(readers) == 0).nonzero().flatten().tolist()]
    unread.sort(key=lambda check: -check.chunk.length)
    return unread[rank() :: world_size()]


def _require_fit(checkpoint: Checkpoint, targets: Mapping[str, torch.Tensor]) -> None:
    """Raise CheckpointError, listing both sides, unless `targets` are the tensors of the checkpoint."""
    there = {name: f"{list(stored.shape)} {stored.dtype}" for name, stored in checkpoint.layout.items()}
    here = {name: f"{list(target.shape)} {target.dtype}".replace("torch.", "") for name, target in targets.items()}
    missing = {name for name in there if name.startswith(("model/", "optimizer/")) and name not in here}
    differing = {name: kind for name, kind in here.items() if there.get(name) != kind}
    # A rank may have its own part of the model: what is missing is what every rank lacks.
    answers = gather_objects((missing, differing))
    missing = set.intersection(*(lacking for lacking, _ in answers))
    for _, elsewhere in answers:
        differing |= elsewhere
    others = [f"{name} {there[name]}, {kind}" for name, kind in differing.items() if name in there]
    problems = [
        *_listed("only in the checkpoint", [f"{name} {kind}" for name, kind in there.items() if name in missing]),
        *_listed("only in this run", [f"{name} {kind}" for name, kind in differing.items() if name not in there]),
        *_listed("in the checkpoint, and in this run", others),
    ]
    if problems:
        raise CheckpointError(
            "\n  ".join([f"{checkpoint.path} holds other parameters than this run", *problems]),
            fix=f"use the model and optimizer of {checkpoint.path / CONFIG}, or start another run with --fresh; "
            f"--init-from {checkpoint.path} lets it begin with the weights alone",
        )


def _listed(title: str, lines: list[str], most: int = 10) -> list[str]:
    more = [f"  and {len(lines) - most} more"] if len(lines) > most else []
    return [f"{title}:", *(f"  {line}" for line in lines[:most]), *more] if lines else []
