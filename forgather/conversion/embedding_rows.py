"""An embedding, or a head, with more rows than it had. Shapes: V rows, D columns (none for a bias)."""

from collections.abc import Collection, Mapping

import torch

from forgather.conversion.token_additions import MEAN, ZERO

_ROWS_AT_ONCE = 4096


def with_rows(
    weight_VD: torch.Tensor, num_rows: int, in_use: Collection[int], inits: Mapping[int, str | int]
) -> torch.Tensor:
    """`weight_VD` followed by rows up to `num_rows`, and the rows of `inits` as these say; every other row as it was.

    `in_use` are the rows that had a token before: the mean is theirs, and so it is in rows for no token, which a head
    then ranks in the middle and not, as rows of zeros would be, above whatever is unlikely. Rows are filled in the
    order of `inits`, so one may copy another that comes before it.
    """
    grown = weight_VD.new_empty(num_rows, *weight_VD.shape[1:])
    grown[: len(weight_VD)] = weight_VD
    mean = _mean(weight_VD, in_use)
    grown[len(weight_VD) :] = mean
    for row, init in inits.items():
        if isinstance(init, int):
            grown[row] = grown[init]
        else:
            grown[row] = {ZERO: torch.zeros_like(mean), MEAN: mean}[init]
    return grown


def _mean(weight_VD: torch.Tensor, rows: Collection[int]) -> torch.Tensor:
    """Of these rows, summed in float64 a part at a time, which needs no second embedding in memory."""
    parts = torch.split(torch.tensor(sorted(rows)), _ROWS_AT_ONCE)
    total = torch.stack([weight_VD[part].sum(dim=0, dtype=torch.float64) for part in parts]).sum(dim=0)
    return (total / len(rows)).to(weight_VD.dtype)
