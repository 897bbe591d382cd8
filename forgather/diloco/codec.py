"""How values become bytes: fp32, bf16, and int8 and int4 in blocks that share a scale, with what is lost given back.

    int4 = codec("int4")
    encoded = torch.empty(int4.encoded_bytes(difference.numel()), dtype=torch.uint8)
    int4.encode(difference, encoded, residual)  # sends difference + residual; residual becomes what that lost
    int4.decode(encoded, difference.numel(), out)

An encoded run of n elements is [scales of its blocks, fp32][elements], filled up with zeros to a multiple of 8 bytes;
numbers are little-endian. Every block stands alone, so whole blocks can be cut out of a run, and are the encoding of
that part. In int4 the first half of a block lies in the low nibbles, the second in the high ones, each as value + 8.

**Decoding gives the same bits on every processor**: an integer times a scale, rounded once. A scale is a normal number,
so processors that flush subnormal numbers agree too. Who adds what was decoded to something adds it in an operation of
its own.

**Nothing is lost**: what decodes and the residual together are `values + residual`, exactly (their difference is a
number of fp32: Sterbenz's lemma). Sent round after round, errors do not add up.

Values that are no numbers stay so, with the block that they are in (fp32 and bf16: the element), and what they leave in
the residual is zero: whoever receives them can refuse them, and the sender's later rounds are sound.

All is done in pieces that stay in a core's cache, in memory that is taken once a thread.
"""

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from difflib import get_close_matches
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from forgather.errors import ConfigError

BLOCK = 128  # elements that share a scale; 64 bytes of int4, 128 of int8
_PIECE = 512 * BLOCK  # elements: values, residual and temporaries are then less than 1 MiB, a core's second cache
_DECODED_PIECE = 2 * _PIECE  # which has no values and no residual beside it
_STEP = 4 * _PIECE  # elements that are encoded before their bytes can be used, where these are in their order
_ROW = 4096  # elements whose norm is taken at once
_MANY_ROWS = 64  # so many that the rounding of their norms averages out
_ALIGNMENT = 8  # bytes: a run behind another one begins where numbers of any type may lie
_LARGEST = 2.0**127  # more would not survive to be scaled back
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny  # the smallest normal number


class _Temporaries(threading.local):
    """Memory of one piece, each thread's own."""

    def __init__(self) -> None:
        encoded, decoded = _PIECE // BLOCK, _DECODED_PIECE // BLOCK
        # Memory that came to be in inference mode could not be written to outside of it.
        with torch.inference_mode(False):
            self.scaled = torch.empty(encoded, BLOCK, dtype=torch.float32, device="cpu")
            self.difference = torch.empty_like(self.scaled)
            self.magnitudes = torch.empty(encoded, 1, dtype=torch.float32, device="cpu")
            self.inverses = torch.empty(encoded, 1, dtype=torch.float32, device="cpu")
            self.integers = torch.empty(decoded, BLOCK, dtype=torch.int8, device="cpu")
            self.low, self.high = self.integers.view(torch.int32).chunk(2, 1)
            self.shifted = torch.empty_like(self.high)


_temporaries = _Temporaries()


class Codec(ABC):
    """Encodes runs of fp32 values in CPU memory. Holds no state, and any number of threads may call it at once."""

    name: str
    is_in_order: bool  # an encoded run is its elements' bytes, in their order

    @abstractmethod
    def encoded_bytes(self, numel: int) -> int:
        """How long the encoding of `numel` elements is: a multiple of 8."""

    def encode(
        self, values: Tensor, out: Tensor, residual: Tensor | None = None, *, minus: Tensor | None = None
    ) -> None:
        """Write `values + residual` to the bytes `out`, and leave in `residual` what was lost; `values` stay.

        With `minus`, `values - minus + residual`: the difference is made piece by piece, and never as a whole.
        """
        if residual is not None:
            _require_run(residual)
            assert residual.numel() == values.numel(), "the residual has as many elements as the values"
        self.encode_part(values, out, values.numel(), 0, residual, minus=minus)

    def encode_part(
        self,
        values: Tensor,
        out: Tensor,
        numel: int,
        start: int,
        residual: Tensor | None = None,
        *,
        minus: Tensor | None = None,
    ) -> None:
        """The same of whole blocks, which are elements from `start` on of the `numel` whose encoding is `out`."""
        _require_run(values)
        _require_bytes(out, self.encoded_bytes(numel))
        if minus is not None:
            _require_run(minus)
            assert minus.numel() == values.numel(), "what is taken away has as many elements as the values"
        stop = start + values.numel()
        assert 0 <= start <= stop <= numel, "these elements are in the run"
        assert start % BLOCK == 0, "a part begins with a block"
        assert stop % BLOCK == 0 or stop == numel, "a part ends with a block or with the run"
        with torch.no_grad():
            self._encode(values, out, numel, start, residual, minus)

    def encoding(
        self, values: Tensor, out: Tensor, residual: Tensor | None = None, *, minus: Tensor | None = None
    ) -> Iterator[int]:
        """`encode`, step by step; after each step, how many bytes more of `out` are there, from the first on."""
        numel, done = values.numel(), 0
        length = _STEP if self.is_in_order else max(1, numel)
        for start in range(0, numel, length):
            stop = min(start + length, numel)
            rows = (None if row is None else row[start:stop] for row in (residual, minus))
            left, less = rows
            self.encode_part(values[start:stop], out, numel, start, left, minus=less)
            end = self._sections(numel, start, stop)[-1][1] if stop < numel else out.numel()
            yield end - done
            done = end

    def decode(self, encoded: Tensor, numel: int, out: Tensor, start: int = 0) -> None:
        """Write elements `start` to `start + out.numel()` of the `numel` that were encoded to `out`."""
        _require_run(out)
        _require_bytes(encoded, self.encoded_bytes(numel))
        assert 0 <= start <= start + out.numel() <= numel, "these elements are in the run"
        with torch.no_grad():
            self._decode(encoded, numel, out, start)

    @torch.no_grad()
    def squared_norm(self, encoded: Tensor, numel: int) -> float:
        """The sum of the squares of the `numel` elements, to about 1 in 100; not finite where one of them is not.

        In few and long calls, during which others may use the interpreter. Infinity for what fp32 cannot hold.
        """
        room = torch.empty(min(numel, _DECODED_PIECE))
        total = 0.0
        for start in range(0, numel, _DECODED_PIECE):
            piece = room[: numel - start]
            self.decode(encoded, numel, piece, start)
            total += float(torch.linalg.vector_norm(piece)) ** 2
        return total

    def cut(self, encoded: Tensor, numel: int, start: int, stop: int, out: Tensor) -> None:
        """Write the encoding of elements `start` to `stop`, whole blocks, of an encoded run of `numel` to `out`."""
        _require_bytes(encoded, self.encoded_bytes(numel))
        _require_bytes(out, self.encoded_bytes(stop - start))
        assert 0 <= start <= stop <= numel, "these elements are in the run"
        assert start % BLOCK == 0, "a part begins with a block"
        assert stop % BLOCK == 0 or stop == numel, "a part ends with a block or with the run"
        at = 0
        for part in self.parts(encoded, numel, start, stop):
            out[at : at + part.numel()].copy_(part)
            at += part.numel()

    def parts(self, encoded: Tensor, numel: int, start: int, stop: int) -> Iterator[Tensor]:
        """What `cut` writes, as views of the encoded run, and at the end the zeros that fill it up."""
        missing = self.encoded_bytes(stop - start)
        for begin, end in self._sections(numel, start, stop):
            yield encoded[begin:end]
            missing -= end - begin
        if missing:
            yield torch.zeros(missing, dtype=torch.uint8)

    @abstractmethod
    def _encode(
        self, values: Tensor, out: Tensor, numel: int, start: int, residual: Tensor | None, minus: Tensor | None
    ) -> None: ...

    @abstractmethod
    def _decode(self, encoded: Tensor, numel: int, out: Tensor, start: int) -> None: ...

    @abstractmethod
    def _sections(self, numel: int, start: int, stop: int) -> list[tuple[int, int]]:
        """Where the bytes of elements `start` to `stop` lie in an encoded run, in the order of an encoded run."""


class _Plain(Codec):
    """Each element by itself, as a number of another type, or of the same."""

    is_in_order = True

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self.name = name
        self.dtype = dtype

    def encoded_bytes(self, numel: int) -> int:
        return _filled_up(numel * self.dtype.itemsize)

    def _encode(
        self, values: Tensor, out: Tensor, numel: int, start: int, residual: Tensor | None, minus: Tensor | None
    ) -> None:
        size = numel * self.dtype.itemsize
        encoded = out[:size].view(self.dtype)[start : start + values.numel()]
        out[size:].zero_()
        if residual is None and minus is None:
            encoded.copy_(values)
            return
        scratch = _temporaries.scaled.view(-1)
        for piece, less, left, sent in _pieces(_PIECE, values, minus, residual, encoded):
            room = scratch[: piece.numel()]
            added = piece if less is None else torch.sub(piece, less, out=room)
            if left is None:
                sent.copy_(added)
                continue
            sent.copy_(left.add_(added))
            left.sub_(room.copy_(sent)).nan_to_num_(0.0, 0.0, 0.0)

    def _decode(self, encoded: Tensor, numel: int, out: Tensor, start: int) -> None:
        out.copy_(encoded[: numel * self.dtype.itemsize].view(self.dtype)[start : start + out.numel()])

    @torch.no_grad()
    def squared_norm(self, encoded: Tensor, numel: int) -> float:
        # Of rows, each of whose norms is rounded to the type of the elements; all of it in one call.
        whole = numel // _ROW * _ROW if numel >= _MANY_ROWS * _ROW else 0
        elements = encoded[: numel * self.dtype.itemsize].view(self.dtype)
        norms = torch.linalg.vector_norm(elements[:whole].view(-1, _ROW), dim=1)
        rest = elements[whole:].float()
        return float(norms.float().square().sum()) + float(rest.square().sum())

    def _sections(self, numel: int, start: int, stop: int) -> list[tuple[int, int]]:  # noqa: ARG002
        return [(start * self.dtype.itemsize, stop * self.dtype.itemsize)]


class _Blocks(Codec):
    """Integers of `bits` bits, and one scale for each block: its largest magnitude becomes the largest integer."""

    is_in_order = False
    word = torch.int8  # what the bytes of elements are taken for
    zeros = 0  # a byte of elements that are zero

    def __init__(self, name: str, bits: int) -> None:
        self.name = name
        self.bits = bits
        self.largest = 2 ** (bits - 1) - 1
        self.block_bytes = BLOCK * bits // 8

    def encoded_bytes(self, numel: int) -> int:
        return _filled_up(4 * _num_blocks(numel) + self._element_bytes(numel))

    def _element_bytes(self, numel: int) -> int:
        blocks, rest = divmod(numel, BLOCK)
        return blocks * self.block_bytes + min(rest, self.block_bytes)

    def _split(self, encoded: Tensor, numel: int) -> tuple[Tensor, Tensor]:
        """The scales and the bytes of the elements."""
        at = 4 * _num_blocks(numel)
        return encoded[:at].view(torch.float32), encoded[at : at + self._element_bytes(numel)]

    def _sections(self, numel: int, start: int, stop: int) -> list[tuple[int, int]]:
        elements = 4 * _num_blocks(numel)
        return [
            (4 * _num_blocks(start), 4 * _num_blocks(stop)),
            (elements + self._element_bytes(start), elements + self._element_bytes(stop)),
        ]

    def _encode(
        self, values: Tensor, out: Tensor, numel: int, start: int, residual: Tensor | None, minus: Tensor | None
    ) -> None:
        scales, elements = self._split(out, numel)
        out[4 * scales.numel() + elements.numel() :].zero_()
        first, whole = start // BLOCK, values.numel() // BLOCK
        scales, elements = scales[first:], elements[first * self.block_bytes :]
        self._encode_blocks(
            _rows(values, whole, BLOCK),
            None if minus is None else _rows(minus, whole, BLOCK),
            None if residual is None else _rows(residual, whole, BLOCK),
            _rows(scales, whole, 1),
            _rows(elements, whole, self.block_bytes),
        )
        if values.numel() > whole * BLOCK:
            self._encode_last(values, minus, residual, scales[whole:], elements[whole * self.block_bytes :])

    def _encode_last(
        self, values: Tensor, minus: Tensor | None, residual: Tensor | None, scale: Tensor, elements: Tensor
    ) -> None:
        """The block at the end that is not whole, as one filled up with zeros, of which only the beginning is kept."""
        rest = values.numel() % BLOCK
        block, left = torch.zeros(1, BLOCK, device="cpu"), torch.zeros(1, BLOCK, device="cpu")
        block[0, :rest] = values[-rest:] if minus is None else values[-rest:] - minus[-rest:]
        if residual is not None:
            left[0, :rest] = residual[-rest:]
        packed = torch.empty(1, self.block_bytes, dtype=torch.uint8, device="cpu")
        self._encode_blocks(block, None, left, scale.view(1, 1), packed)
        elements.copy_(packed[0, : elements.numel()])
        if residual is not None:
            residual[-rest:] = left[0, :rest]

    def _encode_blocks(
        self, values: Tensor, minus: Tensor | None, residual: Tensor | None, scales: Tensor, packed: Tensor
    ) -> None:
        """Encode [blocks, BLOCK] to scales [blocks, 1] and bytes [blocks, block_bytes].

        An operation costs what ten thousand elements cost, so there are few for each piece, and none looks for what is
        not finite before the end.
        """
        num_rows = _PIECE // BLOCK
        for piece, less, left, piece_scales, words in _pieces(
            num_rows, values, minus, residual, scales, packed.view(self.word)
        ):
            self._encode_piece(piece, less, left, piece_scales, words)
        broken = ~(scales[:, 0] < _LARGEST / self.largest)  # true for NaN too
        if broken.any():
            scales[broken] = torch.nan
            packed[broken] = self.zeros  # what NaN becomes as an integer is each processor's own affair
            if residual is not None:
                residual[broken] = 0.0

    def _encode_piece(
        self, values: Tensor, minus: Tensor | None, residual: Tensor | None, scales: Tensor, words: Tensor
    ) -> None:
        num_blocks = len(values)
        scaled, magnitudes = _first(_temporaries.scaled, num_blocks), _first(_temporaries.magnitudes, num_blocks)
        difference, inverses = _first(_temporaries.difference, num_blocks), _first(_temporaries.inverses, num_blocks)
        sent = values if minus is None else torch.sub(values, minus, out=difference)
        if residual is not None:
            sent = residual.add_(sent)
        torch.amax(torch.abs(sent, out=scaled), 1, True, out=magnitudes)
        torch.div(magnitudes.clamp_(min=_SMALLEST_SCALE * self.largest), self.largest, out=scales)
        torch.mul(sent, torch.reciprocal(scales, out=inverses), out=scaled).round_()
        self._pack(scaled, words)
        if residual is not None:
            residual.sub_(scaled.mul_(scales))

    def _decode(self, encoded: Tensor, numel: int, out: Tensor, start: int) -> None:
        scales, elements = self._split(encoded, numel)
        stop = start + out.numel()
        first, last = -(-start // BLOCK), stop // BLOCK  # blocks that are decoded whole
        if first > last:  # all within one block
            out.copy_(self._decode_one(scales, elements, last)[start - last * BLOCK : stop - last * BLOCK])
            return
        before, behind = first * BLOCK - start, stop - last * BLOCK
        if before:
            out[:before] = self._decode_one(scales, elements, first - 1)[-before:]
        words = _rows(elements[first * self.block_bytes :], last - first, self.block_bytes).view(self.word)
        pieces = zip(
            torch.split(_rows(scales[first:], last - first, 1), _DECODED_PIECE // BLOCK),
            torch.split(words, _DECODED_PIECE // BLOCK),
            torch.split(_rows(out[before:], last - first, BLOCK), _DECODED_PIECE // BLOCK),
            strict=True,
        )
        for piece_scales, piece_words, blocks in pieces:
            self._unpack(piece_words, blocks)
            blocks.mul_(piece_scales)
        if behind:
            out[-behind:] = self._decode_one(scales, elements, last)[:behind]

    def _decode_one(self, scales: Tensor, elements: Tensor, block: int) -> Tensor:
        """A whole block, of which not all need have been encoded."""
        there = elements[block * self.block_bytes : (block + 1) * self.block_bytes]
        packed = torch.zeros(1, self.block_bytes, dtype=torch.uint8, device="cpu")
        packed[0, : there.numel()] = there
        one = torch.empty(1, BLOCK, device="cpu")
        self._unpack(packed.view(self.word), one)
        return one.mul_(scales[block])[0]

    def _pack(self, integers: Tensor, words: Tensor) -> None:
        """Write integers, which are given as fp32 [blocks, BLOCK], as the words [blocks, ...] that are sent."""
        words.copy_(integers)

    def _unpack(self, words: Tensor, out: Tensor) -> None:
        """The opposite."""
        out.copy_(words)


class _Nibbles(_Blocks):
    """Two integers a byte, each + 8; four bytes at a time."""

    word = torch.int32
    zeros = 8 | 8 << 4

    def _pack(self, integers: Tensor, words: Tensor) -> None:
        num_blocks = len(integers)
        _first(_temporaries.integers, num_blocks).copy_(integers).add_(8)
        shifted = _first(_temporaries.shifted, num_blocks)
        torch.bitwise_left_shift(_first(_temporaries.high, num_blocks), 4, out=shifted)
        torch.bitwise_or(_first(_temporaries.low, num_blocks), shifted, out=words)

    def _unpack(self, words: Tensor, out: Tensor) -> None:
        num_blocks = len(out)
        shifted = _first(_temporaries.shifted, num_blocks)
        torch.bitwise_right_shift(words, 4, out=shifted)
        torch.bitwise_and(words, 0x0F0F0F0F, out=_first(_temporaries.low, num_blocks))
        torch.bitwise_and(shifted, 0x0F0F0F0F, out=_first(_temporaries.high, num_blocks))
        out.copy_(_first(_temporaries.integers, num_blocks).sub_(8))


def _pieces(length: int, *tensors: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """The same rows of each, so many at a time; nothing of those that are not there."""
    yield from zip(
        *(repeat(None) if tensor is None else torch.split(tensor, length) for tensor in tensors), strict=False
    )


def _rows(run: Tensor, num_blocks: int, width: int) -> Tensor:
    """The first `num_blocks` blocks of a run as [blocks, width]."""
    return run[: num_blocks * width].view(num_blocks, width)


def _first(temporary: Tensor, num_blocks: int) -> Tensor:
    """As much of a temporary as is needed, without the cost of a view where that is all of it."""
    return temporary if num_blocks == len(temporary) else temporary[:num_blocks]


def _num_blocks(numel: int) -> int:
    return -(-numel // BLOCK)


def _filled_up(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _require_run(values: Tensor) -> None:
    is_run = (values.dim(), values.dtype, values.device.type, values.is_contiguous()) == (1, torch.float32, "cpu", True)
    assert is_run, "values are one row of fp32 in CPU memory without gaps"


def _require_bytes(encoded: Tensor, size: int) -> None:
    is_run = (encoded.dim(), encoded.dtype, encoded.device.type, encoded.is_contiguous()) == (
        1,
        torch.uint8,
        "cpu",
        True,
    )
    assert is_run, "encoded values are one row of bytes in CPU memory without gaps"
    assert encoded.numel() == size, f"{encoded.numel():,} bytes are given where the encoding has {size:,}"


_CODECS: dict[str, Codec] = {
    "fp32": _Plain("fp32", torch.float32),
    "bf16": _Plain("bf16", torch.bfloat16),
    "int8": _Blocks("int8", 8),
    "int4": _Nibbles("int4", 4),
}
CODEC_NAMES = tuple(_CODECS)  # from the finest to the smallest


def codec(name: str) -> Codec:
    """The codec of that name; ConfigError, with the nearest name, for another."""
    if name in _CODECS:
        return _CODECS[name]
    near = get_close_matches(name, CODEC_NAMES, n=1, cutoff=0.4)
    raise ConfigError(
        f"there is no codec {name!r}; there are {', '.join(CODEC_NAMES)}", fix=near[0] if near else "bf16"
    )
