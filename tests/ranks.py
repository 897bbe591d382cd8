"""A function on N gloo ranks, and its N results.

The ranks of a pool are processes forked from a server that has imported torch and transformers and has never run an
operation, so a rank starts in about 0.2 s instead of 4. They meet through a file, so no port is taken, and they stay
for as many calls as the pool's owner makes: give a test module one pool.

    @pytest.fixture(scope="module")
    def two_ranks():
        with RankPool(2) as pool:
            yield pool

    def test_sum(two_ranks):
        assert two_ranks.run(add_ranks) == [1, 1]       # add_ranks is a module-level function

A rank that raises fails the call with that rank's traceback; the pool is then started afresh by the next call, since
the other ranks may wait in a collective for ever.
"""

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any, Self

FORKSERVER = multiprocessing.get_context("forkserver")
# There is one such server in a process, and it imports what was named last before its first start: name all of it here.
FORKSERVER.set_forkserver_preload(
    [
        "torch",
        "torch.distributed.fsdp",
        "torch.distributed.checkpoint",
        "torch.distributed.tensor",
        "transformers.models.llama.modeling_llama",  # imported by name: the package itself loads a model only on use
        "forgather.trainers.assemble",
        "forgather.distributed.launcher",
        "forgather.diloco.worker",
        "pytest",  # which the modules of tests import
    ]
)


class RankFailure(AssertionError):
    """One rank of a call raised; the message is its traceback."""


class RankPool:
    """N processes that form one gloo process group."""

    def __init__(self, size: int, *, timeout_s: float = 120.0, threads: int = 1) -> None:
        self.size = size
        self.timeout_s = timeout_s
        self.threads = threads
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """Call `function(*args, **kwargs)` on every rank at once; return the results in order of rank."""
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((function, args, kwargs))
        results: dict[int, Any] = {}
        waiting = {pipe: rank for rank, pipe in enumerate(self._pipes)}
        while waiting:
            ready = wait(list(waiting), timeout=self.timeout_s)
            if not ready:
                self.close()
                raise RankFailure(f"ranks {sorted(waiting.values())} gave no result within {self.timeout_s:.0f} s")
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = waiting.pop(pipe)
                try:
                    ok, value = pipe.recv()
                except EOFError:
                    ok, value = False, "the process ended"
                if not ok:
                    self.close()
                    raise RankFailure(f"rank {rank} of {self.size}:\n{value}")
                results[rank] = value
        return [results[rank] for rank in range(self.size)]

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._pipes = [], []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _start(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        store = str(Path(self._folder.name) / "store")
        for rank in range(self.size):
            ours, theirs = FORKSERVER.Pipe()
            arguments = (rank, self.size, store, self.timeout_s, self.threads, theirs)
            process = FORKSERVER.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)


def _serve(rank: int, size: int, store: str, timeout_s: float, threads: int, pipe: Connection) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(threads)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(size))
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, size),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout_s),
    )
    while True:
        try:
            function, args, kwargs = pipe.recv()
        except EOFError:
            return
        try:
            result = (True, function(*args, **kwargs))
        except BaseException:
            result = (False, traceback.format_exc())
        try:
            pipe.send(result)
        except BrokenPipeError:
            return


def run_ranks(size: int, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
    """One call on ranks that live for it alone."""
    with RankPool(size) as pool:
        return pool.run(function, *args, **kwargs)
