"""Feed-forward networks."""

import torch
from torch import nn
from transformers.activations import ACT2FN


class GatedMLP(nn.Module):
    """down(activation(gate(x)) * up(x)); [B, L, D] to [B, L, D], through F inside.

    `activation` is one of transformers' names; with silu this is SwiGLU. Source: Shazeer 2020, "GLU Variants Improve
    Transformer", arXiv:2002.05202.
    """

    def __init__(
        self, *, hidden_size: int, intermediate_size: int, activation: str = "silu", bias: bool = False
    ) -> None:
        super().__init__()
        if activation not in ACT2FN:
            raise ValueError(f"unknown activation '{activation}'; there are: {', '.join(sorted(ACT2FN))}")
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)
        self.act_fn = ACT2FN[activation]

    def forward(self, hidden_BLD: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(hidden_BLD)) * self.up_proj(hidden_BLD))
