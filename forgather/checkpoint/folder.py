"""Checkpoint folders: whole or not there.

A checkpoint is written as `.step-00000500.partial`, and becomes `step-00000500` by one rename after every rank has
agreed that its part is on the disk. Removal goes the other way: first a rename to a hidden name, then the deletion.
So whatever is killed whenever, a folder with a step's name is a whole checkpoint, and anything else is a leftover.
"""

import contextlib
import errno
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType

from forgather.checkpoint.manifest import FileRecord, Manifest, record_of
from forgather.distributed.collectives import broadcast_object, gather_objects, rank
from forgather.durable import publish
from forgather.errors import CheckpointError, ForgatherError

_STEP = re.compile(r"step-(\d{8,})")
_LEFTOVER = re.compile(r"\.step-\d{8,}\.(partial|removed)(-\d+)?")


def step_name(step: int) -> str:
    """The folder name of a step's checkpoint."""
    return f"step-{step:08d}"


def saved_steps(checkpoints: Path) -> list[int]:
    """The steps that have a folder, lowest first. The order is by step; times of files say nothing after a copy."""
    if not checkpoints.is_dir():
        return []
    names = (_STEP.fullmatch(entry.name) for entry in checkpoints.iterdir() if entry.is_dir())
    return sorted(int(match[1]) for match in names if match)


def leftovers(checkpoints: Path) -> list[Path]:
    """What interrupted saves and removals left behind."""
    if not checkpoints.is_dir():
        return []
    return sorted(entry for entry in checkpoints.iterdir() if _LEFTOVER.fullmatch(entry.name))


def remove(folder: Path) -> None:
    """Remove a checkpoint folder; at no moment does a part of it stand under a step's name."""
    doomed = folder
    if not folder.name.startswith("."):
        doomed = _free_name(folder.with_name(f".{folder.name}.removed"))
        folder.rename(doomed)
    shutil.rmtree(doomed)


def set_aside(folder: Path) -> Path:
    """Give a damaged checkpoint a name that is nobody's step, so that its step can be saved again."""
    aside = _free_name(folder.with_name(f"{folder.name}.damaged"))
    folder.rename(aside)
    return aside


@dataclass
class Draft:
    """A checkpoint that is being written. Writers that digest as they write enter their files in `files`."""

    path: Path
    files: dict[str, FileRecord] = field(default_factory=dict)


class Committed:
    """`with Committed(final, manifest) as draft:` makes what is written into `draft.path` appear as `final`, whole.

    Collective. When any rank fails, nothing appears, the draft is removed, and every rank raises: the failing one its
    own error (CheckpointError with path and cause for what the operating system refuses), the others a CheckpointError
    that names it. Checkpoints that were there before stay as they were. ForgatherError when `final` is there, and only
    its name may not be on the disk.
    """

    def __init__(self, final: Path, manifest: Manifest) -> None:
        self.final = final
        self.manifest = manifest
        self.draft = Draft(final.with_name(f".{final.name}.partial"))

    def __enter__(self) -> Draft:
        self._on_rank_0(self._begin)
        try:
            require_shared(self.draft.path)
        except CheckpointError:
            self._on_rank_0(self._discard)
            raise
        return self.draft

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        # The agreement: every rank comes here, with or without a failure of its own.
        causes = gather_objects(None if value is None else _cause(value))
        failed = [(number, cause) for number, cause in enumerate(causes) if cause is not None]
        if not failed:
            self._on_rank_0(self._publish)
            return
        self._on_rank_0(self._discard)
        if isinstance(value, OSError):
            raise _refused(self.final, value) from value
        if value is None:
            number, cause = failed[0]
            raise CheckpointError(f"could not write {self.final}: rank {number} failed ({cause})")

    def _begin(self) -> None:
        if self.final.exists():
            raise CheckpointError(f"{self.final} is already there, and nothing is overwritten")
        self.final.parent.mkdir(parents=True, exist_ok=True)
        self.draft.path.mkdir()

    def _publish(self) -> None:
        synced = {self.draft.path / name for name in self.draft.files}  # by the writers, each on its host
        try:
            replace(self.manifest, files=self._records()).write(self.draft.path)
            publish(self.draft.path, self.final, synced=synced)
        except OSError:
            self._discard()
            raise

    def _records(self) -> dict[str, FileRecord]:
        """The record of each file; what no writer has entered is digested here."""
        records = dict(self.draft.files)
        for path in sorted(self.draft.path.rglob("*")):
            name = path.relative_to(self.draft.path).as_posix()
            if path.is_file() and name not in records:
                records[name] = record_of(path)
        return records

    def _discard(self) -> None:
        # Also called when the disk refuses everything. What cannot be removed now is a leftover that the next save
        # names and removes.
        with contextlib.suppress(OSError):
            remove(self.draft.path)

    def _on_rank_0(self, action: Callable[[], None]) -> None:
        """Run `action` on rank 0; what the operating system refuses there is raised on every rank."""
        error: ForgatherError | None = None
        if rank() == 0:
            try:
                action()
            except OSError as refusal:
                error = _refused(self.final, refusal)
            except ForgatherError as refusal:
                error = refusal
        error = broadcast_object(error)
        if error is not None:
            raise error


def require_shared(folder: Path) -> None:
    """Raise CheckpointError on every rank unless all see the folder that rank 0 has made."""
    visible = gather_objects(folder.is_dir())
    if not all(visible):
        raise CheckpointError(
            f"rank {visible.index(False)} does not see {folder}, which rank 0 has made",
            fix="let the run folder be on a file system that all hosts share",
        )


def _cause(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return str(error) or type(error).__name__


def _refused(final: Path, error: OSError) -> CheckpointError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        fix = f"free space where {final.parent} is, or let another folder take the run"
    elif error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        fix = f"make {final.parent} writable, or let another folder take the run"
    else:
        fix = f"see whether {final.parent} can be written"
    return CheckpointError(f"could not write {final}: {_cause(error)}; earlier checkpoints are untouched", fix=fix)


def _free_name(path: Path) -> Path:
    """`path`, or the first of `path-2`, `path-3`, ... that is not taken."""
    candidate, number = path, 1
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return candidate
