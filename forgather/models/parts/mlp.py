"""Feed-forward networks."""

import torch
from torch import nn
from transformers.activations import ACT2FN


class GatedMLP(nn.Module):
    """down(activation(gate(x)) * up(x)); [B, L, D] to [B, L, D], through F inside.

    `activation` is one of transformers' names; with silu this is SwiGLU. `dropout` is between the product and `down`.
    Source: Shazeer 2020, "GLU Variants Improve Transformer", arXiv:2002.05202.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        intermediate_size: int,
        activation: str = "silu",
        bias: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)
        self.act_fn = activation_function(activation)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden_BLD: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.dropout(self.act_fn(self.gate_proj(hidden_BLD)) * self.up_proj(hidden_BLD)))


class MLP(nn.Module):
    """down(activation(up(x))); [B, L, D] to [B, L, D], through F inside.

    `activation` is one of transformers' names; `dropout` is between it and `down`. Source: Vaswani et al. 2017,
    arXiv:1706.03762, section 3.3.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        intermediate_size: int,
        activation: str = "gelu",
        bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)
        self.act_fn = activation_function(activation)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden_BLD: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.dropout(self.act_fn(self.up_proj(hidden_BLD))))


def activation_function(name: str) -> nn.Module:
    """The activation that transformers knows by this name; ValueError if there is none."""
    if name not in ACT2FN:
        raise ValueError(f"unknown activation '{name}'; there are: {', '.join(sorted(ACT2FN))}")
    activation: nn.Module = ACT2FN[name]
    return activation
