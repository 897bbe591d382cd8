"""How a worker comes to its server: who it says it is, and the ranks that learn together what holds there."""

import re
import secrets
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from forgather.diloco.address import ServerAddress
from forgather.diloco.client import UnreachableError
from forgather.diloco.membership import Backoff, Membership
from forgather.diloco.messages import WORKER_NAME, Register, Registered
from forgather.diloco.security import write_secret
from forgather.distributed.collectives import broadcast_object, rank
from forgather.errors import ConfigError, DistributedError, ForgatherError


@dataclass
class Introduction:
    """Who a worker is. `key` is what a checkpoint had; without one it is in `key_file`, or made and put there."""

    worker: str | None
    key: str = ""
    key_file: Path | None = None
    mesh: str = ""
    digests: Mapping[str, str | None] = field(default_factory=dict)

    def request(self) -> Register:
        """What it says to the server. ConfigError for a name that cannot be one."""
        name = self.worker or default_name()
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


def join(
    address: ServerAddress,
    introduction: Introduction,
    *,
    patience_s: float,
    may_be_away: bool,
    say: Callable[[str], None],
) -> Membership:
    """Register with the server, on rank 0, and let all ranks know the answer. Collective; an error is raised on all.

    A server that stays away for `patience_s` is an error, unless it `may_be_away`: nothing is known of it then.
    """
    membership: Membership | None = None
    request = Register("", "")
    found: Registered | ForgatherError | None = None
    if rank() == 0:
        try:
            request = introduction.request()
            membership = Membership(address, request)
            found = _reach(membership, patience_s, may_be_away, say)
        except ForgatherError as error:
            found = error
    request, found = broadcast_object((request, found))
    if isinstance(found, ForgatherError):
        raise found
    if membership is None:
        membership = Membership(address, request)
        membership.registered = found
    return membership


def _reach(
    membership: Membership, patience_s: float, may_be_away: bool, say: Callable[[str], None]
) -> Registered | None:
    client = membership.borrow()
    backoff, begun = Backoff(), time.monotonic()
    try:
        while True:
            try:
                return membership.register(client)
            except UnreachableError as error:
                if time.monotonic() - begun > patience_s:
                    if may_be_away:
                        say(f"warning: {error.message}; going on without it until it is there")
                        return None
                    raise DistributedError(
                        f"the server cannot be reached: {error.message}",
                        fix="see that `forgather diloco server` runs there, and that the address is the one "
                        "that it printed",
                    ) from error
            time.sleep(backoff.next_s())
    finally:
        membership.give_back(client)
