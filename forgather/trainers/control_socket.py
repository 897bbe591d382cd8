"""Where a run listens for commands, and what goes over the wire: a line of JSON each way. Imports no torch.

    RUN/.control/             for its owner alone (0700)
      socket                  a Unix socket (0600); the kernel tells the run who is calling
      address.json            the socket's path, the process and its host

A path of more than 100 bytes does not fit a socket's address, and not every file system has sockets. Then the socket is
in a folder of its own in $XDG_RUNTIME_DIR or the system's folder for temporary files, and `address.json` leads there.
"""

import contextlib
import json
import os
import shutil
import socket
import stat
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from forgather.errors import EXIT_USER, ForgatherError

FOLDER = ".control"
_ADDRESS = "address.json"
_LONGEST_PATH = 100  # bytes; Linux takes 107, macOS 103
_LONGEST_LINE = 1 << 20


class ControlError(ForgatherError):
    """A run cannot be asked, or has refused."""

    exit_code = EXIT_USER


@dataclass(frozen=True)
class Address:
    """Where the socket of a run is."""

    socket: str
    pid: int
    host: str

    def write(self, run: Path) -> None:
        """Leave it in the run folder; whole or not at all."""
        partial = run / FOLDER / f".{_ADDRESS}.partial"
        partial.write_text(json.dumps(asdict(self)))
        partial.replace(run / FOLDER / _ADDRESS)

    @classmethod
    def read(cls, run: Path) -> "Address | None":
        """The address that a run has left in its folder; None where there is none."""
        try:
            return cls(**json.loads((run / FOLDER / _ADDRESS).read_text()))
        except (FileNotFoundError, NotADirectoryError, ValueError, TypeError):
            return None


def listen(run: Path) -> tuple[socket.socket, Address]:
    """Open the socket of `run`, which this process alone uses; what a killed run has left is replaced.

    OSError where there is no place for a socket at all.
    """
    folder = run / FOLDER
    folder.mkdir(mode=0o700, exist_ok=True)
    folder.chmod(0o700)  # one that was there may be open to others
    path = folder / "socket"
    opened = None if len(os.fsencode(path)) > _LONGEST_PATH else _bind(path)
    if opened is None:
        path = Path(tempfile.mkdtemp(prefix="forgather-", dir=os.environ.get("XDG_RUNTIME_DIR"))) / "socket"
        opened = _bind(path)
        if opened is None:
            path.parent.rmdir()
            raise OSError(f"{path.parent} takes no socket")
    address = Address(str(path), os.getpid(), socket.gethostname())
    address.write(run)
    return opened, address


def _bind(path: Path) -> socket.socket | None:
    """A socket that listens at `path` and is its owner's alone; None where the file system has no sockets."""
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(str(path))
        path.chmod(stat.S_IRUSR | stat.S_IWUSR)  # the folder lets nobody else in meanwhile
        listener.listen(8)
    except OSError:
        listener.close()
        return None
    return listener


def remove(run: Path, address: Address) -> None:
    """Take away what `listen` has made."""
    path = Path(address.socket)
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
        if path.parent != run / FOLDER:
            path.parent.rmdir()
    shutil.rmtree(run / FOLDER, ignore_errors=True)


def send(connection: socket.socket, message: Mapping[str, Any]) -> None:
    """Write one line of JSON."""
    connection.sendall(json.dumps(message).encode() + b"\n")


def receive(connection: socket.socket) -> dict[str, Any] | None:
    """Read one line of JSON; None when the other side has gone, ValueError for anything else than an object."""
    line = b""
    while not line.endswith(b"\n"):
        part = connection.recv(65536)
        if not part:
            return None
        line += part
        if len(line) > _LONGEST_LINE:
            raise ValueError("the line does not end")
    message = json.loads(line)
    if not isinstance(message, dict):
        raise ValueError("not an object")
    return message


def ask(run: Path, command: str, *, timeout_s: float | None = None) -> dict[str, Any]:
    """What the live run in folder `run` answers to `command`, once it has obeyed.

    Raises ControlError when there is no live run, when it belongs to another user or lives on another host, when it
    refuses, and when it ends or `timeout_s` passes before it has obeyed.
    """
    address = _address(run)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout_s)
        try:
            connection.connect(address.socket)
            send(connection, {"command": command})
            answer = receive(connection)
        except PermissionError:
            raise _of_another_user(run) from None
        except (FileNotFoundError, ConnectionRefusedError):
            raise ControlError(
                f"no live run in {run}: process {address.pid} has ended without a word", fix="`forgather train` goes on"
            ) from None
        except BlockingIOError:  # with a limit of time a full queue of callers is not waited for
            raise ControlError(
                f"{run} has not taken its last callers yet: process {address.pid} is suspended, or very busy",
                fix=f"see `ps -o state,etime {address.pid}`; `kill -CONT {address.pid}` lets a suspended run go on",
            ) from None
        except TimeoutError:
            raise ControlError(
                f"{run} has not obeyed within {timeout_s:g} s; it will, at the end of its step",
                fix="look with `forgather control status RUN`, or wait longer with --timeout",
            ) from None
        except (ConnectionResetError, BrokenPipeError):
            answer = None
    if answer is None:
        raise ControlError(f"the run in {run} ended before it answered", fix="see the end of its logs/run.log")
    if not answer.pop("ok", False):
        raise ControlError(f"{run}: {answer.get('error', 'refused')}", fix=answer.get("fix"))
    return answer


def is_live(run: Path) -> bool:
    """Whether somebody listens at the socket of a run on this host; also where it is not for this user to ask."""
    address = Address.read(run)
    if address is None or address.host != socket.gethostname():
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.setblocking(False)  # a suspended run takes no callers, and is live
        try:
            connection.connect(address.socket)
        except (PermissionError, BlockingIOError):
            return True
        except OSError:
            return False
    return True


def _address(run: Path) -> Address:
    if not (run / "checkpoints").is_dir():
        raise ControlError(f"{run} is no run folder", fix="`forgather control list` shows the live ones below a folder")
    try:
        address = Address.read(run)
    except PermissionError:
        raise _of_another_user(run) from None
    if address is None:
        raise ControlError(f"no live run in {run}", fix="`forgather train` starts it, or goes on with it")
    if address.host != socket.gethostname():
        raise ControlError(
            f"the run in {run} listens on {address.host}, and this is {socket.gethostname()}",
            fix=f"give the command on {address.host}",
        )
    return address


def _of_another_user(run: Path) -> ControlError:
    return ControlError(f"the run in {run} belongs to another user", fix="only who started a run may command it")
