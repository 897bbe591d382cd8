"""Normalisation of hidden states; for LayerNorm there is torch.nn.LayerNorm."""

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


class GemmaRMSNorm(RMSNorm):
    """RMSNorm whose learned weight counts from one: scaled by 1 + weight, and the weight starts at 0.

    The weight is applied in float32, before the result takes the dtype of the input: so weight decay pulls towards a
    plain norm, and a bfloat16 weight keeps its resolution near zero. Source: the reference code of Gemma (Gemma Team
    2024, arXiv:2403.08295).
    """

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)

    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__(hidden_size, eps)
        self.reset_parameters()

    def forward(self, hidden_BLD: torch.Tensor) -> torch.Tensor:
        scale_D = 1.0 + self.weight.float()
        return F.rms_norm(hidden_BLD.float(), self.weight.shape, scale_D, self.eps).type_as(hidden_BLD)
