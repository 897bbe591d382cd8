"""A group of ranks on this host that calls one function, and what its first rank sends back while they run.

The ranks are forked from a server that has imported what they need and has never run an operation: several groups
after or beside one another pay for the imports once. They meet through a file, so no port is taken.
"""

import contextlib
import multiprocessing
import os
import socket
import tempfile
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
from torch.distributed import FileStore  # type: ignore[attr-defined]  # not listed in its __all__

from forgather.distributed.failure import die_with_parent
from forgather.errors import EXIT_INTERNAL, DistributedError, ForgatherError

# How long a group that has lost one rank is listened to for the error behind it: peers of a rank that fails lose their
# connections to it, and may say so first.
_LISTEN_S = 1.0

_VALUE, _END, _ERROR = range(3)
_LOOPBACK = "lo"


def preload(modules: Sequence[str]) -> None:
    """Name what the server imports before the first group starts."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(list(modules))


class LocalRanks:
    """`size` ranks that call `function(send, *arguments)`; what rank 0 sends is received here, in order.

    A context: ranks that still run when it is left are ended. Each uses `threads` for an operation on the CPU. A world
    of one is a process of its own too, without a process group.
    """

    def __init__(
        self,
        size: int,
        function: Callable[..., None],
        arguments: Sequence[Any] = (),
        *,
        threads: int = 1,
        timeout_s: float = 1800.0,
    ) -> None:
        self.size = size
        self._folder = tempfile.TemporaryDirectory(prefix="forgather-")
        self._pipes: dict[Connection, int] = {}
        self._processes: list[Any] = []
        server = multiprocessing.get_context("forkserver")
        store = str(Path(self._folder.name) / "store")
        for rank in range(size):
            ours, theirs = server.Pipe(duplex=False)
            given = (rank, size, store, timeout_s, threads, theirs, function, tuple(arguments))
            process = server.Process(target=_be_rank, args=given, daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes[ours] = rank

    def receive(self) -> Any:
        """The next value that rank 0 sent. Raises the error of the rank that failed, and EOFError after the last."""
        while self._pipes:
            for pipe in wait(list(self._pipes)):
                assert isinstance(pipe, Connection)
                kind, value = self._read(pipe)
                if kind == _VALUE:
                    return value
                if kind == _ERROR:
                    raise self._cause(self._pipes.pop(pipe), value)
                del self._pipes[pipe]
        raise EOFError

    def close(self) -> None:
        """End the ranks that still run."""
        for process in self._processes:
            process.kill()
            process.join()
        self._processes.clear()
        self._pipes.clear()
        self._folder.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _read(self, pipe: Connection) -> tuple[int, Any]:
        try:
            kind, value = pipe.recv()
        except EOFError:
            return _ERROR, DistributedError("the process was killed", fix="if nobody killed it, memory ran out")
        return kind, value

    def _cause(self, rank: int, error: ForgatherError) -> ForgatherError:
        """The error to tell: one that the user can mend, before a defect or a lost connection."""
        failures = {rank: error}
        while any(failure.exit_code == EXIT_INTERNAL for failure in failures.values()):
            ready = wait(list(self._pipes), timeout=_LISTEN_S)
            if not ready:
                break
            for pipe in ready:
                assert isinstance(pipe, Connection)
                kind, value = self._read(pipe)
                if kind == _VALUE:
                    continue
                number = self._pipes.pop(pipe)
                if kind == _ERROR:
                    failures[number] = value
        first = min(failures, key=lambda number: failures[number].exit_code == EXIT_INTERNAL)
        chosen = failures[first]
        told = ForgatherError(f"rank {first} of {self.size}: {chosen.message}", fix=chosen.fix)
        told.exit_code = chosen.exit_code
        return told


def _be_rank(
    rank: int,
    size: int,
    store: str,
    timeout_s: float,
    threads: int,
    pipe: Connection,
    function: Callable[..., None],
    arguments: tuple[Any, ...],
) -> None:
    die_with_parent()
    torch.set_num_threads(threads)

    def send(value: Any) -> None:
        pipe.send((_VALUE, value))

    try:
        if size > 1:
            _join(rank, size, store, timeout_s)
        function(send, *arguments)
        message: tuple[int, Any] = (_END, None)
    except ForgatherError as error:
        message = (_ERROR, error)
    except Exception as error:  # noqa: BLE001  carried to the process that started this one
        defect = ForgatherError("".join(traceback.format_exception(error)).rstrip())
        defect.exit_code = EXIT_INTERNAL
        message = (_ERROR, defect)
    with contextlib.suppress(BrokenPipeError):  # nobody listens any more
        pipe.send(message)


def _join(rank: int, size: int, store: str, timeout_s: float) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(size))
    if _LOOPBACK in (name for _, name in socket.if_nameindex()):
        # The host's name may lead to an address that nothing listens on, and all ranks are here.
        os.environ.update(GLOO_SOCKET_IFNAME=_LOOPBACK, NCCL_SOCKET_IFNAME=_LOOPBACK)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
        store=FileStore(store, size),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout_s),
    )
