"""int8 and int4: integers in blocks that share a scale."""

import torch
from torch import Tensor

from forgather.diloco.encoding import BLOCK, DECODED_PIECE, PIECE, Codec, filled_up, in_pieces, temporaries

_LARGEST = 2.0**127  # more would not survive to be scaled back
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny  # the smallest normal number


class BlockCodec(Codec):
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
        return filled_up(4 * _num_blocks(numel) + self._element_bytes(numel))

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
        num_rows = PIECE // BLOCK
        for piece, less, left, piece_scales, words in in_pieces(
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
        scaled, magnitudes = _first(temporaries.scaled, num_blocks), _first(temporaries.magnitudes, num_blocks)
        difference, inverses = _first(temporaries.difference, num_blocks), _first(temporaries.inverses, num_blocks)
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
            torch.split(_rows(scales[first:], last - first, 1), DECODED_PIECE // BLOCK),
            torch.split(words, DECODED_PIECE // BLOCK),
            torch.split(_rows(out[before:], last - first, BLOCK), DECODED_PIECE // BLOCK),
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


class NibbleCodec(BlockCodec):
    """Two integers a byte, each + 8; four bytes at a time."""

    word = torch.int32
    zeros = 8 | 8 << 4

    def _pack(self, integers: Tensor, words: Tensor) -> None:
        num_blocks = len(integers)
        _first(temporaries.integers, num_blocks).copy_(integers).add_(8)
        shifted = _first(temporaries.shifted, num_blocks)
        torch.bitwise_left_shift(_first(temporaries.high, num_blocks), 4, out=shifted)
        torch.bitwise_or(_first(temporaries.low, num_blocks), shifted, out=words)

    def _unpack(self, words: Tensor, out: Tensor) -> None:
        num_blocks = len(out)
        shifted = _first(temporaries.shifted, num_blocks)
        torch.bitwise_right_shift(words, 4, out=shifted)
        torch.bitwise_and(words, 0x0F0F0F0F, out=_first(temporaries.low, num_blocks))
        torch.bitwise_and(shifted, 0x0F0F0F0F, out=_first(temporaries.high, num_blocks))
        out.copy_(_first(temporaries.integers, num_blocks).sub_(8))


def _rows(run: Tensor, num_blocks: int, width: int) -> Tensor:
    """The first `num_blocks` blocks of a run as [blocks, width]."""
    return run[: num_blocks * width].view(num_blocks, width)


def _first(temporary: Tensor, num_blocks: int) -> Tensor:
    """As much of a temporary as is needed, without the cost of a view where that is all of it."""
    return temporary if num_blocks == len(temporary) else temporary[:num_blocks]


def _num_blocks(numel: int) -> int:
    return -(-numel // BLOCK)
