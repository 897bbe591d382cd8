"""A contribution on the server: what it may be before any of it is read, and whether it is sound when it is there.

Shapes, names and codec are judged by the header alone: only then is room taken for the payload, whose length follows
from the header. Each part is looked through when it has come, so that the rank whose numbers are not finite hears it.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from forgather.diloco.codec import codec
from forgather.diloco.frame import ProtocolError
from forgather.diloco.messages import Contribution, Identity, Slice
from forgather.diloco.pieces import PIECE, box_of, pieces
from forgather.diloco.spool import Room

MAX_BOXES = 64  # of one parameter in one part: a rank has one, or a few where its shard is strided


@dataclass(frozen=True)
class Plan:
    """Where each slice's encoded bytes begin in a payload, and how long it is."""

    starts: Sequence[int]
    num_bytes: int


@dataclass(frozen=True)
class Part:
    """One rank's slices of a contribution, in `room`."""

    header: Contribution
    plan: Plan
    room: Room
    squared_norm: float = 0.0  # of its differences
    digest: str = ""  # of its payload

    def encoded(self, number: int) -> Tensor:
        """The bytes of a slice, as its codec made them."""
        start, length = self._bytes_of(number)
        return self.room.view(start, length)

    def forget(self, number: int) -> None:
        """The bytes of a slice are not looked at again for a while."""
        self.room.forget(*self._bytes_of(number))

    def end(self, number: int) -> int:
        """Where the bytes of a slice end in the payload."""
        start, length = self._bytes_of(number)
        return start + length

    def _bytes_of(self, number: int) -> tuple[int, int]:
        length = codec(self.header.codec).encoded_bytes(self.header.slices[number].numel)
        return self.plan.starts[number], length


@dataclass
class Held:
    """What has come of a contribution."""

    worker: str
    round: int
    fragment: int
    header: Contribution  # of the part that came first; what must be the same in all is taken from it
    parts: dict[int, Part] = field(default_factory=dict)
    consumed: dict[str, int] = field(default_factory=dict)

    @property
    def num_missing(self) -> int:
        return self.header.parts - len(self.parts)

    @property
    def norm(self) -> float:
        """The norm of its differences over all parts."""
        return math.sqrt(sum(part.squared_norm for part in self.parts.values()))

    def goes_with(self, header: Contribution) -> bool:
        """Whether a part with this header is of the same contribution; if not, it is another try."""
        return all(
            getattr(self.header, name) == getattr(header, name)
            for name in ("base", "content", "codec", "parts", "tokens", "steps", "origin")
        )

    def put(self, number: int, part: Part) -> None:
        """Take a part; one that is sent again replaces the one before."""
        before = self.parts.pop(number, None)
        if before is not None:
            before.room.release()
        self.parts[number] = part
        self.consumed |= part.header.consumed

    def release(self) -> None:
        """Give back all room."""
        for part in self.parts.values():
            part.room.release()
        self.parts.clear()

    @cached_property
    def by_name(self) -> dict[str, list[tuple[Part, int]]]:
        """Which parts have slices of a parameter, and under which number. Of one that is complete."""
        found: dict[str, list[tuple[Part, int]]] = {}
        for _, part in sorted(self.parts.items()):
            for number, each in enumerate(part.header.slices):
                found.setdefault(each.name, []).append((part, number))
        return found


def plan_payload(identity: Identity, header: Contribution, shapes: Mapping[str, Sequence[int]], *, upload: str) -> Plan:
    """How a payload with this header is laid out; ProtocolError (422) unless it can be part of a contribution.

    `shapes` are those of the fragment's parameters.
    """
    if not 0 <= identity.part < header.parts:
        raise ProtocolError(f"there is no part {identity.part} of {header.parts}", status=422)
    if header.codec != upload:
        raise ProtocolError(
            f"this contribution is {header.codec}, and the server wants {upload}",
            status=422,
            fix="register again, and follow the settings",
        )
    if header.content == "values" and header.codec != "fp32":
        raise ProtocolError(
            f"values in {header.codec} would lose what was learned", status=422, fix="send differences, or fp32"
        )
    require_slices(header.slices, shapes)
    starts, at = [], 0
    for each in header.slices:
        starts.append(at)
        at += codec(header.codec).encoded_bytes(each.numel)
    return Plan(starts, at)


def require_slices(slices: Sequence[Slice], shapes: Mapping[str, Sequence[int]]) -> None:
    """ProtocolError (422) unless these are boxes of the parameters, few of each, and together no more than all."""
    boxes: dict[str, int] = {}
    elements = 0
    for each in slices:
        each.require_inside(shapes)
        boxes[each.name] = boxes.get(each.name, 0) + 1
        elements += each.numel
        if boxes[each.name] > MAX_BOXES:
            raise ProtocolError(f"more than {MAX_BOXES} slices of {each.name} in one part", status=422)
    most = sum(math.prod(shape) for shape in shapes.values())
    if elements > most:
        raise ProtocolError(
            f"slices with {elements:,} elements, of a fragment that has {most:,}", status=422, fix="send each once"
        )


def require_whole(parts: Collection[Part], shapes: Mapping[str, Sequence[int]]) -> None:
    """ProtocolError (422) unless the slices of all parts are each of the fragment's elements once."""
    boxes: dict[str, list[Slice]] = {name: [] for name in shapes}
    for part in parts:
        for each in part.header.slices:
            if each.numel:
                boxes[each.name].append(each)
    for name, shape in shapes.items():
        elements = sum(each.numel for each in boxes[name])
        if elements != math.prod(shape):
            raise ProtocolError(
                f"the parts of this contribution have {elements:,} elements of {name}, which has {math.prod(shape):,}",
                status=422,
                fix="send every element once; all parts again",
            )
        if twice := _overlapping(boxes[name]):
            raise ProtocolError(
                f"{name}: elements at {list(twice.offsets)} come twice in this contribution",
                status=422,
                fix="let one rank speak for each element; all parts again",
            )


def _overlapping(boxes: Iterable[Slice]) -> Slice | None:
    """A box that shares elements with another."""
    open_boxes: list[Slice] = []
    for each in sorted(boxes, key=lambda box: box.offsets):
        # Along the first dimension those that end before this one begins are done with.
        open_boxes = [box for box in open_boxes if not each.offsets or box.offsets[0] + box.sizes[0] > each.offsets[0]]
        if any(_share(box, each) for box in open_boxes):
            return each
        open_boxes.append(each)
    return None


def _share(one: Slice, other: Slice) -> bool:
    return all(
        max(left, right) < min(left + size, right + length)
        for left, size, right, length in zip(one.offsets, one.sizes, other.offsets, other.sizes, strict=True)
    )


class Examination:
    """Looks through a part slice by slice, as its bytes come. One thread at a time.

    Values are judged by how far they are from the `published` ones, which they began with.
    """

    def __init__(self, part: Part, published: Mapping[str, Tensor]) -> None:
        self.squared_norm = 0.0  # of the differences in what was looked through
        self._part = part
        self._published = published
        self._next = 0

    @property
    def has_work(self) -> bool:
        """Whether there is a whole slice that was not looked through."""
        slices, there = self._part.header.slices, self._part.room.num_readable
        return self._next < len(slices) and self._part.end(self._next) <= there

    @torch.no_grad()
    def go_on(self) -> None:
        """Look through what has come. ProtocolError (422), naming a parameter whose numbers are not finite."""
        room = torch.empty(PIECE)
        while self.has_work:
            self.squared_norm += self._square(self._next, room)
            self._part.forget(self._next)
            self._next += 1

    def _square(self, number: int, room: Tensor) -> float:
        each, encoded = self._part.header.slices[number], self._part.encoded(number)
        decoder, is_difference = codec(self._part.header.codec), self._part.header.content == "differences"
        base = box_of(self._published[each.name], each)
        if is_difference and math.isfinite(square := decoder.squared_norm(encoded, each.numel)):
            return square
        total = 0.0
        for start, values in pieces(base):
            piece = room[: values.numel()]
            decoder.decode(encoded, each.numel, piece, start)
            if not is_difference:
                torch.sub(values.reshape(-1), piece, out=piece)
            square = float(torch.linalg.vector_norm(piece)) ** 2
            if not math.isfinite(square):
                if not bool(piece.isfinite().all()):
                    raise ProtocolError(
                        f"{each.name} has numbers that are not finite in this contribution",
                        status=422,
                        fix="see why this worker's training diverged: its learning rate, its data, its memory",
                    )
                square = float(piece.double().square().sum())
            total += square
        return total
