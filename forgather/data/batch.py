"""What a training step eats: rows of tokens, what follows each, and where documents begin. Shapes: B rows, L tokens."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Self

import torch
import xxhash
from torch import Tensor

NO_TARGET = -100  # what torch's cross-entropy ignores by default


@dataclass(frozen=True)
class Batch:
    """B rows of L tokens with their targets already shifted; documents are told apart by `position_ids`.

    `targets[b, i]` is the token after `input_ids[b, i]`, or -100 where there is none to learn (a document's last
    token, padding). `position_ids` restart at 0 with every document, which is how transformers' masks keep the
    documents of a row apart. `samples` are the global sample numbers of the rows; padding rows have none.
    """

    input_ids: Tensor  # [B, L] int64
    targets: Tensor  # [B, L] int64
    position_ids: Tensor  # [B, L] int64
    num_targets: int  # on the host, so that the divisor of the loss costs no synchronisation
    samples: tuple[int, ...]

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Self:
        """The same batch with its tensors on `device`."""
        return replace(
            self,
            input_ids=self.input_ids.to(device, non_blocking=non_blocking),
            targets=self.targets.to(device, non_blocking=non_blocking),
            position_ids=self.position_ids.to(device, non_blocking=non_blocking),
        )

    def digest(self) -> str:
        """A hash of all rows with their sample numbers; see `combine_digests` for how ranks add theirs up."""
        stacked = torch.stack([self.input_ids, self.targets, self.position_ids], dim=1).cpu()
        return combine_digests(_row_digest(n, row) for n, row in zip(self.samples, stacked, strict=False))


def combine_digests(digests: Iterable[str]) -> str:
    """The digest of the union of batches: a sum, so any split over ranks and microbatches gives the same one.

    A row's digest holds its sample number, so the same rows in another order still give another digest.
    """
    return f"{sum(int(digest, 16) for digest in digests) % 2**64:016x}"


def _row_digest(sample: int, row: Tensor) -> str:
    return xxhash.xxh3_64_hexdigest(sample.to_bytes(8, "little") + row.contiguous().numpy().tobytes())
