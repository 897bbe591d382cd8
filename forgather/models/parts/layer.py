"""Layers of a decoder: how attention, feed-forward and normalisation stand to the residual stream.

Each takes [B, L, D] to [B, L, D]; `dropout` is on what a branch adds to the stream. The names of the children are those
of Hugging Face's Llama and Gemma.
"""

from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


class DecoderLayer(GradientCheckpointingLayer):
    """What the layers share: attention, and dropout of the branches."""

    def __init__(self, *, self_attn: nn.Module, dropout: float) -> None:
        super().__init__()
        self.self_attn = self_attn
        self.dropout = nn.Dropout(dropout)

    @property
    def attention_type(self) -> str:
        """Which of the decoder's masks this layer needs, in transformers' words."""
        return str(self.self_attn.attention_type)


class PreNormLayer(DecoderLayer):
    """x + attention(norm(x)), then x + mlp(norm(x)).

    The residual stream itself is never normalised, so gradients reach every layer undamped. Source: Xiong et al. 2020,
    "On Layer Normalization in the Transformer Architecture", arXiv:2002.04745.
    """

    def __init__(
        self,
        *,
        self_attn: nn.Module,
        mlp: nn.Module,
        input_layernorm: nn.Module,
        post_attention_layernorm: nn.Module,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(self_attn=self_attn, dropout=dropout)
        self.mlp = mlp
        self.input_layernorm = input_layernorm
        self.post_attention_layernorm = post_attention_layernorm

    def forward(self, hidden_BLD: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        # The hidden states come by position: recomputation in backward follows gradients through positionals only.
        attended_BLD, _ = self.self_attn(self.input_layernorm(hidden_BLD), **kwargs)
        hidden_BLD = hidden_BLD + self.dropout(attended_BLD)
        return hidden_BLD + self.dropout(self.mlp(self.post_attention_layernorm(hidden_BLD)))


class PostNormLayer(DecoderLayer):
    """norm(x + attention(x)), then norm(x + mlp(x)): the stream is normalised after every addition.

    The last layer's output is normalised, so the decoder needs no final norm. Source: Vaswani et al. 2017,
    arXiv:1706.03762, section 3.1.
    """

    def __init__(
        self,
        *,
        self_attn: nn.Module,
        mlp: nn.Module,
        post_attention_layernorm: nn.Module,
        post_feedforward_layernorm: nn.Module,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(self_attn=self_attn, dropout=dropout)
        self.mlp = mlp
        self.post_attention_layernorm = post_attention_layernorm
        self.post_feedforward_layernorm = post_feedforward_layernorm
        self.alpha = 1.0

    def forward(self, hidden_BLD: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        attended_BLD, _ = self.self_attn(hidden_BLD, **kwargs)
        hidden_BLD = self.post_attention_layernorm(self.alpha * hidden_BLD + self.dropout(attended_BLD))
        return self.post_feedforward_layernorm(self.alpha * hidden_BLD + self.dropout(self.mlp(hidden_BLD)))


class DeepNetLayer(PostNormLayer):
    """PostNormLayer with the stream weighed `alpha` before each addition, for stacks of hundreds of layers.

    `deepnet_alpha(num_layers)` is the weight for a decoder, and `deepnet_beta(num_layers)` the gain that values, the
    outputs of attention and the feed-forward matrices are to be drawn with (Xavier). Source: Wang et al. 2022,
    "DeepNet", arXiv:2203.00555, figure 2.
    """

    def __init__(
        self,
        *,
        alpha: float,
        self_attn: nn.Module,
        mlp: nn.Module,
        post_attention_layernorm: nn.Module,
        post_feedforward_layernorm: nn.Module,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(
            self_attn=self_attn,
            mlp=mlp,
            post_attention_layernorm=post_attention_layernorm,
            post_feedforward_layernorm=post_feedforward_layernorm,
            dropout=dropout,
        )
        self.alpha = alpha


def deepnet_alpha(num_layers: int) -> float:
    """(2 N) ** (1/4) for a decoder of N layers."""
    return float((2 * num_layers) ** 0.25)


def deepnet_beta(num_layers: int) -> float:
    """(8 N) ** (-1/4) for a decoder of N layers."""
    return float((8 * num_layers) ** -0.25)


class SandwichLayer(DecoderLayer):
    """x + norm(attention(norm(x))), then x + norm(mlp(norm(x))): each branch is normalised on both sides.

    What a branch adds has a bounded size, whatever its weights. Sources: Ding et al. 2021, "CogView", arXiv:2105.13290,
    section 2.4 (Sandwich-LN); Gemma Team 2024, "Gemma 2", arXiv:2408.00118.
    """

    def __init__(
        self,
        *,
        self_attn: nn.Module,
        mlp: nn.Module,
        input_layernorm: nn.Module,
        post_attention_layernorm: nn.Module,
        pre_feedforward_layernorm: nn.Module,
        post_feedforward_layernorm: nn.Module,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(self_attn=self_attn, dropout=dropout)
        self.mlp = mlp
        self.input_layernorm = input_layernorm
        self.post_attention_layernorm = post_attention_layernorm
        self.pre_feedforward_layernorm = pre_feedforward_layernorm
        self.post_feedforward_layernorm = post_feedforward_layernorm

    def forward(self, hidden_BLD: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        attended_BLD, _ = self.self_attn(self.input_layernorm(hidden_BLD), **kwargs)
        hidden_BLD = hidden_BLD + self.dropout(self.post_attention_layernorm(attended_BLD))
        fed_BLD = self.mlp(self.pre_feedforward_layernorm(hidden_BLD))
        return hidden_BLD + self.dropout(self.post_feedforward_layernorm(fed_BLD))


class AttentionOnlyLayer(DecoderLayer):
    """x + attention(norm(x)), without a feed-forward network.

    Source: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits".
    """

    def __init__(self, *, self_attn: nn.Module, input_layernorm: nn.Module, dropout: float = 0.0) -> None:
        super().__init__(self_attn=self_attn, dropout=dropout)
        self.input_layernorm = input_layernorm

    def forward(self, hidden_BLD: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        attended_BLD, _ = self.self_attn(self.input_layernorm(hidden_BLD), **kwargs)
        return hidden_BLD + self.dropout(attended_BLD)
