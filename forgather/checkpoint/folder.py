"""Checkpoint folders: whole or not there.

A checkpoint is written as `.step-00000500.partial`, and becomes `step-00000500` by one rename after every rank's part
is on the disk. Removal goes the other way: first a rename to a hidden name, then the deletion. So whatever is killed
whenever, a folder with a step's name is a whole checkpoint, and anything else is a leftover.
"""

import contextlib
import errno
import re
import shutil
from pathlib import Path

from forgather.errors import CheckpointError

_STEP = re.compile(r"step-(\d{8,})")
_LEFTOVER = re.compile(r"\.step-\d{8,}\.(partial|removed)(-\d+)?")


def step_name(step: int) -> str:
    """The folder name of a step's checkpoint."""
    return f"step-{step:08d}"


def draft_of(final: Path) -> Path:
    """Where the checkpoint `final` stands until it is whole."""
    return final.with_name(f".{final.name}.partial")


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


def bytes_in(folder: Path) -> int:
    """How much has been written into a folder that may change meanwhile; 0 for one that is not there."""
    total = 0
    with contextlib.suppress(OSError):  # it has its name now, or is removed
        for file in folder.rglob("*"):
            total += file.stat().st_size
    return total


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


def cause_of(error: BaseException) -> str:
    """Why it failed, in words: for what the operating system refuses, the reason and the file."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return str(error) or type(error).__name__


def refused(final: Path, error: OSError) -> CheckpointError:
    """The error for a checkpoint that the operating system does not let us write, with what to do about it."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        fix = f"free space where {final.parent} is, or let another folder take the run"
    elif error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        fix = f"make {final.parent} writable, or let another folder take the run"
    else:
        fix = f"see whether {final.parent} can be written"
    return CheckpointError(f"could not write {final}: {cause_of(error)}; earlier checkpoints are untouched", fix=fix)


def _free_name(path: Path) -> Path:
    """`path`, or the first of `path-2`, `path-3`, ... that is not taken."""
    candidate, number = path, 1
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return candidate
