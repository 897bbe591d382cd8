"""What the models composed of parts have in common as transformers models."""

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from forgather.models.parts.initializers import Initializer
from forgather.models.parts.rules import assign
from forgather.models.parts.self_attention import SelfAttention


class ComposedModel(PreTrainedModel):
    """A transformers model whose children are given to it.

    A model package subclasses it with a constructor that takes only a config, and with `init_rules`, from which the
    weights of `from_config` are drawn (the same distributions as a training run's, not the same draws).
    """

    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    init_rules: Callable[[PreTrainedConfig], dict[str, Initializer]] | None = None
    init_prefix = ""  # what stands before this model's parameters in the names that rules are written for
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _skip_keys_device_placement = ("past_key_values",)
    _can_record_outputs: dict[str, Any] = {"attentions": SelfAttention}  # noqa: RUF012  transformers wants a plain dict

    def set_attn_implementation(self, attn_implementation: str | dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """As of any transformers model; ValueError for one that cannot compute this model's attention."""
        named = attn_implementation.get("") if isinstance(attn_implementation, dict) else attn_implementation
        if named is not None:
            refuse_impossible(self, named)
        super().set_attn_implementation(attn_implementation, *args, **kwargs)

    def _init_weights(self, module: nn.Module) -> None:
        """transformers calls this for each module that no checkpoint has filled."""
        reset_buffers = getattr(module, "reset_buffers", None)
        if reset_buffers is not None:
            reset_buffers()
        if self.init_rules is None:
            if reset_buffers is None:  # transformers would take a rotary embedding for one of its own, by its name
                super()._init_weights(module)
            return
        parameters = dict(module.named_parameters(recurse=False))
        if not parameters:
            return
        prefix = self.init_prefix + self._name_of(module)
        assignment = assign(self.init_rules(self.config), [f"{prefix}.{name}" for name in parameters])
        if assignment.without_rule:
            raise ValueError(f"no initialisation rule for {', '.join(assignment.without_rule)}")
        chosen = assignment.chosen.values()
        # The module's own values come first: they are all its parameters', also of those that have another rule.
        if any(initializer.fill is None for initializer in chosen):
            if not hasattr(module, "reset_parameters"):
                raise ValueError(f"Keep needs {type(module).__name__} to have a method reset_parameters()")
            module.reset_parameters()  # type: ignore[operator]
        for parameter, initializer in zip(parameters.values(), chosen, strict=True):
            if initializer.fill is not None:
                initializer.fill(parameter)

    def _name_of(self, module: nn.Module) -> str:
        for name, candidate in self.named_modules():
            if candidate is module:
                return name
        # Resizing the vocabulary initialises an embedding or a head before it takes its place in the model.
        place = self.get_input_embeddings() if isinstance(module, nn.Embedding) else self.get_output_embeddings()
        return self._name_of(place)


def refuse_impossible(module: nn.Module, implementation: str) -> None:
    """Raise ValueError if a part of `module` cannot be computed by the attention implementation of that name."""
    for part in module.modules():
        refusal = part.refusal(implementation) if isinstance(part, SelfAttention) else None
        if refusal is not None:
            raise ValueError(f"attn_implementation: {refusal}")
