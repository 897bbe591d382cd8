"""A server and its workers as processes that can be killed, stopped and started again.

They are forked from the server of tests/ranks.py, so one starts in well under a second. Each worker reaches the server
through a proxy of its own, at an address that stays when the server is started again. A worker trains a small model on
numbers that depend on its name and the step alone, so whoever made the same steps has the same bits.
"""

import asyncio
import ctypes
import os
import signal
import threading
import time
import traceback
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import xxhash
from torch import nn

from forgather.checkpoint import commit
from forgather.checkpoint.run_folder import RunFolder
from forgather.checkpoint.state import TrainState
from forgather.checkpoint.storage import raw_bytes
from forgather.checkpoint.store import CheckpointStore
from forgather.diloco.address import parse_address
from forgather.diloco.application import serving
from forgather.diloco.coordinator import Coordinator
from forgather.diloco.outer import Nesterov
from forgather.diloco.settings import Settings
from forgather.diloco.worker import DiLoCo
from tests.proxy import Proxy
from tests.ranks import FORKSERVER

TOKEN = "token-of-the-tests"
WIDTH = 256  # 66,000 parameters: three blocks of the proxy in bf16
PATIENCE_S = 30.0  # of a test that waits for something to happen


def make_model() -> nn.Module:
    """The model that all machines begin with."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 1))


def parameters_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def digest_of(values: Mapping[str, torch.Tensor]) -> str:
    digest = xxhash.xxh3_64()
    for name in sorted(values):
        digest.update(raw_bytes(values[name].contiguous()))
    return digest.hexdigest()


@dataclass
class ServerPlan:
    """How a server is started. `dies` kills it at a moment: (where, at the which-th time).

    With `log`, what it says goes to that file.
    """

    folder: Path
    port: int = 0
    host: str = "127.0.0.1"
    num_workers: int = 2
    settings: Mapping[str, Any] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    dies: tuple[str, int] | None = None
    log: Path | None = None


@dataclass
class WorkerPlan:
    """How a worker is started: `steps` steps, its state kept in `folder` after every `save_every` of them."""

    name: str
    server: str
    folder: Path
    steps: int = 8
    save_every: int = 1
    pause_s: float = 0.0  # after each step
    arguments: Mapping[str, Any] = field(default_factory=dict)
    nan_at: int | None = None
    stays_s: float = 0.0  # after its last step


class Child:
    """A forked process that reports events, and ends with the test."""

    def __init__(self, target: Any, plan: Any) -> None:
        self.pipe, theirs = FORKSERVER.Pipe()
        self.process = FORKSERVER.Process(target=_run, args=(target, plan, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self.seen: list[tuple[Any, ...]] = []

    def wait_for(self, kind: str, value: Any = None, timeout_s: float = PATIENCE_S) -> tuple[Any, ...]:
        """The next event of this kind, with this value where one is given. AssertionError where it will not come."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            try:
                if not self.pipe.poll(deadline - time.monotonic()):
                    break
                event = self.pipe.recv()
            except (EOFError, ConnectionResetError):
                raise AssertionError(f"ended before {kind} {value}; last: {str(self.seen[-1:])[:500]}") from None
            self.seen.append(event)
            if event[0] == kind and (value is None or event[1] == value):
                return tuple(event)
            assert event[0] != "failed" or kind == "failed", event[1]
        raise AssertionError(f"no {kind} {value} within {timeout_s:.0f} s; last: {str(self.seen[-1:])[:500]}")

    def ask(self, *question: Any) -> Any:
        try:
            self.pipe.send(question)
        except OSError:
            raise AssertionError(f"it has ended, with {self.join(1.0)}, and cannot say its {question[0]}") from None
        return self.wait_for(question[0])[1]

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    def stop(self) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGCONT)

    def join(self, timeout_s: float = PATIENCE_S) -> int | None:
        self.process.join(timeout_s)
        return self.process.exitcode

    def close(self) -> None:
        self.kill()
        self.pipe.close()


class World:
    """A server, its workers, and the network between them, in `folder`; everything ends with the block."""

    def __init__(self, folder: Path, **plan: Any) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        settings = {"sync_every": 2, "heartbeat_s": 0.2, "lease_s": 60.0} | dict(plan.pop("settings", {}))
        self.plan = ServerPlan(folder / "server", settings=settings, **plan)
        self.server: Child | None = None
        self.port = 0
        self.proxies: dict[str, Proxy] = {}
        self._children: list[Child] = []
        self._open = ExitStack()

    def start_server(self, **changes: Any) -> Child:
        """Start the server, or start it again; all workers reach it where they reached it before."""
        plan = ServerPlan(**{**self.plan.__dict__, "port": self.port, **changes})
        self.server = Child(_serve, plan)
        self._children.append(self.server)
        self.port = self.server.wait_for("port")[1]
        for proxy in self.proxies.values():
            proxy.target = ("127.0.0.1", self.port)
        return self.server

    def proxy(self, name: str) -> Proxy:
        """The network of a worker."""
        if name not in self.proxies:
            self.proxies[name] = self._open.enter_context(Proxy(("127.0.0.1", self.port)))
        return self.proxies[name]

    def start_worker(self, name: str, folder: str | None = None, **changes: Any) -> Child:
        """Start a worker, which goes on from its folder where it has been before."""
        plan = WorkerPlan(name, self.proxy(name).address, self.folder / (folder or name), **changes)
        child = Child(_work, plan)
        self._children.append(child)
        return child

    def status(self) -> dict[str, Any]:
        assert self.server is not None
        return dict(self.server.ask("status"))

    def digest(self) -> str:
        """Of the values that the server gives out."""
        assert self.server is not None
        return str(self.server.ask("digest"))

    def wait_for_version(self, number: int, timeout_s: float = PATIENCE_S) -> None:
        deadline = time.monotonic() + timeout_s
        while min(self.status()["versions"]) < number:
            assert time.monotonic() < deadline, f"no version {number}: {self.status()}"
            time.sleep(0.02)

    def __enter__(self) -> Self:
        self.start_server()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        for child in self._children:
            child.close()
        self._open.close()


def _run(target: Any, plan: Any, pipe: Connection) -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: not longer than the test
    torch.set_num_threads(1)
    try:
        target(plan, pipe)
    except Exception as error:  # noqa: BLE001  the test is told, whatever it is
        traceback.print_exc()
        pipe.send(("failed", f"{type(error).__name__}: {error}"))


def _serve(plan: ServerPlan, pipe: Connection) -> None:
    values = parameters_of(make_model())
    settings = Settings({name: tuple(value.shape) for name, value in values.items()}, [list(values)])
    fragments = plan.settings.get("fragments", settings.fragments)
    settings = Settings(**{**settings.__dict__, **plan.settings, "fragments": fragments})
    if plan.dies is not None:
        _die(*plan.dies)
    if plan.log is not None:
        descriptor = os.open(plan.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(descriptor, 2)

    async def run(folder: RunFolder) -> None:
        coordinator = Coordinator(
            values, settings, Nesterov(lr=0.7, momentum=0.9), folder, num_workers=plan.num_workers, **plan.arguments
        )
        async with serving(coordinator, TOKEN, plan.host, plan.port) as (_, port):
            pipe.send(("port", port))
            loop = asyncio.get_running_loop()
            threading.Thread(target=_answer, args=(coordinator, loop, pipe), daemon=True).start()
            await coordinator.stopped.wait()

    with RunFolder(plan.folder) as folder:
        asyncio.run(run(folder))
    pipe.send(("stopped",))


def _answer(coordinator: Coordinator, loop: asyncio.AbstractEventLoop, pipe: Connection) -> None:
    """Answers the test's questions, on the server's own thread."""

    async def say(question: str) -> None:
        published = {name: value for each in coordinator.fragments for name, value in each.published.items()}
        match question:
            case "status":
                pipe.send((question, coordinator.status()))
            case "digest":
                pipe.send((question, digest_of(published)))
            case "shutdown":
                coordinator.shutdown()

    while True:
        try:
            (question,) = pipe.recv()
        except (EOFError, OSError):
            os._exit(1)
        asyncio.run_coroutine_threadsafe(say(question), loop).result()


def _die(where: str, time_: int) -> None:
    """Let this process be killed the `time_`-th time that it comes to a place."""
    remaining = time_

    def counted(function: Any, *, before: bool) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal remaining
            remaining -= 1
            if before and remaining <= 0:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*args, **kwargs)
            if remaining <= 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    match where:
        case "before saving":
            CheckpointStore.save = counted(CheckpointStore.save, before=True)  # type: ignore[method-assign]
        case "while saving":  # everything is written, and has not its name yet
            commit.publish = counted(commit.publish, before=True)
        case "after saving":  # and nobody has been told
            CheckpointStore.save = counted(CheckpointStore.save, before=False)  # type: ignore[method-assign]
        case _:
            raise AssertionError(where)


def _work(plan: WorkerPlan, pipe: Connection) -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    diloco = DiLoCo(
        model,
        optimizer,
        parse_address(plan.server, token=TOKEN),
        plan.name,
        tokens_per_step=16,
        key_file=plan.folder / "key",
        **{"patience_s": 60.0, **plan.arguments},
    )
    state = TrainState(model, optimizer, {"diloco": diloco})
    with RunFolder(plan.folder) as folder:
        store = CheckpointStore(folder, asynchronous=False)
        newest = store.resume(state)
        done = 0 if newest is None else newest.step
        with diloco:
            pipe.send(("begun", done))
            for step in range(done, plan.steps):
                optimizer.zero_grad()
                loss = _loss(model, plan.name, step)
                loss.backward()
                if step == plan.nan_at:
                    next(model.parameters()).grad.fill_(float("nan"))  # type: ignore[union-attr]
                optimizer.step()
                if (step + 1) % plan.save_every == 0:
                    store.save(state, step + 1)
                pipe.send(("step", step + 1))
                time.sleep(plan.pause_s)
            pipe.send(("values", digest_of(parameters_of(model))))
            time.sleep(plan.stays_s)
        store.close()
    pipe.send(("ended", digest_of(parameters_of(model))))


def _loss(model: nn.Module, name: str, step: int) -> torch.Tensor:
    """The loss on numbers that are this worker's own, and the same whenever the step is made."""
    generator = torch.Generator().manual_seed(xxhash.xxh3_64_intdigest(f"{name} {step}".encode()) % 2**62)
    inputs = torch.randn(16, WIDTH, generator=generator)
    return (model(inputs) - inputs.sum(1, keepdim=True).sin()).square().mean()
