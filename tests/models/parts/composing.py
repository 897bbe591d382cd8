"""Small models composed in Python of the parts under test, all with a vocabulary of 61 and 32 channels."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from forgather.models.initialize import initialize
from forgather.models.parts.alibi import Alibi
from forgather.models.parts.attention import Attention
from forgather.models.parts.causal_lm import CausalLM
from forgather.models.parts.decoder import Decoder, stack
from forgather.models.parts.initializers import Keep, Normal
from forgather.models.parts.layer import PreNormLayer
from forgather.models.parts.mlp import GatedMLP
from forgather.models.parts.norm import RMSNorm
from forgather.models.parts.rotary import RotaryEmbedding

ROPE = {"rope_type": "default", "rope_theta": 10000.0}
SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "rope_parameters": ROPE,
    "eos_token_id": None,
    "pad_token_id": 1,
}
TOKENS = torch.arange(48).view(2, 24) * 7 % 53 + 3
# Rows of documents of 9, 10 and 5 tokens.
POSITIONS = torch.cat([torch.arange(9), torch.arange(10), torch.arange(5)]).expand(2, -1)


class Model(CausalLM):
    """A composed model with what the class of a package does at the end of its constructor."""

    def __init__(self, config: PreTrainedConfig, *, model: nn.Module, lm_head: nn.Module) -> None:
        super().__init__(config, model=model, lm_head=lm_head)
        self.post_init()


def config(attention: str | None = "eager", **sizes: Any) -> PreTrainedConfig:
    made = PreTrainedConfig(**(SIZES | sizes))
    made._attn_implementation = attention
    return made


def grouped(made: PreTrainedConfig, layer_idx: int, **options: Any) -> Attention:
    """Attention of the config's sizes."""
    defaults = {
        "hidden_size": made.hidden_size,
        "num_heads": made.num_attention_heads,
        "num_kv_heads": made.num_key_value_heads,
        "sliding_window": getattr(made, "sliding_window", None),
    }
    return Attention(made, layer_idx, **(defaults | options))


def with_alibi(made: PreTrainedConfig, layer_idx: int, **options: Any) -> Attention:
    alibi = Alibi(made.num_attention_heads, **options)
    return grouped(made, layer_idx, rotary=False, alibi=alibi)


def compose(
    made: PreTrainedConfig,
    attention: Callable[[PreTrainedConfig, int], nn.Module] = grouped,
    *,
    layer: Callable[[nn.Module], nn.Module] | None = None,
    lm_head: nn.Module | None = None,
    seed: int = 0,
    **decoder: Any,
) -> Model:
    """A model in eval mode, with weights large enough for every token to matter to those after it."""

    def pre_norm(self_attn: nn.Module) -> nn.Module:
        return PreNormLayer(
            self_attn=self_attn,
            mlp=GatedMLP(hidden_size=made.hidden_size, intermediate_size=made.intermediate_size),
            input_layernorm=RMSNorm(made.hidden_size),
            post_attention_layernorm=RMSNorm(made.hidden_size),
        )

    layer = pre_norm if layer is None else layer
    layers = stack(lambda layer_idx: layer(attention(made, layer_idx)), made.num_hidden_layers)
    turns = any(getattr(part, "rotary", False) for part in layers.modules())
    parts = {
        "layers": layers,
        "embed_tokens": nn.Embedding(made.vocab_size, made.hidden_size),
        "norm": RMSNorm(made.hidden_size),
        "rotary_emb": RotaryEmbedding(made) if turns else None,
    }
    trunk = Decoder(made, **(parts | decoder))
    lm_head = nn.Linear(made.hidden_size, made.vocab_size, bias=False) if lm_head is None else lm_head
    model = Model(made, model=trunk, lm_head=lm_head)
    rules = {r"norm\d?\.|slopes": Keep(may_match_nothing=True), ".": Normal(std=0.3)}
    initialize(model, rules, seed)
    return model.eval()
