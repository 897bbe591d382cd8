"""Packages of our Llama in the shapes that the benchmarks speak of, from the shipped project."""

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models
from transformers import LlamaConfig, PreTrainedTokenizerFast

from forgather import Project
from forgather.config.files import shipped_configs
from forgather.models.package import Package

# The names of LlamaConfig. 1B and 70B are the shapes of Llama 3.2 1B and Llama 3.1 70B.
SHAPES: dict[str, dict[str, Any]] = {
    "4M": {
        "vocab_size": 4096,
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
    },
    "30M": {
        "vocab_size": 4096,
        "hidden_size": 512,
        "intermediate_size": 1280,
        "num_hidden_layers": 10,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
    },
    "117M": {
        "vocab_size": 8000,
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
    },
    "1B": {
        "vocab_size": 128_256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "70B": {
        "vocab_size": 128_256,
        "hidden_size": 8192,
        "intermediate_size": 28_672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}


def llama_package(folder: Path, shape: str) -> Package:
    """The package of that shape in `folder`, written; its tokenizer knows two tokens."""
    sizes = dict(SHAPES[shape])
    vocabulary = {"hf_config.vocab_size": sizes.pop("vocab_size")}
    project = Project(shipped_configs() / "models" / "llama", args={**sizes, "output_dir": folder}, set=vocabulary)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE()), bos_token="<|bos|>", eos_token="<|eos|>"
    )
    package: Package = project.build("package", {"tokenizer": tokenizer})
    package.write()
    return package


def llama_config(package: Package) -> LlamaConfig:
    """The same sizes and numbers for the Llama of transformers."""
    known = LlamaConfig().to_dict()
    return LlamaConfig(**{key: value for key, value in package.hf_config.items() if key in known})
