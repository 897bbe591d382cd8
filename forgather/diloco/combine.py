"""Closes a round: contributions become a mean, the mean an outer step, and the step a change to send.

    mean = master - sum of w_i c_i (base - local_i)        w: share of tokens, c: what the norm guard leaves of it
    outer.step(name, master, mean)
    change = codec(master - published)                      what it loses stays in master - published

It walks through one parameter after the other, and in each through pieces of a MiB, so beside the held contributions it
needs memory for one parameter. Sums are made in the order of the workers' names.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import xxhash
from torch import Tensor

from forgather.diloco.codec import codec
from forgather.diloco.contribution import Held
from forgather.diloco.encoding import Codec
from forgather.diloco.pieces import PIECE, box_of, pieces
from forgather.errors import ConfigError

NormGuard = Literal["off", "clip", "refuse"]


class Outer(Protocol):
    """The outer optimizer, one parameter at a time."""

    def step(self, name: str, master: Tensor, mean: Tensor) -> None:
        """Move `master` in place; `mean` may be overwritten."""


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
        self._made = set(shapes)  # whose change is there
        at = 0
        for name, length in lengths.items():
            self._runs[name] = self.data[at : at + length]
            at += length

    def of(self, name: str) -> Tensor:
        """The encoded change of a parameter."""
        return self._runs[name]

    def begin(self) -> None:
        """It is about to be made anew."""
        self._made.clear()

    def put(self, name: str, master: Tensor, published: Tensor) -> None:
        """Encode the change of a parameter."""
        self.codec.encode(master.view(-1), self.of(name), minus=published.view(-1))
        self._made.add(name)

    def has(self, name: str) -> bool:
        """Whether that of a parameter is there."""
        return name in self._made

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
    made: Callable[[], object] = lambda: None,
) -> None:
    """One outer step on the fragment's `master`; `change` then has what the published values are to be changed by.

    Without a change (fp32) the published values are to be the master's. `damping` is the weight of what is stale.
    `made` is called when a parameter's change is there.
    """
    room = torch.empty(PIECE)
    largest = torch.empty(max((values.numel() for values in master.values()), default=0))
    for name, values in master.items():
        mean = largest[: values.numel()].view_as(values)
        _mean(mean, name, taken, values, published[name], damping, room, is_exact=change is None)
        outer.step(name, values, mean)
        if change is not None:
            change.put(name, values, published[name])
            made()


def _mean(
    mean: Tensor,
    name: str,
    taken: Sequence[Share],
    master: Tensor,
    published: Tensor,
    damping: float,
    room: Tensor,
    *,
    is_exact: bool,
) -> None:
    is_first = True
    from_values = 0.0  # how much of the mean is in it as values, not as what is to be taken from the master's
    for share in taken:
        weight = share.weight * share.scale * damping
        is_values = share.held.header.content == "values"
        from_values += weight if is_values else 0.0
        for part, number in share.held.by_name.get(name, ()):
            each = part.header.slices[number]
            encoded, decoder = part.encoded(number), codec(part.header.codec)
            for start, target in pieces(box_of(mean, each)):
                piece = room[: target.numel()]
                decoder.decode(encoded, each.numel, piece, start)
                signed = weight if is_values else -weight
                if is_first:
                    torch.mul(piece.view(target.shape), signed, out=target)
                else:
                    target.add_(piece.view(target.shape), alpha=signed)
            part.forget(number)
        is_first = False
    if is_exact:
        # The published values are the master's. What is there as values needs no base: one alone stays what it is.
        if abs(from_values - 1.0) > 1e-9:
            mean.add_(master, alpha=1.0 - from_values)
    else:
        mean.add_(master)
        if from_values:
            mean.sub_(published, alpha=from_values)
