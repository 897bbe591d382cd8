"""The checkpoints of one run: save, find the newest whole one, load it on any mesh.

    with RunFolder(dir) as run, CheckpointStore(run) as store:
        checkpoint = store.resume(state)  # None: there is none yet
        ...
        store.save(state, step)          # returns when the state is copied; a process of its own writes it
        ...
        store.finish()                   # returns when it is whole and on the disk

All of them are collective, `committed` excepted.
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
import xxhash

from forgather.checkpoint.background import BackgroundWriter, HereWriter, Writer
from forgather.checkpoint.commit import Commit
from forgather.checkpoint.document import Json
from forgather.checkpoint.folder import (
    bytes_in,
    cause_of,
    draft_of,
    leftovers,
    refused,
    remove,
    saved_steps,
    set_aside,
    step_name,
)
from forgather.checkpoint.keep import Keep
from forgather.checkpoint.loading import Checkpoint, load_checkpoint, visible_checkpoint
from forgather.checkpoint.manifest import Manifest
from forgather.checkpoint.messages import Committed, Failed, WritePart
from forgather.checkpoint.plan import Plans
from forgather.checkpoint.run_folder import RunFolder
from forgather.checkpoint.state import TrainState
from forgather.checkpoint.storage import raw_bytes
from forgather.distributed.collectives import (
    broadcast_object,
    gather_objects,
    raise_together,
    rank,
    world_size,
)
from forgather.errors import CheckpointError, ForgatherError
from forgather.tensor_boxes import local_part

# A save of which nothing new is written for so long will not go on: its last bytes may take that to reach the disk.
STALLED_S = 30.0


@dataclass(frozen=True)
class Pending:
    """A save whose outcome is not known yet."""

    step: int
    path: Path


class CheckpointStore:
    """Saves, finds and loads the checkpoints of `run`, and keeps those that `keep` says (the last 2 without one).

    With `asynchronous`, a save is a copy of the state into memory that is set aside for it; a process of its own writes
    it, at low priority, while the run goes on. Without, the run waits, and no memory is needed.
    """

    def __init__(self, run: RunFolder, keep: Keep | None = None, *, asynchronous: bool = True) -> None:
        self.run = run
        self.keep = keep or Keep()
        self.asynchronous = asynchronous
        self._writer: Writer | None = None
        self._plans = Plans()
        self._pending: Pending | None = None
        self._heard: Committed | Failed | None = None  # what became of it, which ranks hear one after the other
        self._told: Pending | None = None  # a save that has become whole, which nobody was told of yet
        self._number = 0
        self._is_tidy = False  # whether the leftovers of saves that nobody goes on with are gone
        self._current: int | None = None  # the step that this run has last saved or loaded
        self._damaged: set[int] = set()

    def save(
        self,
        state: TrainState,
        step: int,
        metrics: Mapping[str, float] | None = None,
        taken: Callable[[], None] = lambda: None,
    ) -> Path:
        """Begin the checkpoint of `step`, and return the folder that it will be; `state` may change from here on.

        `taken` is called, in this thread, when it may change already: before a save that is not `asynchronous` is on
        the disk. It is not called when nothing is written, or that fails before.

        `metrics` are those of an evaluation at this step: they tell which checkpoints are the best. A step that this
        run has just saved or loaded is not written again. Waits for the save before. CheckpointError, on every rank,
        when that one or this one cannot be written; checkpoints that were whole stay so.
        """
        final = self.run.checkpoints / step_name(step)
        if self._current == step:
            return final
        captured: tuple[dict[str, torch.Tensor], dict[str, Json]] | None = None
        failure: Exception | None = None
        previous = self._part_written()
        try:
            if final.exists() and step not in self._damaged:
                raise CheckpointError(f"{final} is already there, and nothing is overwritten")
            captured = state.capture()
        except Exception as error:  # noqa: BLE001  raised below, by all
            failure = error
        stale = frozenset() if captured is None else self._plans.stale(captured[0])
        answers = gather_objects((previous, None if failure is None else cause_of(failure), stale))
        self._settle([part for part, _, _ in answers])
        raise_together(failure, [cause for _, cause, _ in answers])
        assert captured is not None, "what was not captured has failed"
        tensors, document = captured
        if not self._is_tidy or step in self._damaged:
            self._make_room(final)
        if stale := stale.union(*(theirs for _, _, theirs in answers)):
            self._plans.make(tensors, stale)
        self._begin(Pending(step, final), tensors, document, self._commit(state, step, final, metrics or {}), taken)
        if not self.asynchronous:
            self.finish()
        return final

    def finish(self) -> None:
        """Return when the last save is whole and on the disk. CheckpointError, on every rank, when it will not be."""
        if self._pending is not None:
            self._settle(gather_objects(self._part_written()))

    def committed(self) -> Pending | None:
        """A save that has become whole since this was last asked; not collective, and ranks may hear it in turn.

        One that fails is not told here: the next save and `finish` raise, on all ranks.
        """
        if self._pending is not None and self._writer is not None and self._heard is None:
            self._hear(self._writer.committed(0))
        told, self._told = self._told, None
        return told

    def close(self) -> None:
        """End the process that writes. What it has not finished is lost: after an error, call `wait_alone` before."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
            self._plans = Plans()
            self._is_tidy = False
        self._pending = self._heard = None

    def wait_alone(self, seconds: float) -> None:
        """Give a save that is under way so much time to become whole, without a word to other ranks.

        Less when nothing of it is being written any more: a rank whose part is missing may be gone.
        """
        end, seen = time.monotonic() + seconds, -1
        while self._pending is not None and self._writer is not None and self._heard is None:
            left = end - time.monotonic()
            self._hear(self._writer.committed(max(0.0, min(left, STALLED_S))))
            written = bytes_in(draft_of(self._pending.path))
            if left <= STALLED_S or written == seen:
                return
            seen = written

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        if kind is None:
            self.finish()
        self.close()

    def resume(self, state: TrainState) -> Checkpoint | None:
        """Load the whole checkpoint of the highest step into `state`, on whatever mesh that is, and return it.

        None where nothing was ever saved. Says what it passes over: what an interrupted save left, and which file of a
        damaged checkpoint is wrong; then the next older one is loaded, all of it. CheckpointError when there are
        checkpoints and every one is damaged, as a run does not start anew by accident: `state` may be a mixture then.
        CheckpointError, listing both sides, when names, shapes or dtypes differ. CheckpointError when another version
        wrote the newest, or it cannot be read now: that is no damage, and to go on from an older one would throw steps
        away.
        """
        self.finish()
        if rank() == 0:
            for leftover in leftovers(self.run.checkpoints):
                self.run.say(f"note: {leftover} was left by an interrupted save or removal; it is ignored")
        steps = saved_steps(self.run.checkpoints) if rank() == 0 else []
        found = False
        while (next_one := self._next(steps)) is not None:
            found = True
            step, opened = next_one
            folder = self.run.checkpoints / step_name(step)
            damage = opened if isinstance(opened, list) else load_checkpoint(state, opened)
            if isinstance(opened, Checkpoint) and not damage:
                self._loaded(state, opened)
                if self._damaged:
                    self.run.say(f"warning: going on from {folder}, the newest that is whole")
                return opened
            self._damaged.add(step)
            self.run.say(f"warning: {folder} is damaged and not used: {'; '.join(damage)}")
        if found:
            raise CheckpointError(
                f"every checkpoint in {self.run.checkpoints} is damaged",
                fix="bring back the files named above, or start another run with --fresh",
            )
        return None

    def _next(self, steps: list[int]) -> tuple[int, Checkpoint | list[str]] | None:
        """The highest of rank 0's `steps`, which is taken from them, and what is there to see; None after the last."""
        step = steps.pop() if steps else None
        seen: tuple[int, Checkpoint | list[str]] | CheckpointError | None = None
        if step is not None:
            try:
                seen = (step, visible_checkpoint(self.run.checkpoints / step_name(step)))
            except CheckpointError as error:
                seen = error
        seen = broadcast_object(seen)
        if isinstance(seen, CheckpointError):
            raise seen
        return seen

    def _loaded(self, state: TrainState, checkpoint: Checkpoint) -> None:
        self._current = checkpoint.step
        there = set(checkpoint.document["extras"])
        for name in sorted(there - set(state.extras)):
            self.run.say(f"note: {checkpoint.path} has a state of {name!r}, which this run lacks; it is not used")
        for name in sorted(set(state.extras) - there):
            self.run.say(f"note: {checkpoint.path} has no state of {name!r}, which starts anew")

    def _begin(
        self,
        save: Pending,
        tensors: Mapping[str, torch.Tensor],
        document: Mapping[str, Json],
        commit: Commit | None,
        taken: Callable[[], None],
    ) -> None:
        """Hand this rank's part to the writer."""
        if self._writer is None:
            self._writer = BackgroundWriter() if self.asynchronous else HereWriter()
        with torch.no_grad():
            plan = self._plans.plan
            parts = [local_part(tensors[item.name]) for item in plan.items]
            copies = {name: _digest(local_part(tensors[name])) for name in plan.copies}
        self._number += 1
        job = WritePart(self._number, save.path, rank(), document, copies, commit)
        self._writer.begin(job, plan.items, parts, taken)
        self._pending, self._current = save, save.step

    def _commit(self, state: TrainState, step: int, final: Path, metrics: Mapping[str, float]) -> Commit | None:
        """What rank 0's writer does when all parts are there."""
        if rank() != 0:
            return None
        finite = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}  # JSON has no others
        manifest = Manifest(step, world_size(), state.mesh, metrics=finite)
        return Commit(final, manifest, self.keep, self.run.descriptions, frozenset(self._damaged))

    def _part_written(self) -> ForgatherError | None:
        """Wait until this rank's part of the last save is on the disk; the error when it is not."""
        if isinstance(self._heard, Failed):
            return self._heard.error
        if self._pending is None or self._writer is None or self._heard is not None:
            return None
        return self._writer.written()

    def _settle(self, parts: Iterable[ForgatherError | None]) -> None:
        """Learn what became of the last save, whose parts are written or `parts` says why not. Collective."""
        if self._pending is None:
            return
        assert self._writer is not None, "there is no save without a writer"
        outcome: Committed | Failed | None = None
        failed = next((part for part in parts if part is not None), None)
        if failed is not None:
            self._writer.abandon()
            outcome = Failed(self._number, failed)
        elif rank() == 0:
            outcome = self._heard or self._writer.committed(None)
        outcome = broadcast_object(outcome)
        assert outcome is not None, "rank 0 has waited for it"
        self._hear(outcome)
        self._pending = self._heard = None
        if isinstance(outcome, Failed):
            self._current = None
            self._is_tidy = False
            raise outcome.error

    def _hear(self, outcome: Committed | Failed | None) -> None:
        """Note, on this rank, what became of the last save. It stays pending until all ranks settle it together."""
        if outcome is None or self._heard is not None:
            return
        self._heard = outcome
        if isinstance(outcome, Committed):
            self._told = self._pending
            for warning in outcome.warnings:
                self.run.say(warning)

    def _make_room(self, final: Path) -> None:
        """Remove what interrupted saves left, and give a damaged checkpoint of this step another name. Collective."""
        problem: CheckpointError | None = None
        if rank() == 0:
            draft = draft_of(final)
            for leftover in leftovers(self.run.checkpoints):
                self.run.say(f"note: removing {leftover}, which an interrupted save or removal left")
                try:
                    remove(leftover)
                except OSError as error:
                    self.run.say(f"warning: {cause_of(error)}")
                    if leftover == draft:  # what stands in it could be taken for parts of this save
                        problem = refused(final, error)
            try:
                if final.exists():
                    self.run.say(f"note: the damaged {final} is now {set_aside(final)}")
            except OSError as error:
                problem = refused(final, error)
        problem = broadcast_object(problem)
        if problem is not None:
            raise problem
        self._damaged.discard(int(final.name.removeprefix("step-")))
        self._is_tidy = True


def _digest(tensor: torch.Tensor) -> str:
    return xxhash.xxh3_64_hexdigest(raw_bytes(tensor.detach().to("cpu").contiguous()))
