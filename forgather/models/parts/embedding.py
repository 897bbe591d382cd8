"""Embeddings of tokens; the plain one is torch.nn.Embedding."""

import math

import torch
from torch import nn


class ScaledEmbedding(nn.Embedding):
    """Token embeddings times a constant; [B, L] to [B, L, D].

    `scale` is a number, or "sqrt" for sqrt(D): what is drawn with a standard deviation of 1 / sqrt(D), as suits a head
    tied to it, then enters the layers with one of 1. The constant is rounded to the dtype of the weight, as Gemma's was
    when its weights were trained. Sources: Vaswani et al. 2017, arXiv:1706.03762, section 3.4; Gemma Team 2024,
    arXiv:2403.08295.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        padding_idx: int | None = None,
        scale: str | float = "sqrt",
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, padding_idx)
        if isinstance(scale, str) and scale != "sqrt":
            raise ValueError(f"unknown scale '{scale}'; it is a number, or sqrt for the root of the hidden size")
        self.scale = math.sqrt(embedding_dim) if isinstance(scale, str) else float(scale)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        embedded_BLD = super().forward(input_ids)
        return embedded_BLD * torch.tensor(self.scale, dtype=embedded_BLD.dtype, device="cpu")  # a number to any device

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scale={self.scale:g}"
