"""The trunk of a decoder-only language model: embeddings, layers, final norm."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.output_capturing import capture_outputs

from forgather.models.parts.composed import ComposedModel, refuse_impossible
from forgather.models.parts.layer_types import FULL, SLIDING
from forgather.models.parts.self_attention import SelfAttention

MASKS = {FULL: create_causal_mask, SLIDING: create_sliding_window_causal_mask}


def stack(layer: Callable[[int], nn.Module], num_layers: int) -> nn.ModuleList:
    """`num_layers` layers, each made by `layer(layer_idx)`."""
    return nn.ModuleList(layer(layer_idx) for layer_idx in range(num_layers))


class Decoder(ComposedModel):
    """Token ids [B, L] to hidden states [B, L, D], in the shape of a Hugging Face base model.

    `embed_positions`, a module of position_ids [B, L], is added to the embeddings, and `dropout` follows; `rotary_emb`
    gives the layers one (cos, sin) for each type of attention; `norm` closes. Documents packed in a row are told by
    `position_ids` that start again at 0; they do not see one another, provided there is no `attention_mask` and no
    cache from an earlier call. The names of the children are those of Hugging Face's Llama.

    Raises ValueError for layers that need what is not there, for types of layers that are not those of the config
    (transformers' caches and masks go by `config.layer_types` and `config.sliding_window`), and for an attention
    implementation that cannot compute them. Where none is asked for it is sdpa, or eager if sdpa cannot.
    """

    init_prefix = "model."
    _can_record_outputs = {"hidden_states": GradientCheckpointingLayer, "attentions": SelfAttention}  # noqa: RUF012

    def __init__(
        self,
        config: PreTrainedConfig,
        *,
        embed_tokens: nn.Module,
        layers: nn.ModuleList,
        norm: nn.Module | None = None,
        rotary_emb: nn.Module | None = None,
        embed_positions: nn.Module | None = None,
        dropout: float | nn.Module = 0.0,
    ) -> None:
        check_layers(config, layers, rotary_emb)
        if config._attn_implementation is not None:
            refuse_impossible(layers, config._attn_implementation)
        elif any(part.refusal("sdpa") for part in layers.modules() if isinstance(part, SelfAttention)):
            config._attn_implementation = "eager"
        super().__init__(config)
        self.embed_tokens = embed_tokens
        self.embed_positions = embed_positions
        # A package makes its model anew from the children of the composed one, where this is a module already.
        self.dropout = dropout if isinstance(dropout, nn.Module) else nn.Dropout(dropout)
        self.layers = layers
        self.norm = norm
        self.rotary_emb = rotary_emb
        self.gradient_checkpointing = False
        self._no_split_modules = sorted({type(layer).__name__ for layer in layers})

    @capture_outputs  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        hidden_BLD: torch.Tensor = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds

        # A cache of this call's own holds nothing that a mask must know of. transformers looks for packed documents
        # only where it sees no cache, so the masks are made before one is opened.
        masks = self._masks(hidden_BLD, attention_mask, position_ids, past_key_values)
        if use_cache is None:
            use_cache = getattr(self.config, "use_cache", True) and not self.training
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = (torch.arange(hidden_BLD.shape[1], device=hidden_BLD.device) + seen).unsqueeze(0)

        if self.embed_positions is not None:
            hidden_BLD = hidden_BLD + self.embed_positions(position_ids).to(hidden_BLD.dtype)
        hidden_BLD = self.dropout(hidden_BLD)
        turns = self._turns(hidden_BLD, position_ids)
        for layer in self.layers:
            kind = str(layer.attention_type)
            hidden_BLD = layer(
                hidden_BLD,
                attention_mask=masks[kind],
                position_embeddings=turns.get(kind),
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
        if self.norm is not None:
            hidden_BLD = self.norm(hidden_BLD)
        return BaseModelOutputWithPast(last_hidden_state=hidden_BLD, past_key_values=past_key_values)

    def _kinds(self) -> list[str]:
        """The types of attention that there are."""
        return sorted({str(layer.attention_type) for layer in self.layers})

    def _turns(
        self, hidden_BLD: torch.Tensor, position_ids: torch.Tensor
    ) -> dict[str, tuple[torch.Tensor, torch.Tensor] | None]:
        """Cosines and sines for each type of attention: the same for all, unless rotary_emb tells them apart."""
        if self.rotary_emb is None:
            return dict.fromkeys(self._kinds())
        own = turning_types(self.rotary_emb)
        if own:
            return {kind: self.rotary_emb(hidden_BLD, position_ids, kind) for kind in self._kinds() if kind in own}
        return dict.fromkeys(self._kinds(), self.rotary_emb(hidden_BLD, position_ids))

    def _masks(
        self,
        hidden_BLD: torch.Tensor,
        attention_mask: torch.Tensor | dict[str, torch.Tensor] | None,
        position_ids: torch.Tensor | None,
        past_key_values: Cache | None,
    ) -> dict[str, Any]:
        """One mask for each type of attention; None where the kernel's own causal mask will do."""
        if isinstance(attention_mask, dict):  # made once by generate() for a compiled static cache
            return attention_mask
        return {
            kind: MASKS[kind](
                config=self.config,
                inputs_embeds=hidden_BLD,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
            )
            for kind in self._kinds()
        }


def turning_types(rotary_emb: nn.Module) -> list[str]:
    """The types of attention that a rotary embedding tells apart; none if it turns all alike."""
    return getattr(rotary_emb, "layer_types", [])


def check_layers(config: PreTrainedConfig, layers: nn.ModuleList, rotary_emb: nn.Module | None) -> None:
    """Raise ValueError for layers that need rotary positions where there are none, or are not as the config says."""
    window = getattr(config, "sliding_window", None)
    wanted = getattr(config, "layer_types", None) or [FULL if window is None else SLIDING] * len(layers)
    if len(wanted) != len(layers):
        raise ValueError(f"layer_types has {len(wanted)} entries for {len(layers)} layers")
    for layer_idx, (layer, kind) in enumerate(zip(layers, wanted, strict=True)):
        attention = getattr(layer, "self_attn", None)
        if not isinstance(attention, SelfAttention):
            continue
        if attention.attention_type != kind or attention.sliding_window not in (None, window):
            own = FULL if attention.sliding_window is None else f"{SLIDING} over {attention.sliding_window} tokens"
            raise ValueError(
                f"layer {layer_idx} has {own}, where the config has {kind}, sliding_window {window}: caches and masks "
                "go by layer_types and sliding_window of the config, so give it and the layers the same"
            )
        if not attention.rotary:
            continue
        if rotary_emb is None:
            raise ValueError(
                f"layer {layer_idx} has rotary positions, but there is no rotary_emb; or set rotary: false"
            )
        types = turning_types(rotary_emb)
        if types and kind not in types:
            raise ValueError(f"rope_parameters is for {', '.join(types)}, and layer {layer_idx} has {kind}")
