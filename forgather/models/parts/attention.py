"""Attention with grouped heads, in whichever implementation transformers has."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

from forgather.models.parts.alibi import Alibi
from forgather.models.parts.rotary import rotate
from forgather.models.parts.self_attention import SelfAttention


class Attention(SelfAttention):
    """Causal self-attention in which H query heads share K key/value heads; [B, L, D] to [B, L, D].

    Options: `head_dim` (D / H), which need not divide D; `bias` of the projections, `output_bias` of the last one (as
    the others); `scaling` of the scores (head_dim ** -0.5); `q_norm` and `k_norm`, modules over head_dim that queries
    and keys pass before they are turned (QK-norm: Henry et al. 2020, arXiv:2010.04245, as in Qwen3 and Gemma 3);
    `rotary=False` for a layer without rotary positions (NoPE: Kazemnejad et al. 2023, arXiv:2305.19466); `alibi`.
    Sources: Vaswani et al. 2017, arXiv:1706.03762; grouped heads: Ainslie et al. 2023, "GQA", arXiv:2305.13245.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        layer_idx: int,
        *,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = False,
        output_bias: bool | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        scaling: float | None = None,
        softcap: float | None = None,
        q_norm: nn.Module | None = None,
        k_norm: nn.Module | None = None,
        rotary: bool = True,
        alibi: Alibi | None = None,
    ) -> None:
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        head_dim = checked_head_dim(hidden_size, num_heads, num_kv_heads, head_dim, rotary=rotary)
        super().__init__(
            config,
            layer_idx,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            scaling=head_dim**-0.5 if scaling is None else scaling,
            dropout=dropout,
            sliding_window=sliding_window,
            softcap=softcap,
            rotary=rotary,
            alibi=alibi,
        )
        self.head_dim = head_dim
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=bias if output_bias is None else output_bias)
        self.q_norm = q_norm
        self.k_norm = k_norm

    def forward(
        self,
        hidden_BLD: torch.Tensor,
        *,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The output [B, L, D], and the weights [B, H, L, S] where the implementation has them (eager)."""
        rows, tokens, _ = hidden_BLD.shape
        heads = (rows, tokens, -1, self.head_dim)
        query_BLHC = self.q_proj(hidden_BLD).view(heads)
        key_BLKC = self.k_proj(hidden_BLD).view(heads)
        if self.q_norm is not None:
            query_BLHC = self.q_norm(query_BLHC)
        if self.k_norm is not None:
            key_BLKC = self.k_norm(key_BLKC)
        query_BHLC, key_BKLC = query_BLHC.transpose(1, 2), key_BLKC.transpose(1, 2)
        if self.rotary:
            assert position_embeddings is not None, "the decoder gives cosines and sines to layers that turn"
            cos, sin = position_embeddings
            query_BHLC, key_BKLC = rotate(query_BHLC, cos, sin), rotate(key_BKLC, cos, sin)
        value_BKLC = self.v_proj(hidden_BLD).view(heads).transpose(1, 2)
        output_BLHC, weights = self.attend(query_BHLC, key_BKLC, value_BKLC, attention_mask, past_key_values, **kwargs)
        return self.o_proj(output_BLHC.reshape(rows, tokens, -1)), weights


def checked_head_dim(hidden_size: int, num_heads: int, num_kv_heads: int, head_dim: int | None, *, rotary: bool) -> int:
    """The channels of a head; ValueError for sizes that do not fit together, with such as would."""
    sizes = {"hidden_size": hidden_size, "num_attention_heads": num_heads, "num_key_value_heads": num_kv_heads}
    for name, size in (sizes if head_dim is None else sizes | {"head_dim": head_dim}).items():
        if size < 1:
            raise ValueError(f"{name} is {size}; it must be at least 1")
    if head_dim is None and hidden_size % num_heads:
        step = 2 * num_heads if rotary else num_heads  # rotary positions need an even number of channels a head
        fitting = sorted({max(step, hidden_size // step * step), -(-hidden_size // step) * step})
        raise ValueError(
            f"hidden_size {hidden_size} is not a multiple of num_attention_heads {num_heads}: "
            f"a hidden_size of {' or '.join(map(str, fitting))} would be"
        )
    if num_heads % num_kv_heads:
        raise ValueError(f"num_attention_heads {num_heads} is not a multiple of num_key_value_heads {num_kv_heads}")
    head_dim = hidden_size // num_heads if head_dim is None else head_dim
    if rotary and head_dim % 2:
        raise ValueError(f"a head has {head_dim} channels; rotary positions turn pairs and need an even number")
    return head_dim
