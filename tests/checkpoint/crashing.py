"""A process that trains and saves as if it would live for ever, for tests that kill it.

It starts from a server that has imported everything, so a start costs 0.2 s. It reports one line an event:

    resumed STEP HASH        what it found and took; STEP 0 is a new run
    saving STEP / saved STEP
    done HASH
"""

import os
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.ranks import FORKSERVER

HIDDEN = 128


class Victim:
    """The process, and the lines that it has reported so far."""

    def __init__(self, folder: Path, steps: int, *, die_at: str | None = None, asynchronous: bool = False) -> None:
        self.lines: list[str] = []
        self._ours, theirs = FORKSERVER.Pipe()
        self.errors = folder.with_name("stderr.log")
        self._process = FORKSERVER.Process(
            target=_train, args=(str(folder), steps, theirs, str(self.errors), die_at, asynchronous)
        )
        self._process.start()
        self.pid = self._process.pid
        theirs.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.kill()

    def wait_for(self, start: str, timeout_s: float = 60.0) -> str | None:
        """The next line that begins with `start`; None when the process has ended before."""
        while True:
            if not self._ours.poll(timeout_s):
                raise AssertionError(f"no {start!r} within {timeout_s} s; so far: {self.lines}")
            try:
                self.lines.append(self._ours.recv())
            except EOFError:
                return None
            if self.lines[-1].startswith(start):
                return self.lines[-1]

    def kill(self) -> None:
        """As `kill -9` does."""
        self._process.kill()
        self._process.join()

    def join(self) -> int | None:
        self._process.join(60)
        return self._process.exitcode


def _train(folder: str, steps: int, pipe: Connection, errors: str, die_at: str | None, asynchronous: bool) -> None:
    import torch

    from tests.checkpoint.training import Run, open_store

    torch.set_num_threads(1)
    sys.stderr = Path(errors).open("a", buffering=1)  # noqa: SIM115 - for the life of the process
    run = Run(hidden=HIDDEN)
    store = open_store(Path(folder), asynchronous=asynchronous)
    checkpoint = store.resume(run.state)
    step = 0 if checkpoint is None else checkpoint.step
    pipe.send(f"resumed {step} {run.hash()}")
    if die_at is not None:
        _arm(die_at)
    while step < steps:
        run.step()
        step += 1
        if step % 2 == 0:
            pipe.send(f"saving {step}")
            store.save(run.state, step)
            pipe.send(f"saved {step}")
    store.finish()
    pipe.send(f"done {run.hash()}")


def _arm(place: str) -> None:
    """Let the process kill itself just before it does what `place` names, while it saves."""
    from forgather import durable
    from forgather.checkpoint import background, commit, folder
    from forgather.checkpoint.manifest import Manifest

    def instead(owner: Any, name: str, when: Callable[..., bool]) -> None:
        original = getattr(owner, name)

        def die_or_do(*args: Any, **kwargs: Any) -> Any:
            if when(*args, **kwargs):
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(owner, name, die_or_do)

    match place:
        case "tensors":
            instead(background, "raw_bytes", lambda *_: True)
        case "record":
            instead(Path, "rename", lambda self, target: Path(target).suffix == ".done")
        case "layout":
            instead(commit, "write_layout", lambda *_, **__: True)
        case "manifest":
            instead(Manifest, "write", lambda *_: True)
        case "sync":
            instead(durable, "sync", lambda path: path.name == "manifest.json")
        case "rename":
            instead(Path, "rename", lambda self, target: self.name.endswith(".partial"))
        case "retention":
            instead(commit, "remove", lambda path: not path.name.startswith("."))
        case "removal":
            instead(folder.shutil, "rmtree", lambda path: Path(path).name.endswith(".removed"))
        case _:
            raise ValueError(place)
