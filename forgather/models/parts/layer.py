"""Layers of a decoder: how attention, feed-forward and normalisation stand to the residual stream."""

from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


class PreNormLayer(GradientCheckpointingLayer):
    """x + attention(norm(x)), then x + mlp(norm(x)); [B, L, D] to [B, L, D].

    The residual stream itself is never normalised, so gradients reach every layer undamped. The names of the children
    are those of Hugging Face's Llama. Source: Xiong et al. 2020, "On Layer Normalization in the Transformer
    Architecture", arXiv:2002.04745.
    """

    def __init__(
        self,
        *,
        self_attn: nn.Module,
        mlp: nn.Module,
        input_layernorm: nn.Module,
        post_attention_layernorm: nn.Module,
    ) -> None:
        super().__init__()
        self.self_attn = self_attn
        self.mlp = mlp
        self.input_layernorm = input_layernorm
        self.post_attention_layernorm = post_attention_layernorm

    @property
    def attention_type(self) -> str:
        """Which of the decoder's masks this layer needs, in transformers' words."""
        return str(self.self_attn.attention_type)

    def forward(self, hidden_BLD: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        # The hidden states come by position: recomputation in backward follows gradients through positionals only.
        attended_BLD, _ = self.self_attn(self.input_layernorm(hidden_BLD), **kwargs)
        hidden_BLD = hidden_BLD + attended_BLD
        return hidden_BLD + self.mlp(self.post_attention_layernorm(hidden_BLD))
