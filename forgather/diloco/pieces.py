"""A box of a tensor in pieces that stay in the processor's cache, in row-major order, without a copy."""

from collections.abc import Iterator

from torch import Tensor

from forgather.diloco.messages import Slice

PIECE = 1 << 18  # elements: 1 MiB of fp32


def box_of(tensor: Tensor, part: Slice) -> Tensor:
    """The view of a slice in the whole parameter."""
    view = tensor
    for dim, (start, size) in enumerate(zip(part.offsets, part.sizes, strict=True)):
        view = view.narrow(dim, start, size)
    return view


def pieces(box: Tensor, most: int = PIECE, start: int = 0) -> Iterator[tuple[int, Tensor]]:
    """Views of `box` of at most `most` elements, each with the number of its first element in row-major order."""
    if not box.numel():
        return
    if box.is_contiguous():
        flat = box.view(-1)
        for first in range(0, len(flat), most):
            yield start + first, flat[first : first + most]
        return
    inner = box.numel() // box.shape[0]
    if inner > most:
        for row in range(box.shape[0]):
            yield from pieces(box[row], most, start + row * inner)
        return
    rows = most // inner
    for first in range(0, box.shape[0], rows):
        yield start + first * inner, box[first : first + rows]
