"""Closes a round: contributions become a mean, the mean an outer step, and the step a change to send.

    mean = master - sum of w_i c_i (base - local_i)        w: share of tokens, c: what the norm guard leaves of it
    outer.step(name, master, mean)
    change = codec(master - published)                      what it loses stays in master - published

It walks through one parameter after the other, and does all of this with a piece of it while that is in a core's cache,
four times as fast as with whole parameters. Where an outer optimizer wants these, or a contribution has boxes with gaps
between their rows, the mean is made of a whole parameter. Sums are made in the order of the workers' names.
"""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import xxhash
from torch import Tensor

from forgather.diloco.codec import Codec, codec
from forgather.diloco.contribution import Held, Part
from forgather.diloco.pieces import PIECE, box_of, pieces
from forgather.errors import ConfigError

NormGuard = Literal["off", "clip", "refuse"]


class Outer(Protocol):
    """The outer optimizer, one parameter at a time."""

    @property
    def is_elementwise(self) -> bool:
        """Whether it can be given a part of the mean."""

    def step(self, name: str, master: Tensor, mean: Tensor, start: int = 0) -> None:
        """Move `master` in place, from element `start` on where `mean` is of a part; `mean` may be overwritten."""


@dataclass(frozen=True)
class Guard:
    """Contributions whose norm is above `factor` times the median of their round are cut down to that, or left out.

    A round of one or two has no median that would say anything.
    """

    kind: NormGuard = "off"
    factor: float = 3.0

    def __post_init__(self) -> None:
        if self.kind not in ("off", "clip", "refuse"):
            raise ConfigError(f"norm_guard is {self.kind!r}", fix="norm_guard: off, clip or refuse")
        if not self.factor >= 1:
            raise ConfigError(f"norm_factor is {self.factor}", fix="norm_factor: 3, or another number from 1")

    def scales(self, norms: Sequence[float]) -> list[float]:
        """What is left of each contribution: 1 of one that is as others are, 0 of one that is refused."""
        if self.kind == "off" or len(norms) < 3:
            return [1.0] * len(norms)
        most = self.factor * statistics.median(norms)
        left = 0.0 if self.kind == "refuse" else None
        return [1.0 if norm <= most else (most / norm if left is None else left) for norm in norms]


@dataclass(frozen=True)
class Share:
    """A contribution and its weight in the mean, which sums to 1 with the others'; `scale` is what the guard left."""

    held: Held
    weight: float
    scale: float = 1.0


def shares(contributions: Sequence[Held], guard: Guard) -> list[Share]:
    """Weights by tokens, of those that the guard has not refused, in the order in which they are given."""
    scales = guard.scales([held.norm for held in contributions])
    tokens = sum(held.header.tokens for held, scale in zip(contributions, scales, strict=True) if scale)
    return [
        Share(held, held.header.tokens / tokens, scale)
        for held, scale in zip(contributions, scales, strict=True)
        if scale
    ]


def lineage(before: str, taken: Sequence[Share]) -> str:
    """The name of the values that these contributions make of those called `before`."""
    digest = xxhash.xxh3_64(before.encode())
    for share in taken:
        digest.update(f"\n{share.held.worker} {share.weight!r} {share.scale!r}".encode())
        for number, part in sorted(share.held.parts.items()):
            digest.update(f" {number} {part.header.content} {part.digest}".encode())
    return digest.hexdigest()


class Change:
    """What a fragment's published values are to be changed by, encoded: one run a parameter."""

    def __init__(self, shapes: Mapping[str, Sequence[int]], download: str) -> None:
        self.codec: Codec = codec(download)
        self.numels = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
        lengths = {name: self.codec.encoded_bytes(numel) for name, numel in self.numels.items()}
        self.data = torch.zeros(sum(lengths.values()), dtype=torch.uint8)
        self._runs: dict[str, Tensor] = {}
        at = 0
        for name, length in lengths.items():
            self._runs[name] = self.data[at : at + length]
            at += length

    def of(self, name: str) -> Tensor:
        """The encoded change of a parameter."""
        return self._runs[name]

    @torch.no_grad()
    def apply(self, published: Mapping[str, Tensor]) -> None:
        """Add it to the published values, as each worker does."""
        room = torch.empty(PIECE)
        for name, numel in self.numels.items():
            for start, values in pieces(published[name]):
                piece = room[: values.numel()]
                self.codec.decode(self.of(name), numel, piece, start)
                values.add_(piece)


@torch.no_grad()
def combine(
    taken: Sequence[Share],
    master: Mapping[str, Tensor],
    published: Mapping[str, Tensor],
    outer: Outer,
    change: Change | None,
    *,
    damping: float = 1.0,
) -> None:
    """One outer step on the fragment's `master`; `change` then has what the published values are to be changed by.

    Without a change (fp32) the published values are to be the master's. `damping` is the weight of what is stale.
    """
    decoded = torch.empty(PIECE)
    for name, values in master.items():
        sources = [_Source(share, damping, name, values) for share in taken]
        is_in_pieces = outer.is_elementwise and all(source.is_in_rows for source in sources)
        length = min(PIECE, values.numel()) if is_in_pieces else values.numel()
        room = torch.empty(length)
        flat, known = values.view(-1), published[name].view(-1)
        for start in range(0, values.numel(), max(1, length)):
            value, before = flat[start : start + length], known[start : start + length]
            mean = room[: value.numel()]
            _mean(mean, start, sources, value, before, decoded, is_exact=change is None)
            outer.step(name, values, mean if is_in_pieces else mean.view_as(values), start)
            if change is not None:
                change.codec.encode_part(value, change.of(name), values.numel(), start, minus=before)
        for source in sources:
            source.forget()


class _Source:
    """What one contribution has of the parameter `name`, whose master values are `values`."""

    def __init__(self, share: Share, damping: float, name: str, values: Tensor) -> None:
        self.weight = share.weight * share.scale * damping
        self.is_values = share.held.header.content == "values"
        self._shape = values.shape
        self._slices: list[tuple[Part, int, int | None]] = []  # and its first element, where it has no gaps
        for part, number in share.held.by_name.get(name, ()):
            box = box_of(values, part.header.slices[number])
            if box.numel():
                is_in_rows = box.is_contiguous()
                first = int(box.storage_offset() - values.storage_offset()) if is_in_rows else None
                self._slices.append((part, number, first))

    @property
    def is_in_rows(self) -> bool:
        """Whether each of its slices is one stretch of the parameter's elements."""
        return all(first is not None for _, _, first in self._slices)

    def decoded(self, mean: Tensor, start: int, room: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Each of its elements that belong to `mean`, which has those from `start` on: their place, and their values.

        The values are in `room`, until the next are asked for.
        """
        for part, number, first in self._slices:
            each, decoder = part.header.slices[number], codec(part.header.codec)
            if first is None:
                box, at = box_of(mean.view(self._shape), each), 0
            else:
                low, high = max(start, first), min(start + mean.numel(), first + each.numel)
                box, at = mean[low - start : max(low, high) - start], low - first
            encoded = part.encoded(number)
            for offset, target in pieces(box, PIECE):
                piece = room[: target.numel()]
                decoder.decode(encoded, each.numel, piece, at + offset)
                yield target, piece.view(target.shape)

    def forget(self) -> None:
        """It is not looked at again for a while."""
        for part, number, _ in self._slices:
            part.forget(number)


def _mean(
    mean: Tensor,
    start: int,
    sources: Sequence[_Source],
    master: Tensor,
    published: Tensor,
    room: Tensor,
    *,
    is_exact: bool,
) -> None:
    """Make the mean of the elements from `start` on, of which these are the master and the published values."""
    from_values = 0.0  # how much of the mean is in it as values, not as what is to be taken from the master's
    for source in sources:
        from_values += source.weight if source.is_values else 0.0
        signed = source.weight if source.is_values else -source.weight
        for target, piece in source.decoded(mean, start, room):
            if source is sources[0]:
                torch.mul(piece, signed, out=target)
            else:
                target.add_(piece, alpha=signed)
    if is_exact:
        # The published values are the master's. What is there as values needs no base: one alone stays what it is.
        if abs(from_values - 1.0) > 1e-9:
            mean.add_(master, alpha=1.0 - from_values)
    else:
        mean.add_(master)
        if from_values:
            mean.sub_(published, alpha=from_values)
