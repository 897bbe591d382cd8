"""Answers commands for a run, in threads beside the loop: the half that rank 0 has."""

import contextlib
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from forgather.trainers.commands import Command
from forgather.trainers.control_socket import Address, listen, receive, remove, send

_PATIENCE_S = 10.0  # for a caller that connects and says nothing
_SAVING = {Command.SAVE, Command.SAVE_STOP}  # answered when the checkpoint is on the disk


class ControlServer:
    """Listens in the folder `run`; only the user who owns this process is heard.

    `status()` answers `status`. `refuse(command)` says why a command cannot be obeyed, or None. The loop calls `take`
    for what has come in, then `obeyed`, and `saved` for each checkpoint that is whole; whoever asked waits for that.
    """

    def __init__(
        self, run: Path, *, status: Callable[[], dict[str, Any]], refuse: Callable[[Command], str | None]
    ) -> None:
        self.run = run
        self._status = status
        self._refuse = refuse
        self._lock = threading.Lock()
        self._waiting: list[_Request] = []
        self._listener: socket.socket | None = None
        self._address: Address | None = None

    def start(self) -> None:
        """Listen from now on; OSError where there is no place for a socket."""
        self._listener, self._address = listen(self.run)
        # A forked child (a loader's worker) would keep the socket open when this process is gone.
        os.register_at_fork(after_in_child=self._listener.close)
        threading.Thread(target=self._accept, args=(self._listener,), name="forgather-control", daemon=True).start()

    def take(self) -> set[Command]:
        """The commands that wait to be obeyed."""
        with self._lock:
            for request in self._waiting:
                request.is_taken = True
            return {request.command for request in self._waiting if request.step is None}

    def has(self, *commands: Command) -> bool:
        """Whether one of these waits to be obeyed."""
        with self._lock:
            return any(request.command in commands for request in self._waiting if request.step is None)

    def obeyed(self, step: int, commands: Iterable[Command]) -> None:
        """All ranks do `commands` after step `step`; tell those whose commands were taken before.

        One that has become impossible since it came, as a second of its kind may be, is refused now.
        """
        with self._lock:
            for request in self._waiting:
                if request.is_taken and request.step is None and request.command in commands:
                    request.step = step
                    if (refusal := self._refuse(request.command)) is not None:
                        request.answer({"ok": False, "error": refusal})
                    elif request.command not in _SAVING:
                        request.answer({"ok": True, "command": request.command.value, "step": step})
            self._drop_answered()

    def saved(self, step: int, path: Path) -> None:
        """The checkpoint of `step` is on the disk."""
        with self._lock:
            for request in self._waiting:
                if request.step is not None and request.step <= step:
                    request.answer({"ok": True, "command": request.command.value, "step": step, "path": str(path)})
            self._drop_answered()

    def close(self, why: str) -> None:
        """Listen no more; who still waits is told why."""
        if self._listener is None or self._address is None:
            return
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self._listener.close()
        self._listener = None
        remove(self.run, self._address)
        with self._lock:
            for request in self._waiting:
                request.answer({"ok": False, "error": f"{why}, before it obeyed `{request.command.value}`"})
            requests, self._waiting = self._waiting, []
        for request in requests:
            request.sent.wait(1.0)

    def _drop_answered(self) -> None:
        self._waiting = [request for request in self._waiting if not request.answered.is_set()]

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):  # a caller that has gone is nobody's trouble
            connection.settimeout(_PATIENCE_S)
            try:
                message = receive(connection)  # also of a stranger: what is not read would cut off the answer
            except ValueError as error:
                send(connection, {"ok": False, "error": f"not a command: {error}"})
                return
            if caller_uid(connection) != os.geteuid():
                send(connection, {"ok": False, "error": "only the user who started this run may command it"})
            elif message is not None:
                self._answer(connection, message.get("command"))

    def _answer(self, connection: socket.socket, word: object) -> None:
        if word == "status":
            send(connection, {"ok": True, **self._status()})
            return
        known = {command.value: command for command in Command}
        if not isinstance(word, str) or word not in known:
            send(
                connection, {"ok": False, "error": f"no command {word!r}", "fix": f"one of: status, {', '.join(known)}"}
            )
            return
        refusal = self._refuse(known[word])
        if refusal is not None:
            send(connection, {"ok": False, "error": refusal})
            return
        request = _Request(known[word])
        with self._lock:
            self._waiting.append(request)
        request.answered.wait()
        try:
            send(connection, request.reply)
        finally:
            request.sent.set()


class _Request:
    """One caller's command on its way."""

    def __init__(self, command: Command) -> None:
        self.command = command
        self.is_taken = False  # it is in the agreement that is under way
        self.step: int | None = None  # after which it was obeyed
        self.reply: dict[str, Any] = {}
        self.answered = threading.Event()
        self.sent = threading.Event()

    def answer(self, reply: dict[str, Any]) -> None:
        self.reply = reply
        self.answered.set()


def caller_uid(connection: socket.socket) -> int:
    """The user at the other end of a Unix socket, as the kernel says."""
    if not hasattr(socket, "SO_PEERCRED"):
        return os.geteuid()  # not Linux: there the modes of folder and socket have kept others out
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", credentials)[1])
