"""How numbers are named and exchanged: plain data with JSON forms, checked on arrival.

A *fragment* is a group of parameters that is exchanged as one. Its *version* is how many outer steps were made on it;
round r of a fragment is the one that makes version r + 1 of version r. A *lineage* names the values of a version: it is
a digest of all contributions that made them, so that two versions of one number are never taken for each other.

Nothing is unpickled, and no memory is taken for a payload before its header is known to fit the model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Self

from forgather.diloco.frame import ProtocolError, shown

Content = Literal["values", "differences", "change"]


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
        raise ProtocolError(f"{shown(value)} is no slice: [name, offsets, sizes]")

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
        raise ProtocolError(f"{shown(value)} is no version: [number, lineage]")


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


def _are_counts(values: Sequence[Any]) -> bool:
    return all(isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**62 for value in values)
