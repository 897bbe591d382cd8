"""How workers come and live: plain data with JSON forms, checked on arrival."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, Self

from forgather.diloco.frame import ProtocolError, shown
from forgather.diloco.messages import Version
from forgather.diloco.settings import Settings

WORKER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")

# What a server tells a worker: to save; to save and end, keeping what it has not sent; to send that, and then save and
# end; to end at once.
Command = Literal["save", "stop", "drain", "abort"]
STRENGTH: Sequence[Command | None] = (None, "save", "drain", "stop", "abort")  # a later one outdoes those before it


@dataclass(frozen=True)
class Register:
    """A worker comes, or comes back. `key` is known to that worker alone: another with its name is refused."""

    worker: str
    key: str
    host: str = ""
    mesh: str = ""
    package: str | None = None
    tokenizer: str | None = None
    data: str | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Any) -> Self:
        texts = {each.name: value.get(each.name) for each in fields(cls)} if isinstance(value, dict) else {}
        optional = ("package", "tokenizer", "data")
        for name, text in texts.items():
            if not isinstance(text, str) and not (name in optional and text is None):
                raise ProtocolError(f"a registration says {name}: {shown(text)}, which is no text")
        if not texts or not WORKER_NAME.fullmatch(texts["worker"] or "") or len(texts["key"] or "") < 16:
            raise ProtocolError("a registration needs a worker's name (letters, digits, _ . -) and its key")
        return cls(**texts)  # type: ignore[arg-type]  # each was looked at above


@dataclass(frozen=True)
class Registered:
    """The answer: the settings, and the version of each fragment that a worker without values begins with.

    `server` names the process that answers: another one does not have what this one held in its memory. `outer` are
    the rates of its outer optimizer, as far as it has such.
    """

    settings: Settings
    versions: Sequence[Version]
    server: str = ""
    outer: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "settings": self.settings.to_json(),
            "versions": [version.to_json() for version in self.versions],
            "server": self.server,
            "outer": dict(self.outer),
        }

    @classmethod
    def from_json(cls, value: Any) -> Self:
        versions = [Version.from_json(each) for each in value["versions"]]
        return cls(Settings.from_json(value["settings"]), versions, str(value["server"]), value["outer"])


@dataclass(frozen=True)
class Heartbeat:
    """A worker lives, and how it is doing.

    `heard` is the number of the last command that it has heard, 0 for none. One that does not say is told each command
    once, whether the answer reaches it or not.
    """

    steps: int
    steps_per_s: float | None = None
    tokens_per_s: float | None = None
    loss: float | None = None
    heard: int | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Any) -> Self:
        if not isinstance(value, dict) or not isinstance(value.get("steps"), int):
            raise ProtocolError("a heartbeat says how many steps were made")
        numbers = {}
        for name in ("steps_per_s", "tokens_per_s", "loss"):
            number = value.get(name)
            numbers[name] = float(number) if isinstance(number, int | float) else None
        heard = value.get("heard")
        return cls(value["steps"], **numbers, heard=heard if isinstance(heard, int) else None)


@dataclass(frozen=True)
class Beat:
    """The answer: what the worker is to do, and how many inner steps it makes to an exchange.

    A command is told again until a heartbeat says that its `number` was heard.
    """

    sync_every: int
    command: Command | None = None
    number: int = 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
