"""A folder that takes the place of another of the same name, and all that the other held besides.

There are two renames; between them the name stands for nothing, and the old folder is beside it. A killed process never
leaves a folder that is partly old and partly new.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from forgather.checkpoint.lock import RunLock
from forgather.durable import emptied, sync, sync_all


@contextmanager
def replacing(folder: Path, *, without: Callable[[str], bool]) -> Iterator[Path]:
    """Gives an empty folder that becomes `folder` when the block ends; what it lacks of the old one is taken along.

    That is but for the files whose name is `without`. OSError when it cannot be, and CheckpointError when a run in it
    is live; then `folder` is as it was. For one writer at a time.
    """
    folder = folder.resolve()
    with _holding_runs(folder), emptied(folder.with_name(f".{folder.name}.partial")) as aside:
        yield aside
        for path in folder.iterdir():
            if not (aside / path.name).exists() and not without(path.name):
                _take_along(path, aside / path.name)
        sync_all([*aside.rglob("*"), aside])
        before = _before(folder)
        shutil.rmtree(before, ignore_errors=True)  # of one who was killed when all but this was done
        folder.rename(before)
        try:
            aside.rename(folder)
        except OSError:
            before.rename(folder)
            raise
        sync(folder.parent)
    shutil.rmtree(before, ignore_errors=True)


def is_between(folder: Path) -> bool:
    """Whether `folder` has no name: it is being replaced, or the process that did was killed between the renames."""
    folder = folder.resolve()
    return not folder.exists() and _before(folder).is_dir()


def restore(folder: Path) -> None:
    """Give `folder` its name back where it has none. For the only writer: who replaces it now is not disturbed."""
    if is_between(folder):
        _before(folder.resolve()).rename(folder.resolve())


@contextmanager
def _holding_runs(folder: Path) -> Iterator[None]:
    """Below a package stand its runs; what a live one saved after its folder was taken along would be lost."""
    with ExitStack() as held:
        for path in sorted(folder.rglob(".lock")):
            if (path.parent / "checkpoints").is_dir():
                held.callback(RunLock(path).release)
        yield


def _before(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.before")


def _take_along(path: Path, target: Path) -> None:
    """A second name for each file: nothing is copied, however large runs and checkpoints are."""
    if path.is_dir() and not path.is_symlink():
        shutil.copytree(path, target, symlinks=True, copy_function=os.link)
    else:
        os.link(path, target, follow_symlinks=False)
