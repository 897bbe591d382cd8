"""What every codec is: runs of fp32 values become bytes and values again, whole or in parts of whole blocks.

All is done in pieces that stay in a core's cache, in memory that is taken once a thread.
"""

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

BLOCK = 128  # elements that share a scale; 64 bytes of int4, 128 of int8
PIECE = 512 * BLOCK  # elements: values, residual and temporaries are then less than 1 MiB, a core's second cache
DECODED_PIECE = 2 * PIECE  # which has no values and no residual beside it
_STEP = 4 * PIECE  # elements that are encoded before their bytes can be used, where these are in their order
_ALIGNMENT = 8  # bytes: a run behind another one begins where numbers of any type may lie


class Temporaries(threading.local):
    """Memory of one piece, each thread's own."""

    def __init__(self) -> None:
        encoded, decoded = PIECE // BLOCK, DECODED_PIECE // BLOCK
        # Memory that came to be in inference mode could not be written to outside of it.
        with torch.inference_mode(False):
            self.scaled = torch.empty(encoded, BLOCK, dtype=torch.float32, device="cpu")
            self.difference = torch.empty_like(self.scaled)
            self.magnitudes = torch.empty(encoded, 1, dtype=torch.float32, device="cpu")
            self.inverses = torch.empty(encoded, 1, dtype=torch.float32, device="cpu")
            self.integers = torch.empty(decoded, BLOCK, dtype=torch.int8, device="cpu")
            self.low, self.high = self.integers.view(torch.int32).chunk(2, 1)
            self.shifted = torch.empty_like(self.high)


temporaries = Temporaries()


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
        room = torch.empty(min(numel, DECODED_PIECE))
        total = 0.0
        for start in range(0, numel, DECODED_PIECE):
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


def in_pieces(length: int, *tensors: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """The same rows of each, so many at a time; nothing of those that are not there."""
    yield from zip(
        *(repeat(None) if tensor is None else torch.split(tensor, length) for tensor in tensors), strict=False
    )


def filled_up(size: int) -> int:
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
