"""A small Llama: the sources that its project emits, with sizes and a tokenizer for tests."""

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from forgather import Project
from forgather.config.files import shipped_configs
from forgather.models.package import Package

LLAMA = shipped_configs() / "models" / "llama"
SOURCE = Project(LLAMA).code("model", inputs=["hf_config"])
INIT_SOURCE = Project(LLAMA).code("init_rules", inputs=["hf_config"])
SIZES: dict[str, Any] = {
    "vocab_size": 277,
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "attention_dropout": 0.0,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "rms_norm_eps": 1e-5,
    "sliding_window": None,
}
PLAN = {
    "base_model_tp_plan": {"layers.*.self_attn.q_proj": "colwise"},
    "base_model_pp_plan": {"embed_tokens": (["input_ids"], ["inputs_embeds"])},
}


def tokenizer() -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=277, special_tokens=["<|bos|>", "<|pad|>", "<|eos|>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(["the hat that was there then, this and that"], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<|bos|>", pad_token="<|pad|>", eos_token="<|eos|>")
    fast.chat_template = "{{ messages }}"
    return fast


def package(folder: Path, *, source: str = SOURCE, init_source: str = INIT_SOURCE, **sizes: Any) -> Package:
    """A package named after its folder."""
    sizes = SIZES | sizes
    sizes.setdefault("head_dim", sizes["hidden_size"] // sizes["num_attention_heads"])
    return Package(
        name=folder.name,
        source=source,
        init_source=init_source,
        hf_config=sizes,
        tokenizer=tokenizer(),
        plan=PLAN,
        dir=folder,
    )


def llama_config(**sizes: Any) -> LlamaConfig:
    """The same sizes for the Llama of transformers."""
    return LlamaConfig(**{key: value for key, value in (SIZES | sizes).items() if key != "sliding_window"})
