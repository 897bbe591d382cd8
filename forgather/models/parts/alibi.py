"""Attention with linear biases: the further back a key is, the less it counts."""

import torch
from torch import nn
from transformers import initialization as init

from forgather.models.parts.buffers import ComputedBuffers


class Alibi(ComputedBuffers):
    """Adds slope * (key index - query index) to the scores of each head, in place of positions in the hidden states.

    `slopes` is how they begin over H heads: "default" falls geometrically from 1 to 1/128; "half" from 1/2 to 1/256,
    with the second half of the heads at 0, which see all distances alike. With `trainable` they are a parameter [H],
    otherwise a float32 buffer that no checkpoint holds. Source: Press et al. 2021, "Train Short, Test Long",
    arXiv:2108.12409 (with slopes from 1/2 to 1/256).
    """

    slopes: torch.Tensor

    def __init__(self, num_heads: int, *, trainable: bool = False, slopes: str = "default") -> None:
        super().__init__()
        if num_heads < 1:
            raise ValueError(f"num_heads is {num_heads}; it must be at least 1")
        if slopes not in ("default", "half"):
            raise ValueError(f"unknown slopes '{slopes}'; there are: default, half")
        self.num_heads = num_heads
        self.start = slopes
        values = self._first_slopes(None)
        if trainable:
            self.slopes = nn.Parameter(values.to(torch.get_default_dtype()))
        else:
            self.register_buffer("slopes", values, persistent=False)

    def reset_parameters(self) -> None:
        init.copy_(self.slopes, self._first_slopes(self.slopes.device))

    def reset_buffers(self) -> None:
        if not isinstance(self.slopes, nn.Parameter):
            self.slopes = self._first_slopes(self.slopes.device)

    def _first_slopes(self, device: torch.device | None) -> torch.Tensor:
        """[H] float32."""
        first = 0.0 if self.start == "default" else -1.0
        exponents = torch.linspace(first, first - 7, self.num_heads, dtype=torch.float32, device=device)
        slopes = torch.exp2(exponents)
        if self.start == "half":
            slopes[(self.num_heads + 1) // 2 :] = 0.0
        return slopes

    def forward(self, query_index_L: torch.Tensor, key_index_S: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The bias [1, H, L, S]: made for the call and not kept.

        Indices count tokens of the row. Within a document they differ as positions do, and attention masks what is
        outside, so packed and padded rows need nothing else.
        """
        distance_LS = key_index_S[None, :] - query_index_L[:, None]
        return (self.slopes.float()[:, None, None] * distance_LS).to(dtype).unsqueeze(0)

    def extra_repr(self) -> str:
        return f"{self.num_heads}, slopes={self.start}, trainable={isinstance(self.slopes, nn.Parameter)}"
