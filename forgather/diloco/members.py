"""Who takes part: workers with their keys, and leases that heartbeats renew.

A worker is known by its name, and proves with its key that it is the one that came under that name. While it lives,
another key is refused; when it is gone, whoever comes next may have the name, and is another worker.

Nothing here waits or knows a network: time is given by `clock`, in seconds.
"""

import hashlib
import hmac
import math
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any, Literal

from forgather.diloco.frame import ProtocolError
from forgather.diloco.presence import STRENGTH, Beat, Command, Heartbeat, Register

_SILENCE_S = 30.0  # after which a process that was removed has ended, where leases do not run out
_MOST = 200  # letters of what a worker says of itself


@dataclass
class Member:
    """One worker, as far as the server knows it."""

    name: str
    key_digest: str  # the key itself is nobody's business, the disk's neither
    host: str = ""
    mesh: str = ""
    state: Literal["live", "dead", "left", "kicked"] = "live"
    is_present: bool = True  # False: known from before the server was started again, and not heard of since
    renewed_at: float = 0.0
    steps: int = 0
    steps_per_s: float | None = None
    tokens_per_s: float | None = None
    loss: float | None = None
    num_counted: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    command: Command | None = None  # what it is told until it says that it has heard that
    command_number: int = 0  # of the last one; no two have the same, of two processes of the server neither

    @property
    def is_live(self) -> bool:
        return self.state == "live"

    def hears(self, heard: int | None) -> Command | None:
        """What the answer to a heartbeat tells it; `heard` is the number that the heartbeat has."""
        if heard == self.command_number:
            self.command = None
        command = self.command
        if heard is None:
            self.command = None
        return command

    def has_key(self, key: str) -> bool:
        """Whether it is this worker's key; takes as long for a wrong one."""
        return hmac.compare_digest(self.key_digest, digest_of_key(key))


class Members:
    """All workers that ever came. With `lease_s` 0 nobody is taken for dead."""

    def __init__(self, lease_s: float, clock: Callable[[], float]) -> None:
        self.lease_s = lease_s
        self._clock = clock
        self._by_name: dict[str, Member] = {}
        self._begun_at = clock()
        # Not from 1 on: a worker that outlives this process would take a command for one that it has heard before.
        self._command_numbers = count(1 + secrets.randbelow(2**40))

    def __iter__(self) -> Iterator[Member]:
        return iter(self._by_name.values())

    def __contains__(self, name: str) -> bool:
        return name in self._by_name

    def __getitem__(self, name: str) -> Member:
        return self._by_name[name]

    def get(self, name: str) -> Member | None:
        return self._by_name.get(name)

    def live(self) -> list[Member]:
        """Those whose lease runs, by name."""
        return sorted((member for member in self if member.is_live), key=lambda member: member.name)

    def is_live(self, name: str) -> bool:
        return name in self._by_name and self._by_name[name].is_live

    def may_come(self, name: str) -> bool:
        """Whether a worker lives, or may: one of which nothing was saved has as long to come as a lease."""
        return self.is_live(name) if name in self._by_name else self.expects_unknown

    @property
    def expects_unknown(self) -> bool:
        """Whether workers may still come that were here before, and of which nothing was saved."""
        return self._clock() - self._begun_at <= self._silence_s

    def register(self, request: Register) -> Literal["new", "another", "back", "again"]:
        """Take a worker in; says whether it is `new`, `another` under a name that is free, `back`, or here `again`.

        ProtocolError (409) where a live worker has the name and another key; 410 where the operator has removed it.
        """
        there = self._by_name.get(request.worker)
        if there is not None and there.state == "kicked" and self._clock() - there.renewed_at > self._silence_s:
            there.state = "left"  # that process has ended, told or not
        if there is None:
            outcome: Literal["new", "another", "back", "again"] = "new"
        elif there.has_key(request.key):
            if there.state == "kicked":
                raise _removed(request.worker)
            outcome = "again" if there.is_live else "back"
        elif there.is_live:
            raise ProtocolError(
                f"there is a live worker {request.worker!r} with another key",
                status=409,
                fix=f"give this one another name, or wait {self.lease_s:g} s if the other was killed"
                if self.lease_s
                else "give this one another name, or let the operator remove the other: forgather diloco control kick",
            )
        else:
            outcome = "another"
        if there is None or outcome == "another":
            there = Member(request.worker, digest_of_key(request.key))
            self._by_name[request.worker] = there
        there.host, there.mesh = _printable(request.host), _printable(request.mesh)
        there.state, there.is_present, there.renewed_at = "live", True, self._clock()
        return outcome

    def is_expected_back(self, request: Register) -> bool:
        """Whether it is a worker that lives, or has not been heard of for a while: not a new one, nor one that left."""
        there = self._by_name.get(request.worker)
        return there is not None and there.state in ("live", "dead") and there.has_key(request.key)

    def require(self, name: str, key: str) -> Member:
        """The live worker of that name; its lease is renewed.

        ProtocolError 404 for an unknown one, 403 for its key, 410 for one that the operator has removed.
        """
        member = self._by_name.get(name)
        if member is not None and member.state == "kicked" and member.has_key(key):
            raise _removed(name)
        if member is None or not member.is_live or not member.is_present:
            raise ProtocolError(f"there is no worker {name!r} here", status=404, fix="register, and go on")
        if not member.has_key(key):
            raise ProtocolError(f"this is not the key of {name}", status=403, fix="give each worker its own name")
        member.renewed_at = self._clock()
        return member

    def beat(self, name: str, key: str, heartbeat: Heartbeat, sync_every: Callable[[Member], int]) -> Beat:
        """Note how a worker is doing, and tell it what to do."""
        kicked = self._by_name.get(name)
        if kicked is not None and kicked.state == "kicked" and kicked.has_key(key):
            # As long as its process lives: one that was told is ending, and is no worker that has come back.
            kicked.renewed_at = self._clock()
            if not kicked.command_number:  # it was removed before this server was started again
                self.tell(kicked, "stop")
            return Beat(sync_every(kicked), "stop", kicked.command_number)
        member = self.require(name, key)
        member.steps, member.loss = heartbeat.steps, _finite(heartbeat.loss)
        # One that has made no step since the last, as it waits for others, is no slower for that.
        member.steps_per_s = _finite(heartbeat.steps_per_s) or member.steps_per_s
        member.tokens_per_s = _finite(heartbeat.tokens_per_s) or member.tokens_per_s
        command = member.hears(heartbeat.heard)
        return Beat(sync_every(member), command, member.command_number if command is not None else 0)

    def leave(self, name: str, key: str) -> bool:
        """A worker goes; says whether it was one. One that was removed has ended then, and may come back."""
        there = self._by_name.get(name)
        if there is not None and there.state == "kicked" and there.has_key(key):
            there.state = "left"
            return False
        self.require(name, key)
        self.remove(name, "left")
        return True

    def expire(self) -> list[str]:
        """The workers whose lease has just run out; each is told once."""
        if not self.lease_s:
            return []
        gone = [member for member in self if member.is_live and self._clock() - member.renewed_at > self.lease_s]
        for member in gone:
            member.state = "dead"
        return [member.name for member in gone]

    def remove(self, name: str, state: Literal["left", "kicked"]) -> None:
        """Let a worker be no member any more; ProtocolError (404) where there is none of that name."""
        if name not in self._by_name:
            raise ProtocolError(f"there is no worker {name!r} here", status=404, fix="see forgather diloco status")
        there = self._by_name[name]
        there.state, there.command = state, None
        if state == "kicked":
            self.tell(there, "stop")

    def command(self, name: str | None, command: Command) -> list[str]:
        """Leave a command for a worker's next heartbeat, or for those of all; returns whom it will reach."""
        if name is not None and not self.is_live(name):
            raise ProtocolError(f"there is no live worker {name!r}", status=404, fix="see forgather diloco status")
        reached = self.live() if name is None else [self[name]]
        for member in reached:
            self.tell(member, command)
        return [member.name for member in reached]

    def tell(self, member: Member, command: Command) -> None:
        """Have a worker hear this, unless what it has not heard yet is stronger."""
        member.command = max(member.command, command, key=STRENGTH.index)
        member.command_number = next(self._command_numbers)

    @property
    def _silence_s(self) -> float:
        return self.lease_s or _SILENCE_S

    def with_key(self, key: str) -> Member | None:
        """The worker that has this key."""
        digest = digest_of_key(key)
        return next((member for member in self if member.key_digest == digest), None)

    def state_dict(self) -> dict[str, Any]:
        """What must survive the server: who has which name, and how often each was counted."""
        return {
            member.name: {
                "key": member.key_digest,
                "host": member.host,
                "mesh": member.mesh,
                "state": member.state,
                "steps": member.steps,
                "counted": member.num_counted,
            }
            for member in self
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up where a server stopped: the leases of those who lived begin anew, and they are to register again."""
        self._by_name = {
            name: Member(
                name,
                stored["key"],
                stored["host"],
                stored["mesh"],
                stored["state"],
                is_present=False,
                renewed_at=self._clock(),
                steps=stored["steps"],
                num_counted=stored["counted"],
            )
            for name, stored in state.items()
        }


def digest_of_key(key: str) -> str:
    """What is kept of a key."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def _removed(name: str) -> ProtocolError:
    return ProtocolError(
        f"the worker {name} was removed by the operator",
        status=410,
        fix="when its process has ended, the same command lets it come back",
    )


def _printable(text: str) -> str:
    """What can stand in a log and on a page."""
    return "".join(letter for letter in text[:_MOST] if letter.isprintable())


def _finite(number: float | None) -> float | None:
    """A measurement, if it is one."""
    return number if number is not None and math.isfinite(number) else None
