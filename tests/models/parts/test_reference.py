"""Compositions that no shipped project is, against transformers' models of the same formula and weights."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedModel, SmolLM3Config, SmolLM3ForCausalLM

from forgather.models.parts.embedding import ScaledEmbedding
from forgather.models.parts.head import output_head
from forgather.models.parts.layer import SandwichLayer
from forgather.models.parts.layer_types import is_rotary, window
from forgather.models.parts.mlp import GatedMLP
from forgather.models.parts.norm import GemmaRMSNorm
from tests.models.parts.composing import POSITIONS, SIZES, TOKENS, Model, compose, config, grouped

NORMS = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")


def gemma2(attention: str) -> tuple[Model, PreTrainedModel]:
    """Soft caps of scores and logits, windows in every other layer, scaled and tied embeddings, four norms a layer."""
    sizes = SIZES | {"head_dim": 6, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
    sizes |= {"tie_word_embeddings": True}
    theirs = Gemma2ForCausalLM._from_config(
        Gemma2Config(
            **sizes, query_pre_attn_scalar=9, attn_logit_softcapping=2.0, final_logit_softcapping=3.0, rms_norm_eps=1e-5
        ),
        attn_implementation=attention,
    )

    def layer(self_attn: nn.Module) -> nn.Module:
        mlp = GatedMLP(hidden_size=32, intermediate_size=48, activation="gelu_pytorch_tanh")
        return SandwichLayer(self_attn=self_attn, mlp=mlp, **{name: GemmaRMSNorm(32, 1e-5) for name in NORMS})

    def attend(made: Any, layer_idx: int) -> nn.Module:
        limit = window(made.layer_types, layer_idx, made.sliding_window)
        return grouped(made, layer_idx, head_dim=6, scaling=1 / 3, softcap=2.0, sliding_window=limit)

    ours = compose(
        config(attention, **sizes),
        attend,
        layer=layer,
        embed_tokens=ScaledEmbedding(61, 32, padding_idx=1),
        norm=GemmaRMSNorm(32, 1e-5),
        lm_head=output_head(32, 61, softcap=3.0),
    )
    return ours, theirs


def smollm3(attention: str) -> tuple[Model, PreTrainedModel]:
    """No rotary positions in every second layer."""
    sizes = SIZES | {"no_rope_layers": [1, 0, 1, 0], "num_hidden_layers": 4}
    theirs = SmolLM3ForCausalLM._from_config(
        SmolLM3Config(**sizes, use_sliding_window=False, tie_word_embeddings=False), attn_implementation=attention
    )

    def attend(made: Any, layer_idx: int) -> nn.Module:
        return grouped(made, layer_idx, rotary=is_rotary(made.no_rope_layers, layer_idx))

    return compose(config(attention, **sizes), attend), theirs


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("family", "attention"), [(gemma2, "eager"), (smollm3, "eager"), (smollm3, "sdpa")])
def test_logits_and_gradients_are_transformers(family: Any, attention: str, packed: bool) -> None:
    ours, theirs = family(attention)
    theirs.load_state_dict(ours.state_dict())
    theirs.eval()
    positions = POSITIONS if packed else None
    outputs = [model(TOKENS, position_ids=positions, labels=TOKENS, use_cache=False) for model in (ours, theirs)]
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits, rtol=1e-5, atol=1e-5)
    for output in outputs:
        output.loss.backward()
    for (name, one), (same, other) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert name == same
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(("family", "attention"), [(gemma2, "eager"), (smollm3, "sdpa")])
def test_greedy_text_is_transformers(family: Any, attention: str) -> None:
    ours, theirs = family(attention)
    theirs.load_state_dict(ours.state_dict())
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    prompt = TOKENS[:, :7]
    assert torch.equal(ours.generate(prompt, **options), theirs.eval().generate(prompt, **options))
