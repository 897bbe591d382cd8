"""A small Llama as a configuration would give it: the emitted sources, the sizes, a tokenizer."""

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from forgather.models.package import Package

SOURCE = """
from functools import partial

from forgather.models.parts.attention import Attention
from forgather.models.parts.causal_lm import CausalLM
from forgather.models.parts.decoder import Decoder, stack
from forgather.models.parts.layer import PreNormLayer
from forgather.models.parts.mlp import GatedMLP
from forgather.models.parts.norm import RMSNorm
from forgather.models.parts.rotary import RotaryEmbedding
from torch.nn import Embedding, Linear


def build(hf_config):
    def layer(layer_idx):
        return PreNormLayer(
            self_attn=Attention(
                hf_config,
                layer_idx,
                hidden_size=hf_config.hidden_size,
                num_heads=hf_config.num_attention_heads,
                num_kv_heads=hf_config.num_key_value_heads,
                dropout=hf_config.attention_dropout,
                sliding_window=hf_config.sliding_window,
            ),
            mlp=GatedMLP(hidden_size=hf_config.hidden_size, intermediate_size=hf_config.intermediate_size),
            input_layernorm=RMSNorm(hf_config.hidden_size, eps=hf_config.rms_norm_eps),
            post_attention_layernorm=RMSNorm(hf_config.hidden_size, eps=hf_config.rms_norm_eps),
        )

    return CausalLM(
        hf_config,
        model=Decoder(
            hf_config,
            embed_tokens=Embedding(hf_config.vocab_size, hf_config.hidden_size),
            layers=stack(layer, hf_config.num_hidden_layers),
            norm=RMSNorm(hf_config.hidden_size, eps=hf_config.rms_norm_eps),
            rotary_emb=RotaryEmbedding(hf_config),
        ),
        lm_head=Linear(hf_config.hidden_size, hf_config.vocab_size, bias=False),
    )
"""

INIT_SOURCE = r"""
from forgather.models.parts.initializers import DepthScaledNormal, Normal, Ones, TruncatedNormal


def build(hf_config):
    return {
        r"norm\.weight$": Ones(),
        r"embed_tokens\.weight$": Normal(std=hf_config.hidden_size**-0.5 if hf_config.tie_word_embeddings else 1.0),
        r"(q|k|v|up)_proj\.weight$": Normal(std=0.02),
        r"(o|gate|down)_proj\.weight$": DepthScaledNormal(std=0.02, num_layers=hf_config.num_hidden_layers),
        r"lm_head\.weight$": TruncatedNormal(std=hf_config.hidden_size**-0.5, may_match_nothing=True),
    }
"""
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


def package(folder: Path, **sizes: Any) -> Package:
    return Package(
        source=SOURCE,
        init_source=INIT_SOURCE,
        hf_config=SIZES | sizes,
        tokenizer=tokenizer(),
        plan=PLAN,
        dir=folder,
    )


def llama_config(**sizes: Any) -> LlamaConfig:
    """The same sizes for the Llama of transformers."""
    return LlamaConfig(**{key: value for key, value in (SIZES | sizes).items() if key != "sliding_window"})
