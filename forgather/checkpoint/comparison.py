"""What two checkpoints have in common, and how far their tensors are apart."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from forgather.checkpoint.layout import Layout, StoredTensor, read_layout
from forgather.checkpoint.storage import read_tensor


@dataclass(frozen=True)
class Difference:
    """How two tensors of one name and shape differ: the largest difference, and its norm over the first's norm."""

    name: str
    largest: float
    relative: float


@dataclass(frozen=True)
class Comparison:
    """The names that only one has, kinds that differ as (name, one, other), equal tensors, and the other values."""

    only_left: list[str]
    only_right: list[str]
    kinds: list[tuple[str, str, str]]
    equal: list[str]
    differing: list[Difference]

    @property
    def is_equal(self) -> bool:
        return not (self.only_left or self.only_right or self.kinds or self.differing)


def compare(left: Path, right: Path) -> Comparison:
    """Compare the tensors of two checkpoint folders by name, wherever the ranks have cut them.

    Chunks of equal boxes and digests are not read. CheckpointError, naming the file, for what is read and damaged.
    """
    ours, theirs = read_layout(left), read_layout(right)
    common = [name for name in ours if name in theirs]
    alike = [name for name in common if _kind(ours[name]) == _kind(theirs[name])]
    same = {name for name in alike if _digests(ours[name]) == _digests(theirs[name])}
    differing = list(_differences(left, ours, right, theirs, [name for name in alike if name not in same]))
    unequal = {difference.name for difference in differing}
    return Comparison(
        only_left=[name for name in ours if name not in theirs],
        only_right=[name for name in theirs if name not in ours],
        kinds=[(name, _kind(ours[name]), _kind(theirs[name])) for name in common if name not in set(alike)],
        equal=[name for name in alike if name not in unequal],
        differing=sorted(differing, key=lambda difference: -difference.relative),
    )


def _differences(left: Path, ours: Layout, right: Path, theirs: Layout, names: list[str]) -> Iterator[Difference]:
    for name in names:
        one, other = read_tensor(left, ours, name), read_tensor(right, theirs, name)
        if not one.equal(other):
            change = (one.double() - other.double()).abs()
            norm = float(one.double().norm())
            yield Difference(name, float(change.max()), float(change.norm()) / norm if norm else float("inf"))


def _kind(stored: StoredTensor) -> str:
    return f"{list(stored.shape)} {stored.dtype}"


def _digests(stored: StoredTensor) -> set[tuple[tuple[int, ...], tuple[int, ...], str]]:
    return {(chunk.offsets, chunk.sizes, chunk.xxh3) for chunk in stored.chunks}
