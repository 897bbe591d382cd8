"""Packages of our Llama in the shapes of the shipped project, without the tokenizers that these would train."""

from pathlib import Path

from tokenizers import Tokenizer, models
from transformers import LlamaConfig, PreTrainedTokenizerFast

from forgather import Project
from forgather.config.files import shipped_configs
from forgather.models.package import Package

# Small configs have as many rows as their tokenizer has ids; the shapes of published models say how many.
VOCABULARY = {"4M": 2000, "30M": 4000, "117M": 8000}


def llama_package(folder: Path, shape: str) -> Package:
    """The package of that config in `folder`, written; its tokenizer knows two tokens."""
    arguments = {"output_dir": folder, **({"vocab_size": VOCABULARY[shape]} if shape in VOCABULARY else {})}
    project = Project(shipped_configs() / "models" / "llama", shape, arguments)
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
