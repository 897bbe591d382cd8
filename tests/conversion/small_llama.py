"""A stock Llama whose weights come and go in the tests of files."""

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

SIZES: dict[str, Any] = {
    "vocab_size": 15,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def llama(*, seed: int = 0, **sizes: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SIZES | sizes))
