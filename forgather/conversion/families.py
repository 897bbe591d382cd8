"""The models of transformers that a project of ours computes: which project, which sizes, which names.

A family is read from the folder itself: a Hugging Face config says its `model_type`, and config.json of a package names
the same in `hf_model_type`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from forgather.conversion import gpt2_names
from forgather.conversion.recipes import Recipe

# They say nothing of what is computed; a package keeps them in config.json for the way back.
_KEPT = frozenset({"initializer_range", "use_cache", "pretraining_tp"})
_SILU_WITHOUT_BIASES = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
# What every config of transformers has, and what only a package's has.
_NO_SIZES = frozenset({each.name for each in fields(PreTrainedConfig)} | {"hf_model_type", "auto_map", "model_type"})


def _same_name(name: str) -> Recipe:
    return Recipe((name,))


def _unchanged(settings: dict[str, Any]) -> dict[str, Any]:
    return settings


@dataclass(frozen=True)
class Family:
    """A model class of transformers and the project that computes the same.

    `renamed` gives our name for keys of its config that have another, `only` the one value that the project computes of
    what it has no choice in, `implied` keys of ours that follow from others. `settled` says the sizes that a config of
    transformers leaves open, `completed` what its class wants to be told besides what a package says.
    """

    project: str  # below configs/models
    config_class: type[PreTrainedConfig]
    model_class: type[PreTrainedModel]
    only: Mapping[str, object]
    kept: frozenset[str] = _KEPT
    renamed: Mapping[str, str] | None = None
    implied: Mapping[str, str] | None = None
    settled: Callable[[dict[str, Any]], dict[str, Any]] = _unchanged
    completed: Callable[[dict[str, Any]], dict[str, Any]] = _unchanged
    package_recipe: Callable[[str], Recipe] = _same_name  # of a parameter of ours
    stock_recipe: Callable[[str], Recipe] = _same_name  # of one of transformers'

    @property
    def model_type(self) -> str:
        return str(self.config_class.model_type)

    def own_name(self, key: str) -> str:
        """What a package calls the config key `key` of transformers."""
        return (self.renamed or {}).get(key, key)

    def keys(self) -> list[str]:
        """The keys of transformers' config that are this model's own."""
        return [each.name for each in fields(self.config_class) if each.name not in _NO_SIZES]

    def sizes(self, config: PreTrainedConfig) -> tuple[dict[str, Any], dict[str, Any]]:
        """What decides about the computation, by our names, and what a package only keeps."""
        sizes, kept = {}, {}
        for key in self.keys():
            if key in self.kept:
                kept[key] = getattr(config, key)
            elif key not in self.only:
                sizes[self.own_name(key)] = getattr(config, key)
        return self.settled(sizes), kept

    def unsupported(self, config: PreTrainedConfig) -> list[str]:
        """What a config of transformers asks for and the project does not compute."""
        return [
            f"{key} is {getattr(config, key)!r}, and only {value!r} is computed"
            for key, value in self.only.items()
            if hasattr(config, key) and getattr(config, key) != value and (value or getattr(config, key))
        ]

    def stock_config(self, package: PreTrainedConfig) -> PreTrainedConfig:
        """The config of transformers that says what a package's says."""
        told = package.to_dict()
        known = {key: told[self.own_name(key)] for key in self.keys() if self.own_name(key) in told}
        only = {key: value for key, value in self.only.items() if key in self.keys()}
        return self.config_class(**self.completed(known | only))

    def untold(self, package: PreTrainedConfig) -> list[str]:
        """What a package's config.json says and transformers' config has no place for."""
        told = package.to_dict()
        known = {self.own_name(key) for key in self.keys() if key not in self.only} | _NO_SIZES
        return [
            f"{key} is {value!r}"
            for key, value in told.items()
            if key not in known and value and value not in (self.only.get(key), told.get((self.implied or {}).get(key)))
        ]


def _completed_qwen3(settings: dict[str, Any]) -> dict[str, Any]:
    # Without being told so, this config forgets its window.
    return settings | {"use_sliding_window": settings["sliding_window"] is not None}


def _completed_gemma3(settings: dict[str, Any]) -> dict[str, Any]:
    scalar = settings["query_pre_attn_scalar"]
    return settings | {"query_pre_attn_scalar": settings["head_dim"] if scalar is None else scalar}


def _settled_gpt2(sizes: dict[str, Any]) -> dict[str, Any]:
    given = sizes["intermediate_size"]
    return sizes | {"intermediate_size": 4 * sizes["hidden_size"] if given is None else given}


def _completed_gpt2(settings: dict[str, Any]) -> dict[str, Any]:
    is_usual = settings["n_inner"] == 4 * settings["n_embd"]
    return settings | {"n_inner": None if is_usual else settings["n_inner"]}


FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", LlamaConfig, LlamaForCausalLM, only=_SILU_WITHOUT_BIASES),
        Family("mistral", MistralConfig, MistralForCausalLM, only=_SILU_WITHOUT_BIASES),
        Family(
            "qwen3",
            Qwen3Config,
            Qwen3ForCausalLM,
            only=_SILU_WITHOUT_BIASES,
            kept=_KEPT | {"use_sliding_window", "max_window_layers"},
            completed=_completed_qwen3,
        ),
        Family(
            "gemma3",
            Gemma3TextConfig,
            Gemma3ForCausalLM,
            only={
                "hidden_activation": "gelu_pytorch_tanh",
                "attention_bias": False,
                "use_bidirectional_attention": False,
                "attn_logit_softcapping": None,  # transformers' class reads it and computes without
            },
            completed=_completed_gemma3,
        ),
        Family(
            "gpt2",
            GPT2Config,
            GPT2LMHeadModel,
            only={
                "activation_function": "gelu_new",
                "scale_attn_weights": True,
                "scale_attn_by_inverse_layer_idx": False,
                "reorder_and_upcast_attn": False,
                "add_cross_attention": False,
            },
            kept=_KEPT | {key.name for key in fields(GPT2Config) if key.name.startswith("summary_")},
            renamed={
                "n_embd": "hidden_size",
                "n_layer": "num_hidden_layers",
                "n_head": "num_attention_heads",
                "n_inner": "intermediate_size",
                "n_positions": "max_position_embeddings",
                "attn_pdrop": "attention_dropout",
                "embd_pdrop": "embedding_dropout",
                "resid_pdrop": "residual_dropout",
                "layer_norm_epsilon": "layer_norm_eps",
            },
            implied={"num_key_value_heads": "num_attention_heads"},
            settled=_settled_gpt2,
            completed=_completed_gpt2,
            package_recipe=gpt2_names.of_package,
            stock_recipe=gpt2_names.of_stock,
        ),
    )
}
