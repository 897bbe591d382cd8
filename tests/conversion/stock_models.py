"""Tiny models of transformers with random weights, saved as their authors would: what imports start from."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.utils import logging

from tests.models.example import tokenizer

# The tokenizer has 277 ids: the others are the padding of a vocabulary.
IDS = {"vocab_size": 288, "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
SIZES = {
    **IDS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 24}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "original_max_position_embeddings": 64,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 3.0, 4.0, 5.0],
}
GPT2_SIZES = {**IDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 96}

CLASSES: dict[str, tuple[type, type]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM),
    "gpt2": (GPT2Config, GPT2LMHeadModel),
}

# Of each family what its models differ in.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"rms_norm_eps": 1e-5, "initializer_range": 0.03}),
    "llama-tied-llama3": ("llama", {"tie_word_embeddings": True, "rope_parameters": LLAMA3, "eos_token_id": [2, 5]}),
    "llama-head-dim": ("llama", {"head_dim": 12, "num_key_value_heads": 4, "use_cache": False}),
    "llama-dynamic": ("llama", {"rope_parameters": DYNAMIC}),
    "qwen3-long": ("qwen3", {"head_dim": 8, "rope_parameters": LONG}),
    "mistral-window": ("mistral", {"sliding_window": 64, "rope_parameters": YARN}),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 10}),
    "qwen3": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3-window": (
        "qwen3",
        {"head_dim": 8, "use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1},
    ),
    "gemma3": (
        "gemma3",
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 20,
            "sliding_window": 32,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "gemma3-soft-cap": ("gemma3", {"head_dim": 8, "final_logit_softcapping": 3.0, "sliding_window": 9}),
    "gpt2": ("gpt2", {"attn_pdrop": 0.2, "embd_pdrop": 0.3, "resid_pdrop": 0.4, "layer_norm_epsilon": 1e-6}),
    "gpt2-untied": ("gpt2", {"tie_word_embeddings": False, "n_inner": 40}),
}


def stock_model(family: str, dtype: torch.dtype = torch.float32, **settings: Any) -> PreTrainedModel:
    """A model whose every parameter, norms and biases too, is far from what it would begin with."""
    config_class, model_class = CLASSES[family]
    config = config_class(**{**(GPT2_SIZES if family == "gpt2" else SIZES), **settings})
    model = model_class(config)
    generator = torch.Generator().manual_seed(len(family))
    with torch.no_grad():
        for parameter in model.parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.25 * drawn if parameter.dim() > 1 else 0.6 + 0.3 * drawn)
    return model.to(dtype).eval()


def save_stock(
    folder: Path, family: str, dtype: torch.dtype = torch.float32, max_shard_bytes: int = 10**9, **settings: Any
) -> PreTrainedModel:
    """The same, saved with a tokenizer and a generation config that says something."""
    model = stock_model(family, dtype, **settings)
    model.generation_config.max_new_tokens = 17
    logging.disable_progress_bar()
    model.save_pretrained(folder, max_shard_size=max_shard_bytes)
    tokenizer().save_pretrained(folder)
    return model
