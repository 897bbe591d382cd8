"""Folders that are whole or not there, also after a crash of the machine.

What is made is written aside, synced, and renamed once; then the folder with the new name is synced. A rename alone
orders nothing: after a crash a name may stand for files that are empty. That there is one writer at a time is the
caller's part: here a second waits, there it is refused.
"""

import os
import shutil
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from forgather.errors import ForgatherError


@contextmanager
def appearing(final: Path, aside: Path | None = None) -> Iterator[Path]:
    """Gives an empty folder (`aside`, or one beside `final`) that becomes `final` when the block ends.

    What a killed writer has left there is removed first; when the block or the disk fails, nothing is left.
    """
    with emptied(aside or final.with_name(f".{final.name}.partial")) as folder:
        yield folder
        publish(folder, final)


@contextmanager
def emptied(aside: Path) -> Iterator[Path]:
    """Gives `aside` as an empty folder; what is there under its name when the block ends is removed."""
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        yield aside
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def publish(aside: Path, final: Path, *, synced: Collection[Path] = ()) -> None:
    """Let the folder `aside` be `final` from now on; files in `synced` are on the disk already.

    OSError when that cannot be, and `aside` is as it was. ForgatherError when `final` is there, and only its name may
    not be on the disk.
    """
    sync_all(path for path in [*aside.rglob("*"), aside] if path not in synced)
    aside.rename(final)
    try:
        sync(final.parent)
    except OSError as error:
        raise ForgatherError(
            f"{final} is written and whole, but if the machine crashes now its name may be lost: "
            f"cannot sync {final.parent}: {error.strerror}",
            fix=f"see what ails the disk that holds {final.parent}; the same command goes on from what is there",
        ) from error


def sync_all(paths: Iterable[Path]) -> None:
    """Return when each of the files and directories is on the disk."""
    for path in paths:
        sync(path)


def sync(path: Path) -> None:
    """Return when a file's bytes, or a directory's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
