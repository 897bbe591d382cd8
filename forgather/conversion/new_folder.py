"""A folder that a conversion makes: it is not there before, one process makes it, and it appears when it is whole."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from forgather.errors import CheckpointError


@contextmanager
def only_writer(destination: Path) -> Iterator[None]:
    """One writer at a time to one folder that is not there, and what the system refuses with the path and what to do.

    CheckpointError when the folder is there, or is being written by another.
    """
    refuse_what_is_there(destination)
    with locked(destination):
        refuse_what_is_there(destination)
        yield


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One writer at a time to one folder; CheckpointError when there is another, or the operating system refuses.

    Folders above it are made, and do not stay where it does not come into being.
    """
    above = [each for each in folder.parents if not each.exists()]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        path = folder.with_name(f".{folder.name}.lock")
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise CheckpointError(
                f"another process is writing {folder}", fix="let it end or stop it, or name another folder"
            ) from None
        try:
            yield
        finally:
            path.unlink(missing_ok=True)  # still held: who has just opened it finds that it has no name, and retries
            lock.release()
            for each in above:
                with suppress(OSError):  # it holds what was written
                    each.rmdir()
    except OSError as error:
        where = f" ({error.filename})" if error.filename is not None else ""  # which may be a file that was read
        raise CheckpointError(
            f"could not write {folder}: {error.strerror or error}{where}",
            fix="name a folder that can be written and has space",
        ) from error


def refuse_what_is_there(destination: Path) -> None:
    """Raise CheckpointError when the folder is there."""
    if destination.exists():
        raise CheckpointError(f"{destination} is already there, and nothing is overwritten", fix="name another folder")
