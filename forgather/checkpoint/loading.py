"""A checkpoint that is there: opening it, and reading it into a run, each byte once.

The manifest has a digest of itself and one of every file; `tensors.json`, one of those files, has one of every piece of
a tensor. So everything but the tensors is verified before one is read, and the tensors as they are read.

All of this is collective, `visible_checkpoint` excepted.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import torch

from forgather.checkpoint.commit import DOCUMENT
from forgather.checkpoint.folder import cause_of, step_name
from forgather.checkpoint.layout import LAYOUT, Layout, StoredTensor, read_layout
from forgather.checkpoint.manifest import MANIFEST, Manifest, ManifestError, OtherFormatError, UnreadableError
from forgather.checkpoint.part import file_name
from forgather.checkpoint.state import TrainState
from forgather.checkpoint.storage import Check, DamagedFileError, Read, perform, reads_of
from forgather.distributed.collectives import (
    agree,
    failing_together,
    gather_objects,
    raise_together,
    rank,
    sum_ranks,
    world_size,
)
from forgather.distributed.host_place import host_place
from forgather.errors import CheckpointError

CONFIG = "config.yaml"
_NEEDED = ("model/", "optimizer/")  # tensors without which the run would go on as another


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
    """The checkpoint in `folder`, or what is wrong with it that shows without reading its files.

    OtherFormatError when another version wrote it, UnreadableError when it cannot be read now: neither is damage, which
    another checkpoint would make good.
    """
    try:
        manifest = Manifest.read(folder)
    except (OtherFormatError, UnreadableError):
        raise
    except ManifestError as error:
        return [error.line]
    expected = step_name(manifest.step)
    if folder.name.startswith("step-") and folder.name != expected:
        return [f"{MANIFEST}: it is of {expected}"]
    return manifest.damaged_sizes(folder) or Checkpoint(folder, manifest)


def load_checkpoint(state: TrainState, checkpoint: Checkpoint) -> list[str]:
    """Verify `checkpoint` and read it into the live objects of `state`; returns the damage, one line a file.

    With damage, weights and optimizer state are a mixture, to be loaded again from elsewhere, and nothing else has
    changed. CheckpointError, listing both sides, when names, shapes or dtypes differ; no weight is changed then.
    UnreadableError when files cannot be read now, of which nothing says that they are damaged.
    """
    targets: dict[str, torch.Tensor] = {}
    differing: dict[str, str] = {}
    damage: list[str] = []
    failure: Exception | None = None
    try:
        damage = _damage_of_share(checkpoint)
        if not damage:
            targets = state.targets(checkpoint.layout, checkpoint.document)
            differing = _differing(checkpoint.layout, targets)
    except Exception as error:  # noqa: BLE001  raised below, by all
        failure = error
    if not agree(not damage and failure is None and not differing):
        if damage := _damage_anywhere(damage, failure):
            return damage
        _refuse_unlike(checkpoint, targets, differing)
    layout = checkpoint.layout
    wanted = [name in targets or not name.startswith(_NEEDED) for name in layout]
    damage, has_places = _read_tensors(checkpoint, layout, targets, wanted)
    if not has_places:
        _refuse_unlike(checkpoint, targets, {})
    if damage:
        return damage
    with failing_together():
        state.accept(checkpoint.document, targets)
    return []


def _damage_of_share(checkpoint: Checkpoint) -> list[str]:
    """What is wrong with the files without tensors, each of which one rank reads; those that all ranks use, all do."""
    manifest = checkpoint.manifest
    apart = {file_name(number) for number in range(manifest.world_size)} | {LAYOUT, DOCUMENT}
    names = sorted((name for name in manifest.files if name not in apart), key=lambda n: -manifest.files[n].size)
    return manifest.damaged_digests(checkpoint.path, [LAYOUT, DOCUMENT, *names[rank() :: world_size()]])


def _damage_anywhere(damage: list[str], failure: Exception | None) -> list[str]:
    """All ranks' lines of damage; without any, what has failed on one is raised by all."""
    answers = gather_objects((damage, None if failure is None else cause_of(failure)))
    if found := {line for lines, _ in answers for line in lines}:
        return sorted(found)
    raise_together(failure, [cause for _, cause in answers])
    return []


def load_weights(checkpoint: Checkpoint, targets: Mapping[str, torch.Tensor]) -> None:
    """Fill `targets`, or this rank's part of them, from the model's tensors of those names, and verify all of these.

    A target's dtype may be another. `checkpoint.layout` is taken to be verified. DamagedFileError, on the ranks that
    find it, and on the others an error that says so, when the weights are not those that were saved: some of `targets`
    may be filled then.
    """
    prefix = "model/"
    layout = {
        name.removeprefix(prefix): stored for name, stored in checkpoint.layout.items() if name.startswith(prefix)
    }
    damage, _ = _read_tensors(checkpoint, layout, targets, [True] * len(layout))
    if damage:
        raise CheckpointError(
            f"{checkpoint.path} is damaged: {'; '.join(damage)}",
            fix="bring that file back, or begin with another checkpoint",
        )


def _read_tensors(
    checkpoint: Checkpoint, layout: Layout, targets: Mapping[str, torch.Tensor], wanted: Sequence[bool]
) -> tuple[list[str], bool]:
    """Fill `targets`, and see that all that `layout` tells of is what was saved.

    Returns the damage, one line a file, and whether every tensor is `wanted` by a rank; otherwise nothing was read.
    """
    reads = reads_of(layout, targets)
    checks = _share_of_checks(layout, reads, wanted)
    if checks is None:
        return [], False
    damage: list[str] = []
    failure: Exception | None = None
    try:
        perform(checkpoint.path, [*reads, *checks])
    except DamagedFileError as error:
        damage = [error.line]
    except Exception as error:  # noqa: BLE001  raised below, by all
        failure = error
    return [] if agree(not damage and failure is None) else _damage_anywhere(damage, failure), True


def _share_of_checks(layout: Layout, reads: Sequence[Read], wanted: Sequence[bool]) -> list[Check] | None:
    """Of the chunks whose damage nobody would notice otherwise, those that this rank is to check.

    That a rank reads a chunk whole vouches for what others of its host read of it, which is what the host has in its
    cache or on its own disk, and for no other host. A chunk that no rank reads is checked once. None when there are
    tensors that no rank wants.
    """
    place = host_place()
    checks = [Check(name, chunk) for name, stored in layout.items() for chunk in stored.chunks]
    places = {(check.chunk.file, check.chunk.at): number for number, check in enumerate(checks)}
    readers = torch.zeros(place.num_hosts, len(checks), dtype=torch.int32)
    here = [0] * len(checks)
    for read in reads:
        here[places[read.chunk.file, read.chunk.at]] = 1 if read.is_whole else _IN_PART
    readers[place.host] = torch.tensor(here, dtype=torch.int32)
    counts = sum_ranks(torch.cat([torch.tensor(wanted, dtype=torch.int32), readers.flatten()]))
    if not counts[: len(wanted)].all():
        return None
    readers = counts[len(wanted) :].view_as(readers)
    own = readers[place.host]
    unverified = (own >= _IN_PART) & (own % _IN_PART == 0)
    unread = (readers == 0).all(0)
    return [
        *_share(checks, unverified, place.local_rank, place.local_size),
        *_share(checks, unread, rank(), world_size()),
    ]


# Counts as so many readers of whole chunks, of which a host has fewer.
_IN_PART = 1 << 16


def _share(checks: Sequence[Check], chosen: torch.Tensor, number: int, of: int) -> list[Check]:
    """Of the chosen, each one's share by size."""
    numbers: list[int] = chosen.nonzero().flatten().tolist()
    return sorted((checks[at] for at in numbers), key=lambda check: -check.chunk.length)[number::of]


def _differing(layout: Layout, targets: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Those of `targets` that the checkpoint has not, or of another shape or dtype: what they are here."""
    return {
        name: f"{list(target.shape)} {target.dtype}".replace("torch.", "")
        for name, target in targets.items()
        if (stored := layout.get(name)) is None
        or target.shape != stored.shape
        or target.dtype != getattr(torch, stored.dtype, None)
    }


def _refuse_unlike(
    checkpoint: Checkpoint, targets: Mapping[str, torch.Tensor], differing: Mapping[str, str]
) -> NoReturn:
    """Raise CheckpointError, listing both sides; `differing` are this rank's targets that are not as stored."""
    lacking = {name for name in checkpoint.layout if name.startswith(_NEEDED) and name not in targets}
    answers = gather_objects((lacking, differing))
    # A rank may have its own part of the model: what is missing is what every rank lacks.
    missing = set.intersection(*(lacking for lacking, _ in answers))
    differing = {name: kind for _, kinds in answers for name, kind in kinds.items()}
    there = {name: f"{list(stored.shape)} {stored.dtype}" for name, stored in checkpoint.layout.items()}
    others = [f"{name} {there[name]}, {kind}" for name, kind in differing.items() if name in there]
    problems = [
        *_listed("only in the checkpoint", [f"{name} {kind}" for name, kind in there.items() if name in missing]),
        *_listed("only in this run", [f"{name} {kind}" for name, kind in differing.items() if name not in there]),
        *_listed("in the checkpoint, and in this run", others),
    ]
    raise CheckpointError(
        "\n  ".join([f"{checkpoint.path} holds other parameters than this run", *problems]),
        fix=f"use the model and optimizer of {checkpoint.path / CONFIG}, or start another run with --fresh; "
        f"--init-from {checkpoint.path} lets it begin with the weights alone",
    )


def _listed(title: str, lines: list[str], most: int = 10) -> list[str]:
    more = [f"  and {len(lines) - most} more"] if len(lines) > most else []
    return [f"{title}:", *(f"  {line}" for line in lines[:most]), *more] if lines else []
