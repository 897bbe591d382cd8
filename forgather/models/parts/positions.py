"""Positions that are added to the embeddings of tokens: learned or computed."""

import torch
import torch.nn.functional as F
from torch import nn

from forgather.models.parts.buffers import ComputedBuffers


class LearnedPositions(nn.Embedding):
    """One learned vector a position; position_ids [B, L] to [B, L, D].

    A position beyond the last is a ValueError (on an accelerator one that only a cache leads to is the device's own
    assertion, as reading it would halt the queue). Source: Radford et al. 2019, GPT-2.
    """

    def __init__(self, max_position_embeddings: int, hidden_size: int) -> None:
        super().__init__(max_position_embeddings, hidden_size)

    def check_positions(self, position_ids: torch.Tensor) -> None:
        """Raise ValueError for a position beyond the last; also for whoever has values where the model has none."""
        check_positions(position_ids, self.num_embeddings)

    def forward(self, position_ids: torch.Tensor) -> torch.Tensor:
        self.check_positions(position_ids)
        return super().forward(position_ids)


class SinusoidalPositions(ComputedBuffers):
    """Sines in even channels and cosines in odd ones, wavelengths from 2 pi to 20000 pi; [B, L] to [B, L, D] float32.

    A position beyond the last is an error, as for LearnedPositions. Source: Vaswani et al. 2017, arXiv:1706.03762,
    section 3.5.
    """

    table: torch.Tensor

    def __init__(self, max_position_embeddings: int, hidden_size: int) -> None:
        super().__init__()
        self.shape = (max_position_embeddings, hidden_size)
        self.register_buffer("table", self._compute(None), persistent=False)

    def reset_buffers(self) -> None:
        self.table = self._compute(self.table.device)

    def _compute(self, device: torch.device | None) -> torch.Tensor:
        length, channels = self.shape
        positions = torch.arange(length, dtype=torch.float32, device=device)
        even = torch.arange(0, channels, 2, dtype=torch.float32, device=device)
        angles = positions[:, None] * 10_000.0 ** (-even / channels)
        return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)[:, :channels].contiguous()

    def check_positions(self, position_ids: torch.Tensor) -> None:
        """As that of LearnedPositions."""
        check_positions(position_ids, self.shape[0])

    def forward(self, position_ids: torch.Tensor) -> torch.Tensor:
        self.check_positions(position_ids)
        return F.embedding(position_ids, self.table)

    def extra_repr(self) -> str:
        return f"{self.shape[0]}, {self.shape[1]}"


def check_positions(position_ids: torch.Tensor, limit: int) -> None:
    """Raise ValueError for a position beyond `limit`, where that can be seen without halting a device's queue."""
    short = position_ids.shape[-1] <= limit
    if position_ids.is_meta or torch.compiler.is_compiling() or (short and position_ids.device.type != "cpu"):
        return
    length = int(position_ids.max()) + 1 if position_ids.numel() else 0
    if length > limit:
        raise ValueError(
            f"a sequence of {length} tokens is longer than the {limit} positions that the model has: "
            f"shorten it, or make the model with a larger max_position_embeddings"
        )
