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

from forgather.models.parts.attention import Attention
from forgather.models.parts.composed import ComposedModel

MASKS = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}


def stack(layer: Callable[[int], nn.Module], num_layers: int) -> nn.ModuleList:
    """`num_layers` layers, each made by `layer(layer_idx)`."""
    return nn.ModuleList(layer(layer_idx) for layer_idx in range(num_layers))


class Decoder(ComposedModel):
    """Token ids [B, L] to hidden states [B, L, D], in the shape of a Hugging Face base model.

    Documents packed in a row are told by `position_ids` that start again at 0; they do not see one another, provided
    there is no `attention_mask` and no cache from an earlier call. The names of the children are those of Hugging
    Face's Llama.
    """

    init_prefix = "model."
    _can_record_outputs = {"hidden_states": GradientCheckpointingLayer, "attentions": Attention}  # noqa: RUF012

    def __init__(
        self,
        config: PreTrainedConfig,
        *,
        embed_tokens: nn.Module,
        layers: nn.ModuleList,
        norm: nn.Module,
        rotary_emb: nn.Module,
    ) -> None:
        super().__init__(config)
        self.embed_tokens = embed_tokens
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

        position_embeddings = self.rotary_emb(hidden_BLD, position_ids)
        for layer in self.layers:
            hidden_BLD = layer(
                hidden_BLD,
                attention_mask=masks[str(layer.attention_type)],
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_BLD), past_key_values=past_key_values)

    def _masks(
        self,
        hidden_BLD: torch.Tensor,
        attention_mask: torch.Tensor | dict[str, torch.Tensor] | None,
        position_ids: torch.Tensor | None,
        past_key_values: Cache | None,
    ) -> dict[str, Any]:
        """One mask for each kind of layer there is; None where the kernel's own causal mask will do."""
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
            for kind in sorted({str(layer.attention_type) for layer in self.layers})
        }
