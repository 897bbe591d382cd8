"""Causal self-attention from projected heads on: cache, bias, and whichever implementation transformers has."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from forgather.models.parts.alibi import Alibi


class SelfAttention(nn.Module):
    """What the kinds of attention share: `attend`, and what the decoder asks of a layer.

    Which kernel runs is looked up at each call from the config, so `model.set_attn_implementation("eager")` works on a
    model that exists. `sliding_window` limits a token to itself and the `sliding_window - 1` tokens before it;
    `softcap` bounds the scores to (-softcap, softcap) by a tanh, as Gemma 2 does (arXiv:2408.00118, section 2).
    """

    is_causal = True  # transformers' implementations read these three from the module
    num_key_value_groups: int
    layer_idx: int

    def __init__(
        self,
        config: PreTrainedConfig,
        layer_idx: int,
        *,
        num_heads: int,
        num_kv_heads: int,
        scaling: float,
        dropout: float,
        sliding_window: int | None,
        softcap: float | None,
        rotary: bool,
        alibi: Alibi | None,
    ) -> None:
        super().__init__()
        if alibi is not None and alibi.num_heads != num_heads:
            raise ValueError(f"alibi has slopes for {alibi.num_heads} heads, the attention has {num_heads}")
        if softcap is not None and softcap <= 0:
            raise ValueError(f"softcap is {softcap}; it must be above 0, or null for none")
        if sliding_window is not None and sliding_window < 1:
            raise ValueError(f"sliding_window is {sliding_window}; it must be at least 1, or null for none")
        self.config = config
        self.layer_idx = layer_idx
        self.num_key_value_groups = num_heads // num_kv_heads
        self.scaling = scaling
        self.dropout = dropout
        self.sliding_window = sliding_window
        self.softcap = softcap
        self.rotary = rotary
        self.alibi = alibi

    @property
    def attention_type(self) -> str:
        """Which of the decoder's masks this layer needs, in transformers' words."""
        return "full_attention" if self.sliding_window is None else "sliding_attention"

    def refusal(self, implementation: str) -> str | None:
        """Why the attention implementation of that name cannot compute this attention, or None."""
        if self.softcap is not None and "sdpa" in implementation:
            return f"{implementation} has no soft-cap for scores: use eager, flex_attention or flash_attention_2"
        if self.alibi is not None and implementation not in ("eager", "sdpa", "flex_attention"):
            return f"{implementation} takes no bias on scores, which ALiBi is: use eager, sdpa or flex_attention"
        return None

    def attend(
        self,
        query_BHLC: torch.Tensor,
        key_BKLC: torch.Tensor,
        value_BKLC: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The output [B, L, H, C], and the weights [B, H, L, S] where the implementation has them (eager)."""
        implementation: str = self.config._attn_implementation
        if self.alibi is not None:
            kwargs["position_bias"] = self._bias(query_BHLC, past_key_values)
        if self.softcap is not None:
            kwargs["softcap"] = self.softcap
        if past_key_values is not None:
            key_BKLC, value_BKLC = past_key_values.update(key_BKLC, value_BKLC, self.layer_idx)
        function = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention)
        return function(
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

    def _bias(self, query_BHLC: torch.Tensor, past_key_values: Cache | None) -> torch.Tensor:
        """ALiBi's bias [1 or B, H, L, S] for what the cache will hold once it has taken the new keys."""
        assert self.alibi is not None, "called for ALiBi only"
        rows, _, tokens, _ = query_BHLC.shape
        query_start: int | torch.Tensor = 0
        num_keys, key_start = tokens, 0
        if past_key_values is not None:  # asked as for masks; a static cache counts in a tensor that it will change
            query_start = past_key_values.get_query_offset(self.layer_idx)
            num_keys, key_start = past_key_values.get_mask_sizes(tokens, self.layer_idx)
        device = query_BHLC.device
        query_index_L = torch.arange(tokens, device=device) + query_start
        bias_1HLS = self.alibi(query_index_L, torch.arange(num_keys, device=device) + key_start, query_BHLC.dtype)
        # flex_attention reads the bias of each row; a view costs nothing there, but sdpa would fill it out.
        return bias_1HLS.expand(rows, -1, -1, -1) if self.config._attn_implementation == "flex_attention" else bias_1HLS


def eager_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    position_bias: torch.Tensor | None = None,
    **kwargs: Any,  # noqa: ARG001  what other implementations take
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention as the formula is written, with the signature of transformers' attention functions.

    Returns the output [B, L, H, C] and the weights [B, H, L, S]; `attention_mask` [B, 1, L, S] and `position_bias`
    [1 or B, H, L, S] are added to the scores, after the soft-cap.
    """
    groups: int = module.num_key_value_groups  # type: ignore[assignment]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores_BHLS = torch.matmul(query, key.transpose(2, 3)) * scaling
    if softcap is not None:
        scores_BHLS = softcap * torch.tanh(scores_BHLS / softcap)
    if position_bias is not None:
        scores_BHLS = scores_BHLS + position_bias
    if attention_mask is not None:
        scores_BHLS = scores_BHLS + attention_mask
    weights_BHLS = F.softmax(scores_BHLS, dim=-1, dtype=torch.float32).to(query.dtype)
    weights_BHLS = F.dropout(weights_BHLS, p=dropout, training=module.training)
    return torch.matmul(weights_BHLS, value).transpose(1, 2), weights_BHLS
