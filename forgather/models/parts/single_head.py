"""Attention of one head without queries of its own, for looking into."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

from forgather.models.parts.alibi import Alibi
from forgather.models.parts.self_attention import SelfAttention


class SingleHeadAttention(SelfAttention):
    """One causal head with two matrices in place of four: x W x^T / sqrt(D) are its scores; [B, L, D] to [B, L, D].

    The product of the query and key matrices of a full-width head is one D x D matrix, and so is that of its value and
    output matrices; this head has the products themselves: `query_key_proj` and `value_proj`, with `bias` in both. The
    keys are the hidden states as they come, which is what a cache keeps of them. It knows no positions but those in
    the hidden states, and `alibi`. Source of the view: Elhage et al. 2021, "A Mathematical Framework for Transformer
    Circuits" (QK and OV circuits).
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        layer_idx: int,
        *,
        hidden_size: int,
        bias: bool = True,
        dropout: float = 0.0,
        alibi: Alibi | None = None,
    ) -> None:
        if hidden_size < 1:
            raise ValueError(f"hidden_size is {hidden_size}; it must be at least 1")
        super().__init__(
            config,
            layer_idx,
            num_heads=1,
            num_kv_heads=1,
            scaling=hidden_size**-0.5,
            dropout=dropout,
            sliding_window=None,
            softcap=None,
            rotary=False,
            alibi=alibi,
        )
        self.query_key_proj = nn.Linear(hidden_size, hidden_size, bias=bias)
        self.value_proj = nn.Linear(hidden_size, hidden_size, bias=bias)

    def forward(
        self,
        hidden_BLD: torch.Tensor,
        *,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        position_embeddings: None = None,  # noqa: ARG002  what other kinds of attention take
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The output [B, L, D], and the weights [B, 1, L, S] where the implementation has them (eager)."""
        output_BLHC, weights = self.attend(
            self.query_key_proj(hidden_BLD).unsqueeze(1),
            hidden_BLD.unsqueeze(1),
            self.value_proj(hidden_BLD).unsqueeze(1),
            attention_mask,
            past_key_values,
            **kwargs,
        )
        return output_BLHC.squeeze(2), weights
