"""Stages cut out of a model, run one after the other, are the model: names, values and logits, bit for bit."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from forgather.distributed.pipeline import Stage
from forgather.distributed.pipeline_anatomy import examine
from forgather.distributed.pipeline_cut import balance, choose_parts, cut
from forgather.errors import DistributedError, ModelError

SIZES: dict[str, Any] = {
    "vocab_size": 53,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
OLD: dict[str, Any] = {"vocab_size": 53, "bos_token_id": 1, "eos_token_id": 2}
GRANITE = {key: value for key, value in SIZES.items() if key != "head_dim"}

MODELS: dict[str, tuple[type[nn.Module], Any]] = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES)),
    "llama tied": (LlamaForCausalLM, LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SIZES)),
    # Scaled embeddings, soft-capped logits, two types of attention with masks of their own.
    "gemma2": (Gemma2ForCausalLM, Gemma2Config(**SIZES, final_logit_softcapping=3.0, sliding_window=4)),
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig(**SIZES, sliding_window=4, sliding_window_pattern=2)),
    # Embeddings and logits are multiplied outside of any module.
    "granite": (GraniteForCausalLM, GraniteConfig(**GRANITE, embedding_multiplier=7.0, logits_scaling=2.0)),
    # Learned positions beside the embedding, a tied head, dropout in front of the blocks; no plan, only block classes.
    "gpt2": (GPT2LMHeadModel, GPT2Config(**OLD, n_embd=16, n_layer=4, n_head=2, n_positions=32)),
    "opt": (
        OPTForCausalLM,
        OPTConfig(
            **OLD, hidden_size=16, num_hidden_layers=4, ffn_dim=24, num_attention_heads=2, word_embed_proj_dim=12
        ),
    ),
}


def build(kind: type[nn.Module], config: Any, device: str) -> Any:
    torch.manual_seed(0)
    with torch.device(device):
        return kind(config).eval()


def cut_into_stages(kind: type[nn.Module], config: Any, num_stages: int) -> tuple[Any, list[Stage]]:
    """The whole model on the CPU, and its stages with the same values."""
    whole = build(kind, config, "cpu")
    values = dict(whole.named_parameters(remove_duplicate=False))
    buffers = dict(whole.named_buffers())
    anatomy = examine(build(kind, config, "meta"), 8)
    stages = []
    for part in choose_parts(anatomy, num_stages, "auto"):
        model = build(kind, config, "meta")
        entrance, exit_ = cut(model, anatomy, [part])
        model.to_empty(device="cpu")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(values[name])
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])
        model.tie_weights()
        stages.append(Stage(model, part, entrance, exit_))
    return whole, stages


@pytest.mark.parametrize("num_stages", [2, 4])
@pytest.mark.parametrize("name", MODELS)
def test_the_stages_together_compute_what_the_model_computes(name, num_stages):
    whole, stages = cut_into_stages(*MODELS[name], num_stages)
    tokens = torch.randint(3, 53, (2, 12), generator=torch.Generator().manual_seed(1))
    positions = torch.cat([torch.arange(5), torch.arange(7)]).expand(2, -1)  # two documents a row
    with torch.no_grad():
        expected = whole(input_ids=tokens, position_ids=positions, use_cache=False).logits
        passed = tokens
        for stage in stages:
            passed = stage.model(passed, position_ids=positions)
    assert torch.equal(passed, expected)


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_has_its_name_and_one_stage(name):
    whole, stages = cut_into_stages(*MODELS[name], 2)
    held = [dict(stage.model.named_parameters()) for stage in stages]
    assert held[0].keys() | held[1].keys() == dict(whole.named_parameters()).keys()
    shared = held[0].keys() & held[1].keys()
    assert shared == ({next(iter(held[0]))} if whole.config.tie_word_embeddings else set())
    for part in held:
        assert not any(parameter.is_meta for parameter in part.values())


def test_gradients_stop_where_another_stage_begins():
    _, (first, second) = cut_into_stages(*MODELS["granite"], 2)
    hidden = first.model(torch.tensor([[3, 4, 5]])).detach().requires_grad_()
    second.model(hidden).sum().backward()
    assert hidden.grad is not None
    assert all(parameter.grad is None for parameter in first.model.parameters())
    assert all(parameter.grad is not None for parameter in second.model.parameters())


def test_a_layer_that_is_elsewhere_is_asked_as_if_it_were_here():
    _, (first, _) = cut_into_stages(*MODELS["llama"], 2)
    elsewhere = first.model.model.layers[3]
    assert elsewhere.self_attn.layer_idx == 3
    assert list(elsewhere.parameters()) == []
    assert not hasattr(elsewhere, "nonsense")


@pytest.mark.parametrize(
    ("costs", "entry", "exit_", "num_stages", "expected"),
    [
        ([1, 1, 1, 1], 0, 0, 2, [2]),
        ([1, 1, 1, 1], 0, 2, 2, [3]),  # a head that costs as much as two blocks
        ([1, 1, 1, 1], 0, 99, 2, [3]),  # every stage has a block
        ([1, 1, 1, 1, 1], 1, 0, 3, [1, 3]),
        ([8, 1, 1, 1, 1], 0, 0, 2, [1]),
        ([1] * 8, 0, 1, 4, [2, 4, 6]),
    ],
)
def test_cuts_make_the_costliest_stage_cheapest(costs, entry, exit_, num_stages, expected):
    assert balance(costs, entry, exit_, num_stages) == expected


def test_the_head_counts_when_cuts_are_balanced():
    config = LlamaConfig(**{**SIZES, "vocab_size": 2000})
    anatomy = examine(build(LlamaForCausalLM, config, "meta"), 8)
    # 2 operations x 8 tokens x weights, and for a block also attention
    assert anatomy.exit_cost == 2 * 8 * 16 * 2000
    assert anatomy.block_costs == [2 * 8 * (16 * 16 * 2 + 16 * 8 * 2 + 3 * 16 * 24) + 2 * 2 * 8 * 8 * 16] * 4
    assert [part.describe() for part in choose_parts(anatomy, 2, "auto")] == ["embedding, 0-2", "3, head"]


def test_more_stages_than_blocks():
    anatomy = examine(build(*MODELS["llama"], "meta"), 8)
    with pytest.raises(DistributedError, match=r"5 stages, and the model has 4 blocks.*") as caught:
        choose_parts(anatomy, 5, "auto")
    assert "at most 4 stages" in str(caught.value.fix)
    with pytest.raises(DistributedError, match=r"cuts is \[4\], and the model's blocks are 0 to 3"):
        choose_parts(anatomy, 2, [4])


def test_a_model_that_declares_no_blocks_has_no_plan():
    model = build(*MODELS["gpt2"], "meta")
    model._no_split_modules = set()
    with pytest.raises(ModelError, match="GPT2LMHeadModel has no plan for a pipeline: no list of blocks"):
        examine(model, 8)


def test_a_model_whose_blocks_hand_on_more_than_hidden_states():
    class Chatty(LlamaForCausalLM):
        def __init__(self, config: LlamaConfig) -> None:
            super().__init__(config)
            inner = self.model.rotary_emb.forward
            weight = self.model.norm.weight
            self.model.rotary_emb.forward = lambda *args, **kwargs: tuple(
                x + weight.sum() for x in inner(*args, **kwargs)
            )

    with pytest.raises(ModelError, match="its blocks hand on more than hidden states"):
        examine(build(Chatty, LlamaConfig(**SIZES), "meta"), 8)


def test_a_model_that_repeats_a_block():
    class Repeating(LlamaForCausalLM):
        def __init__(self, config: LlamaConfig) -> None:
            super().__init__(config)
            self.model.layers[2] = self.model.layers[1]

    with pytest.raises(ModelError, match="not called once each, in order"):
        examine(build(Repeating, LlamaConfig(**SIZES), "meta"), 8)


def test_blocks_that_return_tuples():
    config = BloomConfig(**OLD, hidden_size=16, n_layer=4, n_head=2)
    anatomy = examine(build(BloomForCausalLM, config, "meta"), 8)
    assert anatomy.block_output > 0
