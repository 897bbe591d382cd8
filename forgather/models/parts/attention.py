"""Attention with grouped heads, in whichever implementation transformers has."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from forgather.models.parts.rotary import rotate


class Attention(nn.Module):
    """Causal self-attention in which H query heads share K key/value heads; [B, L, D] to [B, L, D].

    Which kernel runs is looked up at each call from the config, so `model.set_attn_implementation("eager")` works on a
    model that exists. `sliding_window` limits a token to itself and the `sliding_window - 1` tokens before it. Sources:
    Vaswani et al. 2017, arXiv:1706.03762; grouped heads: Ainslie et al. 2023, "GQA", arXiv:2305.13245.
    """

    is_causal = True  # transformers' implementations read these two from the module
    num_key_value_groups: int

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
        dropout: float = 0.0,
        sliding_window: int | None = None,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if head_dim is None and hidden_size % num_heads:
            step = 2 * num_heads  # rotary positions need an even number of channels a head
            fitting = sorted({max(step, hidden_size // step * step), -(-hidden_size // step) * step})
            raise ValueError(
                f"hidden_size {hidden_size} is not a multiple of num_attention_heads {num_heads}: "
                f"a hidden_size of {' or '.join(map(str, fitting))} would be"
            )
        if num_heads % num_kv_heads:
            raise ValueError(f"num_attention_heads {num_heads} is not a multiple of num_key_value_heads {num_kv_heads}")
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = head_dim or hidden_size // num_heads
        if self.head_dim % 2:
            raise ValueError(
                f"a head has {self.head_dim} channels; rotary positions turn pairs and need an even number"
            )
        self.num_key_value_groups = num_heads // num_kv_heads
        self.scaling = self.head_dim**-0.5
        self.dropout = dropout
        self.sliding_window = sliding_window
        self.q_proj = nn.Linear(hidden_size, num_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(num_heads * self.head_dim, hidden_size, bias=bias)

    @property
    def attention_type(self) -> str:
        """Which of the decoder's masks this layer needs, in transformers' words."""
        return "full_attention" if self.sliding_window is None else "sliding_attention"

    def forward(
        self,
        hidden_BLD: torch.Tensor,
        *,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The output [B, L, D], and the weights [B, H, L, S] where the implementation has them (eager)."""
        rows, tokens, _ = hidden_BLD.shape
        heads = (rows, tokens, -1, self.head_dim)
        query_BHLC = self.q_proj(hidden_BLD).view(heads).transpose(1, 2)
        key_BKLC = self.k_proj(hidden_BLD).view(heads).transpose(1, 2)
        value_BKLC = self.v_proj(hidden_BLD).view(heads).transpose(1, 2)

        cos, sin = position_embeddings
        query_BHLC, key_BKLC = rotate(query_BHLC, cos, sin), rotate(key_BKLC, cos, sin)
        if past_key_values is not None:
            key_BKLC, value_BKLC = past_key_values.update(key_BKLC, value_BKLC, self.layer_idx)

        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        output_BLHC, weights = attend(
            self,
            query_BHLC,
            key_BKLC,
            value_BKLC,
            attention_mask,
            dropout=self.dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        return self.o_proj(output_BLHC.reshape(rows, tokens, -1)), weights


def eager_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,  # noqa: ARG001  what other implementations take
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention as the formula is written, with the signature of transformers' attention functions.

    Returns the output [B, L, H, C] and the weights [B, H, L, S]; `attention_mask` [B, 1, L, S] is added to the scores.
    """
    groups: int = module.num_key_value_groups  # type: ignore[assignment]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores_BHLS = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores_BHLS = scores_BHLS + attention_mask
    weights_BHLS = F.softmax(scores_BHLS, dim=-1, dtype=torch.float32).to(query.dtype)
    weights_BHLS = F.dropout(weights_BHLS, p=dropout, training=module.training)
    return torch.matmul(weights_BHLS, value).transpose(1, 2), weights_BHLS
