"""This worker's place at the server: it registers, registers again where it was forgotten, and lives by heartbeats."""

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from forgather.diloco.address import ServerAddress
from forgather.diloco.client import CONNECT_S, Client, RemovedError, UnknownWorkerError, UnreachableError
from forgather.diloco.presence import Beat, Heartbeat, Register, Registered
from forgather.diloco.settings import Settings
from forgather.errors import ConfigError, ForgatherError, TrainingError

# What a server that was started again may have changed without changing what its workers do.
_MAY_CHANGE = ("sync_every", "heartbeat_s", "lease_s", "package", "tokenizer", "data", "round_seconds", "dylu")
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 2.0
_IDLE_S = 30.0


class Backoff:
    """Pauses that double, up to 2 s, so that a server that is away is not asked all the time."""

    def __init__(self) -> None:
        self._next_s = _FIRST_PAUSE_S

    def next_s(self) -> float:
        pause, self._next_s = self._next_s, min(_LONGEST_PAUSE_S, 2 * self._next_s)
        return pause

    def reset(self) -> None:
        self._next_s = _FIRST_PAUSE_S


class Membership:
    """One worker at one server, for all threads of this process. `times` is how often this process has registered.

    `origin` names this start of the worker's processes, the same on all ranks.
    """

    def __init__(self, address: ServerAddress, request: Register, origin: str = "") -> None:
        self.address = address
        self.request = request
        self.origin = origin
        self.times = 0
        self.is_removed = False  # the operator wants it to end
        self.registered: Registered | None = None
        self.settings: Settings | None = None  # under which the worker began; those of the server must go with them
        self._lock = threading.Lock()  # of registering, which takes a while
        self._clients: list[Client] = []
        self._free: list[tuple[float, Client]] = []
        self._free_lock = threading.Lock()
        self._is_closed = False

    @property
    def server(self) -> str:
        """The process at the address that has registered this worker, by the name that it has given itself."""
        return "" if self.registered is None else self.registered.server

    def borrow(self) -> Client:
        """A connection that nobody else uses until it is given back."""
        with self._free_lock:
            if not self._free:
                client = Client(self.address, self.request.worker, self.request.key)
                self._clients.append(client)
                return client
            used_at, client = self._free.pop()
        if time.monotonic() - used_at > _IDLE_S:
            client.close()  # the server has done so, or soon will
        return client

    def give_back(self, client: Client) -> None:
        """Let others use it."""
        with self._free_lock:
            if not client.is_aborted and not self._is_closed:
                self._free.append((time.monotonic(), client))
                return
        client.close()

    def note(self, error: UnreachableError) -> None:
        """Something of this worker was not answered so."""
        self.is_removed = self.is_removed or isinstance(error, RemovedError)

    def traffic(self) -> tuple[int, int]:
        """Bytes of bodies that this process has sent to the server, and received from it."""
        with self._free_lock:
            clients = list(self._clients)
        return sum(each.bytes_up for each in clients), sum(each.bytes_down for each in clients)

    def close(self) -> None:
        """Close the connections: those that nobody uses now, the others when they are given back."""
        with self._free_lock:
            self._is_closed = True
            for _, client in self._free:
                client.close()
            self._free.clear()

    def register(self, client: Client, known: int | None = None) -> Registered:
        """Register, unless another thread has done so since `times` was `known`; the server's answer.

        TrainingError when what all machines agree on is not what it was.
        """
        with self._lock:
            if known is not None and known != self.times and self.registered is not None:
                return self.registered
            registered = client.register(self.request)
            if self.settings is not None:
                require_same(self.settings, registered.settings)
            self.times += 1
            self.registered = registered
            return registered


def require_same(before: Settings, now: Settings) -> None:
    """TrainingError, naming what differs, unless a worker can go on under the settings of `now`."""
    if before.training and before.training != now.training:
        raise TrainingError(
            "this run was a worker of another training than the server's: it has other values, and other rounds",
            fix="start the server on the folder that it had (-o); or begin as a new worker of this one, with --fresh",
        )
    old, new = _agreed(before), _agreed(now)
    differing = [name for name in old if old[name] != new.get(name)]
    if differing:
        raise TrainingError(
            f"the server has other settings than before: {', '.join(_shown(name, old, new) for name in differing)}",
            fix="start the server as it was; or end this worker, and start another with --fresh",
        )


def _agreed(settings: Settings) -> dict[str, Any]:
    # `training` is looked at by itself.
    return {name: value for name, value in settings.to_json().items() if name not in (*_MAY_CHANGE, "training")}


def _shown(name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    return name if name in ("parameters", "fragments") else f"{name} {old[name]} -> {new.get(name)}"


def require_parameters(settings: Settings, trained: Mapping[str, tuple[int, ...]]) -> None:
    """ConfigError, naming both sides, unless the run trains what the server has."""
    there = {name: tuple(shape) for name, shape in settings.parameters.items()}
    problems = [
        *_listed("only on the server", [name for name in there if name not in trained]),
        *_listed("only in this run", [name for name in trained if name not in there]),
        *_listed(
            "of another shape",
            [
                f"{name} ({list(there[name])} on the server, {list(shape)} here)"
                for name, shape in trained.items()
                if name in there and there[name] != shape
            ],
        ),
    ]
    if problems:
        raise ConfigError(
            f"the server has other parameters than this run trains: {'; '.join(problems)}",
            fix="train the model that the server was started with: `forgather diloco server -m` names it",
        )


def _listed(title: str, names: list[str], most: int = 5) -> list[str]:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return [f"{title}: {', '.join(names[:most])}{more}"] if names else []


class Heartbeats:
    """Tells the server every `every_s` seconds how the worker is doing, in a thread of its own, until it is closed.

    `tell` gives what to say, `hear` is called with each answer. `away_s` says for how long the server was not reached.
    """

    def __init__(
        self, membership: Membership, every_s: float, tell: Callable[[], Heartbeat], hear: Callable[[Beat], None]
    ) -> None:
        self.membership = membership
        self.failure: ForgatherError | None = None
        self._every_s = every_s
        self._tell = tell
        self._hear = hear
        self._closed = threading.Event()
        self._client = membership.borrow()
        self._lost_at: float | None = None
        self._thread = threading.Thread(target=self._run, name="diloco heartbeats", daemon=True)
        self._thread.start()

    @property
    def away_s(self) -> float:
        lost_at = self._lost_at
        return 0.0 if lost_at is None else time.monotonic() - lost_at

    def close(self) -> None:
        self._closed.set()
        self._client.abort()
        self._thread.join(CONNECT_S + 1)
        self._client.close()

    def _run(self) -> None:
        pause_s, heard = self._every_s, 0
        while not self._closed.wait(pause_s):
            pause_s = self._every_s
            known = self.membership.times
            try:
                try:
                    beat = self._client.heartbeat(self._tell())
                except UnknownWorkerError:
                    self.membership.register(self._client, known)
                    continue
            except UnreachableError as error:
                self.membership.note(error)
                self._lost_at = self._lost_at or time.monotonic()
                continue
            except ForgatherError as error:
                self.failure = error  # raised by the training thread, on all ranks
                return
            self._lost_at = None
            self._hear(beat)
            if beat.command is not None and beat.number != heard:
                heard = beat.number
                pause_s = 0.0  # what was heard is told at once: a process that is to end may not live to the next one
