"""The folder of a run: checkpoints, logs, and who is writing there."""

import contextlib
import re
import sys
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Self

from forgather.checkpoint.lock import RunLock
from forgather.distributed.collectives import broadcast_object, gather_objects, rank
from forgather.durable import sync
from forgather.errors import CheckpointError

_WEIGHTS = re.compile(r"\.(safetensors|bin|pt|pth)(\.index\.json)?$")


class RunFolder:
    """Opens `dir` for one live run; with `fresh`, the first of `dir`, `dir-2`, `dir-3`, ... that is not there yet.

    Collective: rank 0 decides, makes and locks, and tells the others. Raises CheckpointError on every rank when the
    folder cannot be made, another live run has it, or a rank does not see it. Nothing that is already there is
    overwritten.
    """

    def __init__(self, dir: Path, fresh: bool = False) -> None:
        self._lock: RunLock | None = None
        self._descriptions: dict[str, bytes] = {}
        opened: Path | CheckpointError = Path(dir)
        if rank() == 0:
            try:
                opened = self._open(Path(dir).absolute(), fresh)
            except CheckpointError as error:
                opened = error
            except OSError as error:
                opened = CheckpointError(
                    f"cannot open the run folder {dir}: {error.strerror}: {error.filename}",
                    fix="make the folder writable, or let outputs go elsewhere",
                )
        opened = broadcast_object(opened)
        if isinstance(opened, CheckpointError):
            raise opened
        try:
            require_shared(opened)  # now, not after hours at the first save
        except CheckpointError:
            self.close()
            raise
        self.dir = opened
        self.checkpoints = opened / "checkpoints"
        self.logs = opened / "logs"

    def describe(self, name: str, content: str | Path) -> None:
        """Let every checkpoint carry the file `name` with this text, or a copy of this file or folder as it is now.

        What is described makes a checkpoint explain itself: the resolved configuration as `config.yaml`, the model's
        package as `package`, so that it can be resumed, inspected and exported alone. Of a folder its own files are
        taken, without weights: below a model's package stand its runs.
        """
        if rank() != 0:
            return
        if isinstance(content, str):
            self._descriptions[name] = content.encode()
        elif content.is_dir():
            for file in sorted(content.iterdir()):
                if file.is_file() and not file.name.startswith(".") and not _WEIGHTS.search(file.name):
                    self._descriptions[f"{name}/{file.name}"] = file.read_bytes()
        else:
            self._descriptions[name] = content.read_bytes()

    @property
    def descriptions(self) -> Mapping[str, bytes]:
        """The files that were described, by name; on rank 0."""
        return self._descriptions

    def say(self, text: str) -> None:
        """Tell the user: on stderr, and with the time in `logs/run.log`. Rank 0 speaks."""
        if rank() == 0:
            # Either may lead to a full disk, and what is being said may be just that.
            with contextlib.suppress(OSError):
                print(text, file=sys.stderr, flush=True)
            with contextlib.suppress(OSError), (self.logs / "run.log").open("a") as log:
                log.write(f"{datetime.now().astimezone().isoformat(timespec='seconds')} {text}\n")

    def close(self) -> None:
        """Let another run have the folder. The end of the process does the same."""
        if self._lock is not None:
            self._lock.release()

    def discard_unused(self) -> None:
        """Remove the folder if nothing has been written into it; whoever only looked leaves no trace."""
        if rank() == 0:
            with contextlib.suppress(OSError):  # something is in it
                for folder in (self.checkpoints, self.logs):
                    folder.rmdir()
                (self.dir / ".lock").unlink()
                self.dir.rmdir()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _open(self, dir: Path, fresh: bool) -> Path:
        dir.parent.mkdir(parents=True, exist_ok=True)
        if runs := sorted(path.parent.name for path in dir.glob("*/checkpoints")):
            raise CheckpointError(
                f"{dir} cannot be a run: it holds the runs {', '.join(runs[:4])}",
                fix=f"give the run a name, or name one of these: {dir / runs[0]}",
            )
        opened = _first_new(dir) if fresh else dir
        for folder in (opened, opened / "checkpoints", opened / "logs"):
            folder.mkdir(exist_ok=True)
        self._lock = RunLock(opened / ".lock")
        sync(opened.parent)
        return opened


def require_shared(folder: Path) -> None:
    """Raise CheckpointError on every rank unless all see the folder that rank 0 has made."""
    visible = gather_objects(folder.is_dir())
    if not all(visible):
        raise CheckpointError(
            f"rank {visible.index(False)} does not see {folder}, which rank 0 has made",
            fix="let the run folder be on a file system that all hosts share",
        )


def _first_new(dir: Path) -> Path:
    """Make and return the first of dir, dir-2, dir-3, ... that nobody has; two that ask at once get two."""
    number = 1
    while True:
        candidate = dir if number == 1 else dir.with_name(f"{dir.name}-{number}")
        try:
            candidate.mkdir()
        except FileExistsError:
            number += 1
        else:
            return candidate
