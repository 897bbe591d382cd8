"""Rotary positions are transformers', in each variant, for all layers alike or by their type."""

from typing import Any

import pytest
import torch
from transformers import Gemma3TextConfig, GlmConfig, LlamaConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
from transformers.models.glm.modeling_glm import GlmRotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from forgather.models.parts.rotary import RotaryEmbedding, rotate
from tests.models.parts.composing import ROPE, config

SIZES: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 4, "max_position_embeddings": 32}
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 8, "beta_fast": 16.0},
    "longrope": {
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "short_factor": [1.0, 1.5, 2.0, 2.5],
        "long_factor": [2.0, 3.0, 4.0, 5.0],
    },
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "proportional": {"partial_rotary_factor": 0.5},
}
HIDDEN = torch.zeros(1, 1, 32)


def rope(variant: str) -> dict[str, Any]:
    return {"rope_type": variant, "rope_theta": 100.0} | VARIANTS[variant]


def at(embedding: torch.nn.Module, length: int, *layer_type: str) -> torch.Tensor:
    return torch.stack(embedding(HIDDEN, torch.arange(length).unsqueeze(0), *layer_type))


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_are_transformers(variant: str) -> None:
    """Also when sequences grow beyond what the model was made for, and are short again after that."""
    ours = RotaryEmbedding(config(**SIZES, rope_parameters=rope(variant)))
    theirs = LlamaRotaryEmbedding(LlamaConfig(**SIZES, rope_parameters=rope(variant)))
    for length in (12, 48, 20, 12):
        torch.testing.assert_close(at(ours, length), at(theirs, length), rtol=0, atol=0)


@pytest.mark.parametrize("variant", ["default", "linear", "dynamic", "longrope", "llama3"])
def test_variants_by_layer_type_are_transformers(variant: str) -> None:
    parameters = {"full_attention": rope(variant), "sliding_attention": rope("default") | {"rope_theta": 7.0}}
    sizes = SIZES | {"head_dim": 8, "num_hidden_layers": 2}
    sizes |= {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 4}
    ours = RotaryEmbedding(config(**sizes, rope_parameters=parameters))
    theirs = Gemma3RotaryEmbedding(Gemma3TextConfig(**sizes, rope_parameters=parameters))
    for length in (12, 48, 12):
        for layer_type in parameters:
            torch.testing.assert_close(at(ours, length, layer_type), at(theirs, length, layer_type), rtol=0, atol=0)
    assert not torch.equal(at(ours, 12, "full_attention"), at(ours, 12, "sliding_attention"))


def test_a_part_of_each_head_can_be_turned() -> None:
    parameters = ROPE | {"partial_rotary_factor": 0.5}
    ours = RotaryEmbedding(config(**SIZES, rope_parameters=parameters))
    theirs = GlmRotaryEmbedding(GlmConfig(**SIZES, head_dim=8, rope_parameters=parameters))
    torch.testing.assert_close(at(ours, 9), at(theirs, 9), rtol=0, atol=0)
    x = torch.randn(1, 2, 9, 8, generator=torch.Generator().manual_seed(0))
    cos, sin = at(ours, 9)
    assert cos.shape == (1, 9, 4)
    turned = rotate(x, cos, sin)
    assert torch.equal(turned[..., 4:], x[..., 4:])
    assert torch.equal(turned[..., :4], rotate(x[..., :4], cos, sin))


@pytest.mark.case(17)
def test_scores_depend_on_the_difference_of_positions_only() -> None:
    embedding = RotaryEmbedding(config(**SIZES | {"max_position_embeddings": 4096}))
    cos, sin = at(embedding, 3000)
    query, key = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(0))

    def score(query_position: int, key_position: int) -> torch.Tensor:
        turned = [
            rotate(x, cos[:, position : position + 1], sin[:, position : position + 1])
            for x, position in ((query, query_position), (key, key_position))
        ]
        return (turned[0] * turned[1]).sum()

    for start in (0, 5, 700, 2900):
        torch.testing.assert_close(score(start + 17, start), score(17, 0), rtol=1e-4, atol=1e-4)
    assert (score(17, 0) - score(16, 0)).abs() > 1e-2


@pytest.mark.case(18)
def test_the_frequencies_of_llama_3() -> None:
    parameters = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0}
    parameters |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    sizes = {"hidden_size": 256, "num_attention_heads": 4, "max_position_embeddings": 131072}
    frequencies = RotaryEmbedding(config(**sizes, rope_parameters=parameters)).inv_freq
    assert frequencies[:3].tolist() == pytest.approx([1.0, 0.6636, 0.4404], abs=1e-4)
    assert frequencies[-1].item() == pytest.approx(9.418e-8, rel=1e-3)


@pytest.mark.parametrize("parameters", [ROPE, {"full_attention": ROPE, "sliding_attention": rope("linear")}])
def test_buffers_stay_float32_and_come_back_after_to_empty(parameters: dict[str, Any]) -> None:
    made = config(**SIZES, rope_parameters=parameters)
    wanted = dict(RotaryEmbedding(made).named_buffers())
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            embedding = RotaryEmbedding(made)
    finally:
        torch.set_default_dtype(torch.float32)
    assert not embedding.state_dict()
    embedding.to_empty(device="cpu")
    embedding.reset_buffers()
    for cast in (embedding, embedding.bfloat16(), embedding.half().float()):
        buffers = dict(cast.named_buffers())
        assert buffers.keys() == wanted.keys()
        for name, buffer in buffers.items():
            assert torch.equal(buffer, wanted[name]), name


@pytest.mark.case(19)
@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"rope_type": "spiral", "rope_theta": 1e4}, "unknown rope_type 'spiral'; there are: default, .*llama3"),
        ({"full_attention": {"rope_type": "spiral", "rope_theta": 1e4}}, "unknown rope_type 'spiral'"),
        (None, "rope_parameters is missing"),
        ({"rope_thet": 1e4}, r"rope_type 'default' has no rope_thet; did you mean rope_theta\?"),
        ({"rope_theta": 1e4, "factor": 2.0}, "rope_type 'default' has no factor"),
        ({"rope_theta": 1e4, "zzz": 2.0}, "rope_type 'default' has no zzz; it has rope_type, .*rope_theta"),
        (rope("llama3") | {"low_freq": 1.0}, r"rope_type 'llama3' has no low_freq; did you mean low_freq_factor\?"),
        ({"full_attention": ROPE | {"rope_thet": 1e4}}, r"no rope_thet; did you mean rope_theta\?"),
        (rope("linear") | {"factor": 0}, "factor is 0, and must be more than 0"),
        (rope("yarn") | {"factor": -4.0}, "factor is -4.0, and must be more than 0"),
        (rope("default") | {"rope_theta": float("nan")}, "rope_theta is nan, and must be more than 0"),
        (rope("default") | {"rope_theta": float("inf")}, "rope_theta is inf, and must be more than 0, and finite"),
        (rope("default") | {"rope_theta": 0}, "rope_theta is 0, and must be more than 0"),
    ],
)
@pytest.mark.filterwarnings("ignore:Missing validation function:UserWarning")
def test_variants_that_there_are_not(parameters: dict[str, Any] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RotaryEmbedding(config(**SIZES, rope_parameters=parameters))
