"""The checkpoints of one run: save, find the newest whole one, load it on any mesh.

    with RunFolder(dir) as run:
        store = CheckpointStore(run, keep_last=2)
        checkpoint = store.newest()
        if checkpoint is not None:
            store.load(state, checkpoint)
        ...
        store.save(state, step)

All three are collective.
"""

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from forgather.checkpoint.folder import Committed, leftovers, remove, saved_steps, set_aside, step_name
from forgather.checkpoint.layout import read_layout
from forgather.checkpoint.manifest import MANIFEST, Manifest
from forgather.checkpoint.run_folder import RunFolder
from forgather.checkpoint.state import TrainState
from forgather.checkpoint.storage import RawReader, RawWriter
from forgather.distributed.collectives import broadcast_object, gather_objects, rank, world_size
from forgather.errors import CheckpointError

DOCUMENT = "state.json"
CONFIG = "config.yaml"


@dataclass(frozen=True)
class Checkpoint:
    """A folder whose files are all there, as they were saved."""

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
    def layout(self) -> Metadata:
        return read_layout(self.path)


class CheckpointStore:
    """Saves, finds and loads the checkpoints of `run`, and keeps the `keep_last` newest whole ones."""

    def __init__(self, run: RunFolder, keep_last: int = 2) -> None:
        if keep_last < 1:
            raise CheckpointError(f"keep_last is {keep_last}, and a run needs one checkpoint", fix="keep_last: 1")
        self.run = run
        self.keep_last = keep_last
        self._current: int | None = None  # the step that this run has last saved or loaded
        self._damaged: set[int] = set()

    def save(self, state: TrainState, step: int) -> Path:
        """Write the checkpoint of `step`; return its folder once it is whole and on the disk.

        A step that this run has just saved or loaded is not written again. CheckpointError, on every rank, when it
        cannot be written; the checkpoints before it are then as they were.
        """
        final = self.run.checkpoints / step_name(step)
        if self._current == step:
            return final
        self._make_room(final)
        manifest = Manifest(step=step, world_size=world_size(), mesh=state.mesh)
        with Committed(final, manifest) as draft:
            tensors, document = state.capture()
            writer = RawWriter(draft.path)
            with calling_dcp(f"could not write {final}"):
                dcp_save(tensors, storage_writer=writer, planner=save_planner())
            for written in gather_objects(writer.written):
                draft.files.update(written)
            if rank() == 0:
                (draft.path / DOCUMENT).write_text(json.dumps(document, indent=1))
                self.run.write_descriptions(draft.path)
        self._current = step
        self._retain()
        return final

    def newest(self) -> Checkpoint | None:
        """The whole checkpoint of the highest step, its files verified; None where nothing was ever saved.

        Says what it passes over: what an interrupted save left, and which file of a damaged checkpoint is wrong.
        CheckpointError when there are checkpoints and every one is damaged: a run does not start anew by accident.
        """
        if rank() == 0:
            for leftover in leftovers(self.run.checkpoints):
                self.run.say(f"note: {leftover} was left by an interrupted save or removal; it is ignored")
        steps: list[int] = broadcast_object(saved_steps(self.run.checkpoints))
        for step in reversed(steps):
            folder = self.run.checkpoints / step_name(step)
            found = open_checkpoint(folder)
            if isinstance(found, Checkpoint):
                if self._damaged:
                    self.run.say(f"warning: going on from {found.path}, the newest that is whole")
                return found
            self._damaged.add(step)
            self.run.say(f"warning: {folder} is damaged and not used: {'; '.join(found)}")
        if steps:
            raise CheckpointError(
                f"every checkpoint in {self.run.checkpoints} is damaged",
                fix="bring back the files named above, or start another run with --fresh",
            )
        return None

    def load(self, state: TrainState, checkpoint: Checkpoint) -> None:
        """Read `checkpoint` into the live objects of `state`, on whatever mesh they are.

        CheckpointError, listing both sides, when names, shapes or dtypes differ; no weight is changed then.
        """
        document = json.loads((checkpoint.path / DOCUMENT).read_bytes())
        targets = state.targets(checkpoint.layout, document)
        _require_fit(checkpoint, targets)
        for name in sorted(set(document["extras"]) - set(state.extras)):
            self.run.say(f"note: {checkpoint.path} has a state of {name!r}, which this run lacks; it is not used")
        for name in sorted(set(state.extras) - set(document["extras"])):
            self.run.say(f"note: {checkpoint.path} has no state of {name!r}, which starts anew")
        with calling_dcp(f"could not load {checkpoint.path}"):
            dcp_load(targets, storage_reader=RawReader(checkpoint.path, checkpoint.layout), planner=load_planner())
        state.accept(document, targets)
        self._current = checkpoint.step

    def _make_room(self, final: Path) -> None:
        """Remove what interrupted saves left, and give a damaged checkpoint of this step another name."""
        if rank() != 0:
            return
        try:
            for leftover in leftovers(self.run.checkpoints):
                self.run.say(f"note: removing {leftover}, which an interrupted save or removal left")
                remove(leftover)
            if final.exists() and (int(final.name.removeprefix("step-")) in self._damaged):
                self.run.say(f"note: the damaged {final} is now {set_aside(final)}")
        except OSError as error:
            self.run.say(f"warning: {error.strerror}: {error.filename}")

    def _retain(self) -> None:
        """Remove what is older than the `keep_last` newest whole checkpoints. Damaged ones are left to their owner."""
        if rank() != 0:
            return
        whole = [step for step in saved_steps(self.run.checkpoints) if self._looks_whole(step)]
        for step in whole[: -self.keep_last]:
            try:
                remove(self.run.checkpoints / step_name(step))
            except OSError as error:
                self.run.say(f"warning: could not remove an old checkpoint: {error.strerror}: {error.filename}")

    def _looks_whole(self, step: int) -> bool:
        folder = self.run.checkpoints / step_name(step)
        if step in self._damaged:
            return False
        try:
            return not Manifest.read(folder).damaged_sizes(folder)
        except CheckpointError:
            return False


def open_checkpoint(folder: Path) -> Checkpoint | list[str]:
    """The checkpoint in `folder`, or what is wrong with it: one line a file. Collective: each rank reads a share."""
    opened: Manifest | list[str] = broadcast_object(visible_checkpoint(folder) if rank() == 0 else [])
    if isinstance(opened, list):
        return opened
    share = sorted(opened.files, key=lambda name: -opened.files[name].size)[rank() :: world_size()]
    damage = [line for part in gather_objects(opened.damaged_digests(folder, share)) for line in part]
    return sorted(damage) or Checkpoint(folder, opened)


def visible_checkpoint(folder: Path) -> Manifest | list[str]:
    """The manifest of the checkpoint in `folder`, or what is wrong with it that shows without reading its files."""
    try:
        manifest = Manifest.read(folder)
    except CheckpointError as error:
        return [error.message]
    expected = step_name(manifest.step)
    if folder.name.startswith("step-") and folder.name != expected:
        return [f"{MANIFEST}: it is of {expected}"]
    return manifest.damaged_sizes(folder) or manifest


def _require_fit(checkpoint: Checkpoint, targets: Mapping[str, torch.Tensor]) -> None:
    """Raise CheckpointError, listing both sides, unless `targets` are the tensors of the checkpoint."""
    there = {name: _kind(tensor) for name, tensor in checkpoint.layout.state_dict_metadata.items()}
    # A rank may have its own part of the model: what is here is what any rank has.
    here: dict[str, str] = {}
    for part in gather_objects({name: _shown(tensor.shape, tensor.dtype) for name, tensor in targets.items()}):
        here |= part
    parameters = [name for name in there if name.startswith(("model/", "optimizer/"))]
    differing = [name for name, kind in here.items() if there.get(name, kind) != kind]
    problems = [
        *_listed("only in the checkpoint", [f"{name} {there[name]}" for name in parameters if name not in here]),
        *_listed("only in this run", [f"{name} {kind}" for name, kind in here.items() if name not in there]),
        *_listed("in the checkpoint, and in this run", [f"{name} {there[name]}, {here[name]}" for name in differing]),
    ]
    if problems:
        raise CheckpointError(
            "\n  ".join([f"{checkpoint.path} holds other parameters than this run", *problems]),
            fix=f"use the model and optimizer of {checkpoint.path / CONFIG}, or start another run with --fresh",
        )


def _listed(title: str, lines: list[str], most: int = 10) -> list[str]:
    more = [f"  and {len(lines) - most} more"] if len(lines) > most else []
    return [f"{title}:", *(f"  {line}" for line in lines[:most]), *more] if lines else []


def _kind(saved: Any) -> str:
    assert isinstance(saved, TensorStorageMetadata)
    return _shown(saved.size, saved.properties.dtype)


def _shown(shape: torch.Size, dtype: torch.dtype) -> str:
    return f"{list(shape)} {str(dtype).removeprefix('torch.')}"


def save_planner() -> DefaultSavePlanner:
    return DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)


def load_planner() -> DefaultLoadPlanner:
    return DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)


@contextmanager
def calling_dcp(what: str) -> Iterator[None]:
    """Run DCP: without its warning that a world of one is one, and with errors that say what to do."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            yield
    except CheckpointException as failure:
        number, (error, _) = min(failure.failures.items())
        if isinstance(error, CheckpointError):
            raise error from failure
        if isinstance(error, OSError):
            raise error from failure
        raise RuntimeError(f"{what}: rank {number}: {error!r}") from failure
