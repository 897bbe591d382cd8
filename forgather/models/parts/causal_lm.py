"""A decoder with a head that scores the next token."""

from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from forgather.models.parts.composed import ComposedModel


class CausalLM(ComposedModel, GenerationMixin):
    """Token ids [B, L] to logits [B, L, V], and with labels to their loss, in the shape of a Hugging Face causal LM."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012  {target: source}
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # noqa: RUF012

    def __init__(self, config: PreTrainedConfig, *, model: nn.Module, lm_head: nn.Module) -> None:
        super().__init__(config)
        self.model = model
        self.lm_head = lm_head
        self.loss_type = "ForCausalLM"

    def _get_resized_lm_head(self, old_lm_head: nn.Linear, *args: Any, **kwargs: Any) -> nn.Linear:
        """transformers makes a plain head of the new size; the parameters go to the head that is there."""
        resized: nn.Linear = super()._get_resized_lm_head(old_lm_head, *args, **kwargs)
        old_lm_head.weight, old_lm_head.bias = resized.weight, resized.bias
        old_lm_head.out_features = resized.out_features
        return old_lm_head

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """`labels` [B, L] are the inputs, not shifted; -100 counts for nothing. `num_items_in_batch` divides their sum.

        `logits_to_keep` limits the logits to the last so many tokens, or to the tokens of a 1-D index.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
