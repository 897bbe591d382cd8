"""A fragment's numbers on the server: the master values, the published ones, and the change that led to these.

All workers have the published values, bit for bit; the outer optimizer moves the master ones. An answer is streamed
from these tensors, no copy of the model is made for it: when a new version takes their place an answer under way is
broken off, and the worker asks again.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import inf, prod

import torch
import xxhash
from torch import Tensor

from forgather.checkpoint.storage import raw_bytes
from forgather.diloco.combine import Change
from forgather.diloco.contribution import require_slices
from forgather.diloco.downloads import ChangedError, Downloads
from forgather.diloco.encoding import BLOCK
from forgather.diloco.frame import pack_header
from forgather.diloco.messages import Slice, Values, Version, WantValues
from forgather.diloco.pieces import box_of, pieces
from forgather.diloco.slices import covering_ranges

LONGEST_STEP_S = 15.0  # well below how long a worker's connection may be silent
_BATCH_BYTES = 256 << 10  # what a socket takes at once, so that nothing is kept back and copied


@lru_cache(maxsize=1 << 14)
def _ranges(shape: tuple[int, ...], part: Slice) -> Sequence[tuple[int, int]]:
    """Of a slice of a column these are many, and the same each time."""
    return covering_ranges(shape, part, BLOCK)


class FragmentValues:
    """Master and published fp32 values of some parameters, which begin as `values`.

    With `download` fp32 there is no change: values go down.
    """

    def __init__(self, values: Mapping[str, Tensor], version: Version, download: str) -> None:
        self.master = {name: tensor.detach().contiguous() for name, tensor in values.items()}
        self.published = {name: tensor.clone() for name, tensor in self.master.items()}
        self.shapes = {name: tuple(tensor.shape) for name, tensor in values.items()}
        self.change = None if download == "fp32" else Change(self.shapes, download)
        self.changed_from: Version | None = None  # what the change leads from
        self.version = version  # of the published values
        self.coming: Version | None = None  # the next one, while what leads to it is made
        self.durable = version.number
        self.generation = 0  # of the published values
        self.change_generation = 0
        self.is_moving = False  # the published values are being moved to the next version
        self.step_s = inf  # what the last step took, until the values were published
        self.downloads = Downloads()
        self.digests: dict[Slice, bytes] = {}  # of the published values: a dict of its own for each state of them
        self._digesting = threading.Lock()  # who asks for the same as another waits for it

    @property
    def numel(self) -> int:
        return sum(prod(shape) for shape in self.shapes.values())

    @property
    def generations(self) -> tuple[int, int]:
        """They tell whoever reads without a lock that something has changed."""
        return self.generation, self.change_generation

    def begin(self) -> None:
        """The master values, and the change, are about to be of the next version."""
        self.changed_from = None
        self.change_generation += 1
        if self.change is not None:
            self.change.begin()

    def is_certain(self, version: Version) -> None:
        """Nothing keeps the next version from being this one: its change can be sent while it is made.

        Not where that takes long: whoever has the beginning hears nothing meanwhile, as if the server had gone.
        """
        if self.change is not None and self.step_s < LONGEST_STEP_S:
            self.changed_from, self.coming = self.version, version

    def move_begins(self) -> None:
        """From here on nobody reads the published values, before `moved`."""
        self.is_moving = True
        self.generation += 1
        self.digests = {}

    @torch.no_grad()
    def move(self) -> None:
        """Bring the published values to what the outer step has made. In a thread of its own."""
        if self.change is not None:
            self.change.apply(self.published)
            return
        for name, values in self.published.items():
            values.copy_(self.master[name])

    def moved(self, version: Version, changed_from: Version | None) -> None:
        """They are those of `version`."""
        self.digests = {}
        self.version, self.coming, self.is_moving = version, None, False
        self.changed_from = changed_from if self.change is not None else None

    def require(self, want: WantValues) -> None:
        """ProtocolError (422) unless the slices are of this fragment."""
        require_slices(want.slices, self.shapes)

    def can_answer(self, want: WantValues) -> bool:
        """Whether there is what is wanted, or a change that leads to it."""
        if self._has_change_for(want) and self.coming is not None and want.counted is None:
            return self.coming.number >= want.at_least
        return not self.is_moving and self.version.number >= want.at_least

    def _has_change_for(self, want: WantValues) -> bool:
        return self.change is not None and want.have is not None and want.have == self.changed_from

    def digest(self, each: Slice, known: dict[Slice, bytes]) -> bytes:
        """xxh3-64 of a slice's published values. `known` is what `digests` was when they were; then any thread will do.

        Of values that move meanwhile it is wrong, and noted where nobody looks any more.
        """
        with self._digesting:
            if each not in known:
                digest = xxhash.xxh3_64()
                for _, piece in pieces(box_of(self.published[each.name], each)):
                    digest.update(raw_bytes(piece.contiguous()))
                known[each] = digest.digest()
        return known[each]

    def answer(self, want: WantValues) -> "Answer":
        """What to send for `want`, which it can answer now."""
        if not self._has_change_for(want):
            header = Values(self.version, "values", "fp32", self.durable)
            return Answer(self, self.generations, header.version, pack_header(header.to_json()), want.slices, None)
        assert self.change is not None, "there is a change"
        header = Values(self.coming or self.version, "change", self.change.codec.name, self.durable)
        ranges = [_ranges(self.shapes[each.name], each) for each in want.slices]
        return Answer(self, self.generations, header.version, pack_header(header.to_json()), want.slices, ranges)


@dataclass
class Answer:
    """An answer but for the digests, which come last. Its blocks are made on the thread on which versions change."""

    values: FragmentValues
    generations: tuple[int, int]  # of the values and the change, as they were
    version: Version
    head: bytes
    slices: Sequence[Slice]
    ranges: Sequence[Sequence[tuple[int, int]]] | None  # of a change: which of each parameter's elements cover a slice
    awaited: str | None = None  # the parameter whose change is next, and still to be made

    @property
    def num_bytes(self) -> int:
        """Of the body, without the digests."""
        if self.ranges is None:
            return len(self.head) + sum(4 * each.numel for each in self.slices)
        encoder = self._change.codec
        return len(self.head) + sum(
            encoder.encoded_bytes(stop - start) for ranges in self.ranges for start, stop in ranges
        )

    def blocks(self) -> Iterator[memoryview | bytes | None]:
        """The body, some 100 KiB at a time, as views of the values. ChangedError when these have changed meanwhile.

        None where the next is still to be made: once something was made, or given up, the next is to be asked for.
        A view that is not sent at once may change under whoever sends it: then its answer is broken off, or it was the
        last one and the digest tells.
        """
        batch = bytearray(self.head)
        for view in self._views():
            if not self.is_current:
                raise ChangedError
            if view is None:
                if batch:
                    yield bytes(batch)
                    batch.clear()
                yield None
                continue
            is_large = view.nbytes >= _BATCH_BYTES // 2
            if batch and (is_large or len(batch) >= _BATCH_BYTES):
                yield bytes(batch)
                batch.clear()
                if not self.is_current:
                    raise ChangedError
            if is_large:
                yield view
            else:
                batch += view
        if batch:
            yield bytes(batch)

    def has_more(self) -> bool:
        """Whether there is something now where the blocks had None, be it that it is not to be sent any more."""
        return not self.is_current or self.awaited is None or self._change.has(self.awaited)

    @property
    def is_current(self) -> bool:
        """Whether what it is made of is still what it was."""
        published, change = self.values.generations
        return self.generations[0] == published if self.ranges is None else self.generations[1] == change

    def _views(self) -> Iterator[memoryview | None]:
        if self.ranges is None:
            for each in self.slices:
                for _, piece in pieces(box_of(self.values.published[each.name], each), _BATCH_BYTES // 4):
                    yield raw_bytes(piece.contiguous())
            return
        encoder = self._change.codec
        for each, ranges in zip(self.slices, self.ranges, strict=True):
            while not self._change.has(each.name):
                self.awaited = each.name
                yield None
            encoded, numel = self._change.of(each.name), self._change.numels[each.name]
            for start, stop in ranges:
                for part in encoder.parts(encoded, numel, start, stop):
                    data = raw_bytes(part)
                    for first in range(0, data.nbytes, _BATCH_BYTES):
                        yield data[first : first + _BATCH_BYTES]

    @property
    def _change(self) -> Change:
        assert self.values.change is not None, "only a fragment with a change has ranges of it"
        return self.values.change
