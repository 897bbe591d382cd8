"""Output heads beyond torch.nn.Linear."""

import torch
from torch import nn


class SoftcappedLinear(nn.Linear):
    """Logits bounded to (-softcap, softcap): softcap * tanh(linear(x) / softcap); [B, L, D] to [B, L, V].

    With `softcap=None` they are those of a plain linear head; `output_head` makes such a head, whose loss can be
    computed without the logits. Source: Gemma Team 2024, "Gemma 2", arXiv:2408.00118, section 2.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = False, softcap: float | None = None) -> None:
        super().__init__(in_features, out_features, bias)
        if softcap is not None and softcap <= 0:
            raise ValueError(f"softcap is {softcap}; it must be above 0, or null for none")
        self.softcap = softcap

    def forward(self, hidden_BLD: torch.Tensor) -> torch.Tensor:
        logits_BLV = super().forward(hidden_BLD)
        return logits_BLV if self.softcap is None else self.softcap * torch.tanh(logits_BLV / self.softcap)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, softcap={self.softcap}"


def output_head(in_features: int, out_features: int, *, bias: bool = False, softcap: float | None = None) -> nn.Linear:
    """A soft-capped head where there is a cap, and torch's own where there is none."""
    if softcap is None:
        return nn.Linear(in_features, out_features, bias)
    return SoftcappedLinear(in_features, out_features, bias, softcap)
