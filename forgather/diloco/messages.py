"""What server and workers say to one another: plain data with JSON forms, checked on arrival, and the frame of a body.

A *fragment* is a group of parameters that is exchanged as one. Its *version* is how many outer steps were made on it;
round r of a fragment is the one that makes version r + 1 of version r. A *lineage* names the values of a version: it is
a digest of all contributions that made them, so that two versions of one number are never taken for each other.

A body with tensors is

    4 bytes     length of the header, big-endian
    header      JSON in UTF-8
    payload     the slices that the header lists, one after the other, each as its codec encodes it
    digests     8 bytes each: of the payload, to the server; of the values that each slice leads to, to a worker

Digests come last, so that a payload can be sent while it is made.

Nothing is unpickled, and no memory is taken for a payload before its header is known to fit the model.
"""

import json
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, Self

from forgather.errors import ForgatherError

PROTOCOL = 3
MAX_HEADER_BYTES = 16 << 20  # the slices of 100,000 parameters fit in
WORKER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_LENGTH = struct.Struct(">I")

Mode = Literal["sync", "async"]
# What a server tells a worker: to save; to save and end, keeping what it has not sent; to send that, and then save and
# end; to end at once.
Command = Literal["save", "stop", "drain", "abort"]
STRENGTH: Sequence[Command | None] = (None, "save", "drain", "stop", "abort")  # a later one outdoes those before it
Content = Literal["values", "differences", "change"]


class ProtocolError(ForgatherError):
    """A message that does not say what it must; `status` is the HTTP status that answers it."""

    def __init__(self, message: str, *, status: int = 400, fix: str | None = None) -> None:
        super().__init__(message, fix=fix)
        self.status = status


@dataclass(frozen=True)
class Slice:
    """A box of one parameter: where it begins in the whole, and how large it is; elements in row-major order."""

    name: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def numel(self) -> int:
        count = 1
        for size in self.sizes:
            count *= size
        return count

    def to_json(self) -> list[Any]:
        return [self.name, list(self.offsets), list(self.sizes)]

    @classmethod
    def from_json(cls, value: Any) -> Self:
        match value:
            case [str(name), list(offsets), list(sizes)] if _are_counts(offsets) and _are_counts(sizes):
                return cls(name, tuple(offsets), tuple(sizes))
        raise ProtocolError(f"{_shown(value)} is no slice: [name, offsets, sizes]")

    def require_inside(self, parameters: Mapping[str, Sequence[int]]) -> None:
        """ProtocolError unless the box lies in the parameter of its name."""
        shape = parameters.get(self.name)
        if shape is None:
            raise ProtocolError(f"there is no parameter {self.name!r} in this fragment", status=422)
        fits = len(self.offsets) == len(self.sizes) == len(shape) and all(
            start + size <= whole for start, size, whole in zip(self.offsets, self.sizes, shape, strict=True)
        )
        if not fits:
            raise ProtocolError(
                f"{self.name}: {list(self.sizes)} at {list(self.offsets)} is no part of shape {list(shape)}", status=422
            )


@dataclass(frozen=True)
class Version:
    """The values of a fragment after `number` outer steps."""

    number: int
    lineage: str

    def to_json(self) -> list[Any]:
        return [self.number, self.lineage]

    @classmethod
    def from_json(cls, value: Any) -> Self:
        match value:
            case [int(number), str(lineage)] if number >= 0 and not isinstance(number, bool):
                return cls(number, lineage)
        raise ProtocolError(f"{_shown(value)} is no version: [number, lineage]")


@dataclass(frozen=True)
class Settings:
    """What must be the same on all machines. The server's are in force, and workers follow them."""

    parameters: Mapping[str, Sequence[int]]  # name: shape, in the model's order
    fragments: Sequence[Sequence[str]]  # names, in the model's order
    mode: Mode = "sync"
    sync_every: int = 500  # inner steps between two exchanges of a fragment: H
    upload: str = "bf16"  # codec of what workers send
    download: str = "bf16"  # codec of what comes back
    delay: int = 0  # inner steps that a worker trains on while an exchange is under way
    alpha: float = 1.0  # which part of the progress made meanwhile is kept on top of the new values
    dylu: bool = False  # whether slower workers make fewer steps between exchanges
    round_seconds: float | None = None  # rounds of fixed time instead of fixed steps
    heartbeat_s: float = 5.0
    lease_s: float = 30.0  # a worker that is silent for so long is gone
    package: str | None = None  # digests; null for what nobody has said yet
    tokenizer: str | None = None
    data: str | None = None
    work_units: int = 0  # units that the order of samples is leased in; 0: each worker has its own order
    training: str = ""  # which training it is: the name that a server gives it in the beginning, for good
    protocol: int = PROTOCOL

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {
            "parameters": {name: list(shape) for name, shape in self.parameters.items()},
            "fragments": [list(names) for names in self.fragments],
        }

    @classmethod
    def from_json(cls, value: Any) -> Self:
        known = {each.name for each in fields(cls)}
        if not isinstance(value, dict) or value.get("protocol") != PROTOCOL:
            spoken = value.get("protocol") if isinstance(value, dict) else None
            raise ProtocolError(
                f"the server, or the checkpoint of a worker, speaks protocol {spoken}, and this version {PROTOCOL}",
                fix="install the same version of forgather on all machines, and begin the run with it",
            )
        return cls(**{name: each for name, each in value.items() if name in known})


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
                raise ProtocolError(f"a registration says {name}: {_shown(text)}, which is no text")
        if not texts or not WORKER_NAME.fullmatch(texts["worker"] or "") or len(texts["key"] or "") < 16:
            raise ProtocolError("a registration needs a worker's name (letters, digits, _ . -) and its key")
        return cls(**texts)  # type: ignore[arg-type]  # each was looked at above


@dataclass(frozen=True)
class Registered:
    """The answer: the settings, and the version of each fragment that a worker without values begins with.

    `server` names the process that answers: another one does not have what this one held in its memory.
    """

    settings: Settings
    versions: Sequence[Version]
    server: str = ""

    def to_json(self) -> dict[str, Any]:
        return {
            "settings": self.settings.to_json(),
            "versions": [version.to_json() for version in self.versions],
            "server": self.server,
        }

    @classmethod
    def from_json(cls, value: Any) -> Self:
        versions = [Version.from_json(each) for each in value["versions"]]
        return cls(Settings.from_json(value["settings"]), versions, str(value["server"]))


@dataclass(frozen=True)
class Identity:
    """Names a contribution, which counts once however often it is sent; `part` is one rank's slices of it."""

    worker: str
    round: int
    fragment: int
    part: int = 0


@dataclass(frozen=True)
class Contribution:
    """The header of one part of a contribution. The payload follows, and then its xxh3-64, 8 bytes.

    `content` is `differences` (base minus local; they apply to any version) or `values` (the local parameters
    themselves, fp32, which need the base they began from). The slices of all `parts` together make up the fragment.
    `origin` names the start of the worker's processes that made it: a worker that was killed and has trained its steps
    again may have other numbers, and parts of the two are not of one contribution.
    """

    base: Version
    content: Content
    codec: str
    slices: Sequence[Slice]
    parts: int = 1
    tokens: int = 1  # the weight in the mean; the same in all parts
    steps: int = 1
    consumed: Mapping[str, int] = field(default_factory=dict)  # rows of the run in it: first row -> how many
    origin: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"base": self.base.to_json(), "slices": [each.to_json() for each in self.slices]}

    @classmethod
    def from_json(cls, value: Any) -> Self:
        match value:
            case {
                "base": base,
                "content": "values" | "differences" as content,
                "codec": str(codec),
                "slices": list(slices),
                "parts": int(parts),
                "tokens": int(tokens),
                "steps": int(steps),
                "consumed": dict(consumed),
                "origin": str(origin),
            } if 1 <= parts <= 4096 and 1 <= tokens < 2**62 and steps >= 0 and _are_counts(list(consumed.values())):
                return cls(
                    Version.from_json(base),
                    content,
                    codec,
                    [Slice.from_json(each) for each in slices],
                    parts,
                    tokens,
                    steps,
                    consumed,
                    origin,
                )
        raise ProtocolError("the header of a contribution lacks something, or has it in another form")


@dataclass(frozen=True)
class Accepted:
    """The answer to a contribution: it is held for the open round, or was counted in an earlier one."""

    state: Literal["held", "counted"]
    missing_parts: int = 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Closed:
    """The answer (409) to a contribution whose round was closed without it: `open` is the version to send it for.

    Differences may be sent as they are, as a contribution to round `open.number`; values are made differences first.
    Also the answer to values whose base is of another lineage.
    """

    open: Version

    def to_json(self) -> dict[str, Any]:
        return {"open": self.open.to_json()}

    @classmethod
    def from_json(cls, value: Any) -> Self:
        return cls(Version.from_json(value["open"]))


@dataclass(frozen=True)
class WantValues:
    """Asks for slices of a fragment at a version of at least `at_least`; waits for it up to `wait_s` (then 204).

    With `have`, the answer may be the change from that version instead of the values. With `counted`, the version must
    also have this worker's contribution to that round: on an asynchronous server another's may have made it.
    """

    slices: Sequence[Slice]
    at_least: int
    have: Version | None = None
    wait_s: float = 20.0
    counted: int | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {
            "slices": [each.to_json() for each in self.slices],
            "have": None if self.have is None else self.have.to_json(),
        }

    @classmethod
    def from_json(cls, value: Any) -> Self:
        match value:
            case {
                "slices": list(slices),
                "at_least": int(at_least),
                "have": have,
                "wait_s": int() | float() as wait_s,
                "counted": None | int() as counted,
            }:
                return cls(
                    [Slice.from_json(each) for each in slices],
                    at_least,
                    None if have is None else Version.from_json(have),
                    min(60.0, max(0.0, float(wait_s))),
                    counted,
                )
        raise ProtocolError("a request for values lacks something, or has it in another form")


@dataclass(frozen=True)
class Values:
    """The header of the slices that were asked for, in their order.

    `content` is `values` (fp32, each slice's elements) or `change` (for each slice: what `codec` has made of the ranges
    of the parameter's elements that cover it; see `slices.covering_ranges`). Behind them come digests, 8 bytes each:
    the xxh3-64 of the resulting fp32 values of each slice. A worker whose own differ asks again, without `have`.
    """

    version: Version
    content: Content
    codec: str
    durable: int  # versions up to this one are on the server's disk: contributions to earlier rounds may be forgotten

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"version": self.version.to_json()}

    @classmethod
    def from_json(cls, value: Any) -> Self:
        return cls(Version.from_json(value["version"]), value["content"], value["codec"], value["durable"])


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


def pack_header(header: Mapping[str, Any]) -> bytes:
    """The frame's beginning, up to where the payload starts."""
    data = json.dumps(header, separators=(",", ":"), allow_nan=False).encode()
    return _LENGTH.pack(len(data)) + data


def header_length(data: bytes) -> int:
    """How long the header is, from the first 4 bytes of a body."""
    (length,) = _LENGTH.unpack(data)
    if not 2 <= length <= MAX_HEADER_BYTES:
        raise ProtocolError(f"a header of {length:,} bytes; the most is {MAX_HEADER_BYTES:,}", status=413)
    return int(length)


def parse_json(data: bytes) -> Any:
    """JSON as a message has it: without NaN and without a traceback for what is none."""
    try:
        return json.loads(data, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"this is no JSON: {error}") from None


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _are_counts(values: Sequence[Any]) -> bool:
    return all(isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**62 for value in values)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
