"""One live run a folder."""

import fcntl
import json
import os
import socket
from pathlib import Path

from forgather.errors import CheckpointError


class RunLock:
    """Holds `path` for this process until `release` or until the process is gone, however it dies.

    The kernel keeps the lock (flock), so a kill -9 leaves nothing behind. CheckpointError, naming process and host,
    when another process holds it, and where there are no locks. On a network file system it holds between hosts where
    the server supports locks.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(self._descriptor)
            os.close(self._descriptor)
            raise CheckpointError(
                f"{path.parent} is used by a live run: {holder}",
                fix=f"let it end, stop it with `forgather control stop {path.parent}`, "
                "or start another run beside it with --fresh",
            ) from None
        except OSError as error:
            os.close(self._descriptor)
            raise CheckpointError(
                f"cannot lock {path}: {error.strerror}",
                fix="let the run folder be on a file system with locks (Lustre has them when mounted with -o flock)",
            ) from error
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
        # A forked child (a loader's worker) inherits the descriptor, and with it would outlive us as a holder.
        os.register_at_fork(after_in_child=self._close)

    def release(self) -> None:
        """Let others have the folder."""
        self._close()

    def _close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _holder(descriptor: int) -> str:
    try:
        content = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {content['pid']} on {content['host']}"
    except (ValueError, KeyError, TypeError):
        return "a process that has not yet said its name"
