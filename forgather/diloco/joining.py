"""How a worker comes to its server: who it says it is, and the ranks that learn together what holds there."""

import re
import secrets
import socket
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from forgather.diloco.address import ServerAddress
from forgather.diloco.client import Client, RemovedError, UnknownWorkerError, UnreachableError
from forgather.diloco.frame import ProtocolError
from forgather.diloco.membership import Backoff, Membership, require_parameters
from forgather.diloco.presence import WORKER_NAME, Register, Registered
from forgather.diloco.security import write_secret
from forgather.diloco.settings import Settings
from forgather.distributed.collectives import broadcast_object, rank
from forgather.errors import ConfigError, DistributedError, ForgatherError, StoppedError, UnavailableError

_FEW_ROUNDS = 50  # in fewer, and with this much momentum, too much of each round's way is made again in the next
_HIGH_MOMENTUM = 0.7


@dataclass
class Introduction:
    """Who a worker is. `key` is what a checkpoint had; without one it is in `key_file`, or made and put there.

    `default` is its name where none was given.
    """

    worker: str | None
    key: str = ""
    key_file: Path | None = None
    mesh: str = ""
    digests: Mapping[str, str | None] = field(default_factory=dict)
    default: str | None = None

    def request(self) -> Register:
        """What it says to the server. ConfigError for a name that cannot be one."""
        name = self.worker or self.default or default_name()
        if not WORKER_NAME.fullmatch(name):
            raise ConfigError(
                f"{name!r} is no name of a worker", fix="letters, digits, _ . and -, as --diloco-worker alpha"
            )
        stored = self._stored_key()
        key = self.key or stored or secrets.token_urlsafe(24)
        if self.key_file is not None and stored != key:
            self.key_file.unlink(missing_ok=True)
            write_secret(self.key_file, key.encode())
        return Register(name, key, host=socket.gethostname(), mesh=self.mesh, **self.digests)

    def _stored_key(self) -> str | None:
        if self.key_file is None or not self.key_file.exists():
            return None
        return self.key_file.read_text().strip() or None


def default_name(run: str = "") -> str:
    """What a worker is called that was given no name: its host, and the run, of which a host may have several."""
    name = f"{socket.gethostname()}-{run}" if run else socket.gethostname()
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-._")[:64] or "worker"


def require_name(given: str | None, saved: str) -> str:
    """The name of a worker that goes on from a checkpoint; ConfigError where it was given another.

    Its contributions are known by it, also those that are under way.
    """
    if given not in (None, saved):
        raise ConfigError(
            f"this run is the worker {saved!r}, and was now called {given!r}",
            fix=f"--diloco-worker {saved}, or leave that out; or begin as another worker, with --fresh",
        )
    return saved


def require_expected(settings: Settings, sync_every: int | None, *, is_leased: bool) -> None:
    """ConfigError where the server does otherwise than this run was told to expect."""
    if sync_every is not None and sync_every != settings.sync_every:
        raise ConfigError(
            f"the server has sync_every {settings.sync_every}, and this worker was given {sync_every}",
            fix="leave out --diloco-sync-every, or --sync-every of `diloco worker`: the server's is in force; "
            f"or start the server with --sync-every {sync_every}",
        )
    if is_leased and not settings.work_units:
        raise ConfigError(
            "this run wants its rows leased, and the server leases none",
            fix="--no-diloco-leased, and a --seed for each worker; or start the server with --work-units 1024, say",
        )


def require_welcome(
    address: ServerAddress | None, sync_every: int | None = None, *, is_leased: bool, timeout_s: float = 10.0
) -> None:
    """Ask the server, before a run has prepared anything, for what would keep it out. Collective; raised on all ranks.

    Rank 0 asks; nothing is registered. A server that is away may be there when the run is ready: that is said, and is
    no error. Without an `address` there is nothing to ask.
    """
    if address is None:
        return
    found: ForgatherError | None = None
    if rank() == 0:
        client = Client(address, "", "", timeout_s=timeout_s)
        try:
            require_expected(client.settings(), sync_every, is_leased=is_leased)
        except UnreachableError as error:
            remedy = f" ({error.fix})" if error.fix else ""
            print(f"note: {error.message}; this run asks again when it is ready{remedy}", file=sys.stderr, flush=True)
        except (UnknownWorkerError, ProtocolError) as error:
            how = "HTTP status 404" if isinstance(error, UnknownWorkerError) else error.message
            found = DistributedError(
                f"{address} does not answer as a DiLoCo server of this version does: {how}",
                fix=error.fix or "see that the port is the one that `forgather diloco server` printed",
            )
        except ForgatherError as error:
            found = error
        finally:
            client.close()
    found = broadcast_object(found)
    if found is not None:
        raise found


def describe(membership: Membership, settings: Settings) -> str:
    """One line: where the server is, who this is to it, and what it has set."""
    pace = f"every {settings.sync_every} steps"
    if settings.round_seconds is not None:
        pace = f"every {settings.round_seconds:g} s"
    elif settings.dylu:
        pace = f"every {settings.sync_every} steps or fewer, by speed"
    fragments = f"{len(settings.fragments)} fragments" if len(settings.fragments) > 1 else "all at once"
    delay = f", {settings.delay} steps late, alpha {settings.alpha:g}" if settings.delay else ""
    versions = membership.registered.versions if membership.registered else ()
    there = f", at version {max(version.number for version in versions)}" if versions else ", not reached yet"
    return (
        f"diloco: worker {membership.request.worker} of {membership.address}{there}: {settings.mode}, {pace}, "
        f"{fragments}{delay}, {settings.upload} up, {settings.download} down"
    )


def too_few_steps(registered: Registered, steps: int) -> str | None:
    """A warning where a run of so many steps has no round but one, or too few for the outer optimizer's momentum."""
    settings, momentum = registered.settings, registered.outer.get("momentum", 0.0)
    if settings.round_seconds is not None:
        return None
    rounds = steps // settings.sync_every
    if rounds >= 1:
        if rounds >= _FEW_ROUNDS or momentum < _HIGH_MOMENTUM:
            return None
        return (
            f"warning: {steps} steps are {rounds} rounds of {settings.sync_every}: with so few, an outer momentum of "
            f"{momentum:g} may leave the model worse than training alone does; at the server --outer-momentum 0.5, or "
            "plain averaging: --outer-lr 1 --outer-momentum 0"
        )
    fitting = max(len(settings.fragments), steps // 4)
    return (
        f"warning: this run makes {steps} steps, and the server has its workers exchange every {settings.sync_every}: "
        f"it does so once, after the last; with --sync-every {fitting}, say, at the server it does so on the way"
    )


def join(
    address: ServerAddress,
    introduction: Introduction,
    *,
    patience_s: float,
    may_be_away: bool,
    say: Callable[[str], None],
    trained: Mapping[str, tuple[int, ...]] | None = None,
    is_stopping: Callable[[], bool] = lambda: False,
) -> Membership:
    """Register with the server, on rank 0, and let all ranks know the answer. Collective; an error is raised on all.

    A server that stays away for `patience_s` is an UnavailableError, unless it `may_be_away`: nothing is known of it
    then. StoppedError where the run `is_stopping` meanwhile. ConfigError, naming what differs, before anything is
    registered, where the parameters of the run, `trained` with their shapes, are not the server's.
    """
    membership: Membership | None = None
    request, origin = Register("", ""), secrets.token_hex(8)
    found: Registered | ForgatherError | None = None
    if rank() == 0:
        try:
            request = introduction.request()
            membership = Membership(address, request, origin)
            found = _reach(membership, patience_s, may_be_away, say, trained, is_stopping)
        except ForgatherError as error:
            found = error
            if membership is not None:
                membership.close()
    request, origin, found = broadcast_object((request, origin, found))
    if isinstance(found, ForgatherError):
        raise found
    if membership is None:
        membership = Membership(address, request, origin)
        membership.registered = found
    return membership


def _reach(
    membership: Membership,
    patience_s: float,
    may_be_away: bool,
    say: Callable[[str], None],
    trained: Mapping[str, tuple[int, ...]] | None,
    is_stopping: Callable[[], bool],
) -> Registered | None:
    client = membership.borrow()
    backoff, begun = Backoff(), time.monotonic()
    has_said = False
    try:
        while True:
            try:
                if trained is not None:
                    require_parameters(client.settings(), trained)
                return membership.register(client)
            except RemovedError:
                raise
            except UnreachableError as error:
                if is_stopping():
                    raise StoppedError(
                        f"the run was told to stop before it had reached {membership.address}"
                    ) from error
                if time.monotonic() - begun > patience_s:
                    if may_be_away:
                        say(f"warning: {error.message}; going on without it until it is there")
                        return None
                    raise UnavailableError(
                        f"the server cannot be reached: {error.message}",
                        fix=error.fix
                        or "see that `forgather diloco server` runs there, and that the address is the one that it "
                        "printed",
                    ) from error
                if not has_said:
                    say(f"{error.message}; trying again for {patience_s:g} s")
                    has_said = True
            time.sleep(backoff.next_s())
    finally:
        membership.give_back(client)
