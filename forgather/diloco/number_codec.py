"""fp32 and bf16: each element by itself, as a number of another type, or of the same."""

import torch
from torch import Tensor

from forgather.diloco.encoding import PIECE, Codec, filled_up, in_pieces, temporaries

_ROW = 4096  # elements whose norm is taken at once
_MANY_ROWS = 64  # so many that the rounding of their norms averages out


class NumberCodec(Codec):
    """Each element by itself, as a number of another type, or of the same."""

    is_in_order = True

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self.name = name
        self.dtype = dtype

    def encoded_bytes(self, numel: int) -> int:
        return filled_up(numel * self.dtype.itemsize)

    def _encode(
        self, values: Tensor, out: Tensor, numel: int, start: int, residual: Tensor | None, minus: Tensor | None
    ) -> None:
        size = numel * self.dtype.itemsize
        encoded = out[:size].view(self.dtype)[start : start + values.numel()]
        out[size:].zero_()
        if residual is None and minus is None:
            encoded.copy_(values)
            return
        scratch = temporaries.scaled.view(-1)
        for piece, less, left, sent in in_pieces(PIECE, values, minus, residual, encoded):
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
