"""Normalisation of hidden states."""

import torch
import torch.nn.functional as F
from torch import nn


class RMSNorm(nn.Module):
    """Scales each token to a root mean square of one, then by a learned weight; [..., D] to [..., D].

    The mean is taken in float32 whatever the dtype of the input. Source: Zhang and Sennrich 2019,
    "Root Mean Square Layer Normalization", arXiv:1910.07467.
    """

    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, hidden_BLD: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(hidden_BLD, self.weight.shape, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"
