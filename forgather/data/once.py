"""A folder that one process makes, whole or not at all, while the others wait for it."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from forgather.durable import appearing
from forgather.errors import DataError

_NOT_WRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_NOT_ALLOWED = (errno.EACCES, errno.EPERM)


@contextmanager
def made_once(folder: Path) -> Iterator[Path | None]:
    """Gives an empty folder that becomes `folder` when the block ends, or None when `folder` is there already.

    What a killed process has left is removed by the next. DataError for a full disk or missing permission, with its
    path; nothing is left then.
    """
    if folder.is_dir():  # needs no lock, so a read-only disk that holds it will do
        yield None
        return
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"cannot make the folder {folder.parent}: {error.strerror}: {error.filename}",
            fix="set another folder, one that can be written, or grant access",
        ) from error
    try:
        with FileLock(folder.with_name(f".{folder.name}.lock")):
            if folder.is_dir():
                yield None
                return
            with appearing(folder) as aside:
                yield aside
    except OSError as error:
        if error.errno in _NOT_WRITABLE:
            raise DataError(
                f"cannot write {folder}: {error.strerror}", fix="free some space, or set another folder"
            ) from error
        if error.errno in _NOT_ALLOWED:
            raise DataError(
                f"cannot make {folder}: {error.strerror}: {error.filename}", fix="grant access, or set another folder"
            ) from error
        raise
