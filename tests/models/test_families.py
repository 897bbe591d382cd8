"""Each family computes what transformers' model of that name computes from the same weights: logits and gradients.

The sizes are drawn at random, a few times a family, and the composed model is the package that its project writes.
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
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

from forgather import Project
from forgather.config.files import shipped_configs
from tests.models.example import tokenizer

LENGTH = 24
ROWS = 2
DOCUMENTS = (11, 6, 7)  # of a packed row

Weights = dict[str, torch.Tensor]


def llama_sizes(draw: random.Random) -> dict[str, Any]:
    kv_heads = draw.choice([1, 2])
    heads = kv_heads * draw.choice([1, 2])
    return {
        "hidden_size": heads * 2 * draw.randint(3, 9),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "num_hidden_layers": draw.randint(2, 3),
        "intermediate_size": draw.randint(17, 70),
        "max_position_embeddings": 64,
        "tie_word_embeddings": draw.random() < 0.5,
        "rms_norm_eps": draw.choice([1e-6, 1e-5]),
        "rope_parameters": {"rope_type": "default", "rope_theta": draw.choice([1e2, 1e4, 1e6])},
    }


def mistral_sizes(draw: random.Random) -> dict[str, Any]:
    return llama_sizes(draw) | {"sliding_window": draw.choice([None, 1, 5, 24]), "head_dim": draw.choice([None, 6, 14])}


def qwen3_sizes(draw: random.Random) -> dict[str, Any]:
    return llama_sizes(draw) | {"sliding_window": draw.choice([None, 5]), "head_dim": draw.choice([6, 14])}


def gemma3_sizes(draw: random.Random) -> dict[str, Any]:
    return llama_sizes(draw) | {
        "num_hidden_layers": draw.randint(2, 5),
        "head_dim": draw.choice([8, 14]),
        "sliding_window": draw.choice([3, 5]),
        "sliding_window_pattern": draw.choice([2, 3]),
        "query_pre_attn_scalar": draw.choice([None, 9]),
        "final_logit_softcapping": draw.choice([None, 2.0]),
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 1e4, "factor": draw.choice([1.0, 8.0])},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e2},
        },
    }


def gpt2_sizes(draw: random.Random) -> dict[str, Any]:
    heads = draw.randint(1, 3)
    return {
        "hidden_size": heads * draw.randint(3, 15),
        "num_attention_heads": heads,
        "num_hidden_layers": draw.randint(1, 3),
        "max_position_embeddings": draw.randint(LENGTH, 40),
        "intermediate_size": draw.randint(17, 70),
        "tie_word_embeddings": draw.random() < 0.5,
        "layer_norm_eps": draw.choice([1e-6, 1e-5]),
        "attention_dropout": 0.0,
        "dropout": 0.0,
    }


def same_names(weights: Mapping[str, torch.Tensor]) -> Weights:
    return dict(weights)


def named_as_in_llama(weights: Mapping[str, torch.Tensor]) -> Weights:
    """GPT-2's tensors, or their gradients, by our names; its matrices are [inputs, outputs], q, k and v are one."""
    names = {
        "wte.": "embed_tokens.",
        "wpe.": "embed_positions.",
        "ln_f.": "norm.",
        "h.": "layers.",
        "ln_1.": "input_layernorm.",
        "ln_2.": "post_attention_layernorm.",
        "attn.": "self_attn.",
        "attn.c_proj.": "attn.o_proj.",
        "c_fc.": "up_proj.",
        "mlp.c_proj.": "mlp.down_proj.",
    }
    found = {}
    for name, tensor in weights.items():
        ours = name.replace("transformer.", "model.")
        for theirs in (
            "attn.c_proj.",
            "mlp.c_proj.",
            "c_fc.",
            "ln_1.",
            "ln_2.",
            "ln_f.",
            "wte.",
            "wpe.",
            "attn.",
            "h.",
        ):
            ours = ours.replace(f".{theirs}", f".{names[theirs]}")
        tensor = tensor.T if ".c_" in name and name.endswith("weight") else tensor
        if "c_attn" in ours:
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                found[ours.replace("c_attn", f"{letter}_proj")] = part
        else:
            found[ours] = tensor
    return found


def shared_fields(config: PreTrainedConfig, stock: type[PreTrainedConfig]) -> dict[str, Any]:
    fields = stock().to_dict().keys() - {"model_type", "architectures", "transformers_version", "dtype"}
    return {key: value for key, value in config.to_dict().items() if key in fields}


def gpt2_fields(config: PreTrainedConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "n_embd": config.hidden_size,
        "n_head": config.num_attention_heads,
        "n_layer": config.num_hidden_layers,
        "n_positions": config.max_position_embeddings,
        "n_inner": config.intermediate_size,
        "layer_norm_epsilon": config.layer_norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        "attn_pdrop": config.attention_dropout,
        "embd_pdrop": config.embedding_dropout,
        "resid_pdrop": config.residual_dropout,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
    }


@dataclass(frozen=True)
class Family:
    """A project, sizes for it, and the model of transformers that is to be equal to it."""

    sizes: Callable[[random.Random], dict[str, Any]]
    stock: type[PreTrainedModel]
    fields: Callable[[PreTrainedConfig], dict[str, Any]]
    named: Callable[[Mapping[str, torch.Tensor]], Weights] = field(default=same_names)


FAMILIES = {
    "llama": Family(llama_sizes, LlamaForCausalLM, lambda config: shared_fields(config, LlamaConfig)),
    "mistral": Family(mistral_sizes, MistralForCausalLM, lambda config: shared_fields(config, MistralConfig)),
    "qwen3": Family(
        qwen3_sizes,
        Qwen3ForCausalLM,
        lambda config: shared_fields(config, Qwen3Config) | {"use_sliding_window": config.sliding_window is not None},
    ),
    "gemma3": Family(gemma3_sizes, Gemma3ForCausalLM, lambda config: shared_fields(config, Gemma3TextConfig)),
    "gpt2": Family(gpt2_sizes, GPT2LMHeadModel, gpt2_fields, named_as_in_llama),
}


def twins(family: Family, name: str, folder: Path, seed: int) -> tuple[PreTrainedModel, PreTrainedModel]:
    """transformers' model, and ours with its weights; all weights are random, also those that begin at a constant."""
    sizes = family.sizes(random.Random(f"{name} {seed}"))
    arguments = {"output_dir": folder / "built", **sizes}
    project = Project(shipped_configs() / "models" / name, args=arguments)
    ours = project.build("package", given={"tokenizer": tokenizer()}).construct("cpu")
    theirs = family.stock(family.stock.config_class(**family.fields(ours.config)))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    ours.load_state_dict(family.named(theirs.state_dict()))
    return theirs, ours


def batch(seed: int, packed: bool) -> dict[str, Any]:
    tokens = torch.randint(3, 277, (ROWS, LENGTH), generator=torch.Generator().manual_seed(seed))
    labels = tokens.clone()
    labels[:, :3] = -100
    positions = torch.cat([torch.arange(length) for length in DOCUMENTS]).expand(ROWS, -1)
    # Summed over tokens, not their mean: 1e-5 then says something of gradients.
    inputs = {"input_ids": tokens, "labels": labels, "num_items_in_batch": LENGTH, "use_cache": False}
    return inputs | ({"position_ids": positions} if packed else {})


@pytest.mark.parametrize("name", FAMILIES)
def test_plans_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    theirs, ours = (model.config for model in twins(FAMILIES[name], name, tmp_path, 0))
    if theirs.base_model_tp_plan is not None:  # transformers has none for GPT-2
        assert ours.base_model_tp_plan == theirs.base_model_tp_plan
        pipeline = {
            module: (list(inputs), list(outputs)) for module, (inputs, outputs) in ours.base_model_pp_plan.items()
        }
        assert list(pipeline.items()) == list(theirs.base_model_pp_plan.items())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_gradients_are_those_of_transformers(tmp_path: Path, name: str, seed: int) -> None:
    family = FAMILIES[name]
    theirs, ours = twins(family, name, tmp_path, seed)
    for attention in ("eager", "sdpa"):
        for packed in (False, True):
            outputs, gradients = [], []
            for model in (theirs, ours):
                model.set_attn_implementation(attention)
                model.zero_grad()
                outputs.append(model(**batch(seed, packed)))
                outputs[-1].loss.backward()
                gradients.append({key: each.grad for key, each in model.named_parameters()})
            case = f"{name} {seed} {attention} {'packed' if packed else 'plain'}"
            torch.testing.assert_close(outputs[1].logits, outputs[0].logits, rtol=1e-5, atol=1e-5, msg=case)
            wanted = family.named(gradients[0])
            assert wanted.keys() == gradients[1].keys()
            for key, gradient in gradients[1].items():
                torch.testing.assert_close(gradient, wanted[key], rtol=1e-5, atol=1e-5, msg=f"{case} {key}")
