"""Each kind of attention that the parts can be made to, as a model and the sizes that it goes with."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from forgather.models.parts.alibi import Alibi
from forgather.models.parts.attention import Attention
from forgather.models.parts.layer_types import is_rotary, window
from forgather.models.parts.norm import GemmaRMSNorm, RMSNorm
from forgather.models.parts.single_head import SingleHeadAttention
from tests.models.parts.composing import ROPE, Model, compose, config, grouped, with_alibi

Kind = tuple[Callable[[PreTrainedConfig, int], nn.Module], dict[str, Any]]


def qk_normed(made: PreTrainedConfig, layer_idx: int) -> Attention:
    norms = {"q_norm": RMSNorm(made.head_dim), "k_norm": GemmaRMSNorm(made.head_dim)}
    return grouped(made, layer_idx, head_dim=made.head_dim, scaling=0.3, bias=True, output_bias=False, **norms)


def windowed_by_layer(made: PreTrainedConfig, layer_idx: int) -> Attention:
    limit = window(made.layer_types, layer_idx, made.sliding_window)
    return grouped(made, layer_idx, sliding_window=limit)


def turned_by_layer(made: PreTrainedConfig, layer_idx: int) -> Attention:
    return grouped(made, layer_idx, rotary=is_rotary(made.no_rope_layers, layer_idx))


def single(made: PreTrainedConfig, layer_idx: int, alibi: bool = False) -> SingleHeadAttention:
    bias = Alibi(1, slopes="half", trainable=True) if alibi else None
    return SingleHeadAttention(made, layer_idx, hidden_size=made.hidden_size, alibi=bias)


MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
KINDS: dict[str, Kind] = {
    "grouped": (grouped, {}),
    "qk_normed": (qk_normed, {"head_dim": 6}),
    "soft_capped": (partial(grouped, softcap=3.0), {}),
    "windowed": (grouped, {"sliding_window": 4}),
    "windowed_by_layer": (windowed_by_layer, MIXED),
    "turned_by_type": (
        windowed_by_layer,
        MIXED | {"rope_parameters": {"full_attention": ROPE | {"rope_theta": 300.0}, "sliding_attention": ROPE}},
    ),
    "turned_by_layer": (turned_by_layer, {"no_rope_layers": [1, 0]}),
    "alibi": (with_alibi, {}),
    "alibi_trained": (partial(with_alibi, trainable=True, slopes="half"), {}),
    "alibi_windowed": (with_alibi, {"sliding_window": 5}),
    "single_head": (single, {}),
    "single_head_alibi": (partial(single, alibi=True), {}),
}


def model_of(kind: str, attention: str = "eager", **sizes: Any) -> Model:
    made, own = KINDS[kind]
    return compose(config(attention, **(own | sizes)), made)
