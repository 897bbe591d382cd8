"""ALiBi: its slopes, and what they do to scores."""

import pytest
import torch
from torch import nn

from forgather.models.parts.alibi import Alibi
from forgather.models.parts.attention import Attention
from tests.models.parts.composing import TOKENS, compose, config, with_alibi


@pytest.mark.case(20)
@pytest.mark.parametrize("trainable", [False, True])
def test_slopes(trainable: bool) -> None:
    def slopes(num_heads: int, start: str) -> list[float]:
        return Alibi(num_heads, trainable=trainable, slopes=start).slopes.tolist()

    assert slopes(8, "default") == [2.0**-power for power in range(8)]
    assert slopes(8, "half") == [0.5, 0.25, 0.125, 0.0625, 0.0, 0.0, 0.0, 0.0]
    assert slopes(4, "default") == pytest.approx([1, 0.198425, 0.0393725, 0.0078125], rel=1e-5)
    assert slopes(4, "half") == pytest.approx([0.5, 0.0992126, 0.0, 0.0], rel=1e-5)
    assert slopes(1, "default") == [1.0]
    assert slopes(1, "half") == [0.5]


def test_the_bias_is_slope_times_distance() -> None:
    bias = Alibi(2)(torch.arange(3, 5), torch.arange(5), torch.float32)
    assert bias.shape == (1, 2, 2, 5)
    assert bias[0, 0].tolist() == [[-3, -2, -1, 0, 1], [-4, -3, -2, -1, 0]]
    torch.testing.assert_close(bias[0, 1], bias[0, 0] / 128)


@torch.no_grad()
def test_attention_with_bias_is_the_formula() -> None:
    """Weights of softmax(q k / sqrt(C) - slope * distance), written out for each head."""
    attention: Attention = with_alibi(config(), 0)
    hidden = torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(0))
    mask = torch.full((7, 7), float("-inf")).triu(1)[None, None]
    _, weights = attention(hidden, attention_mask=mask)
    query = attention.q_proj(hidden).view(7, 4, 8)
    key = attention.k_proj(hidden).view(7, 2, 8)
    for head, slope in enumerate([1, 0.198425, 0.0393725, 0.0078125]):
        scores = query[:, head] @ key[:, head // 2].T / 8**0.5
        for row in range(7):
            wanted = torch.stack([scores[row, col] - slope * (row - col) for col in range(row + 1)]).softmax(0)
            torch.testing.assert_close(weights[0, head, row, : row + 1], wanted, rtol=1e-4, atol=1e-6)


def test_fixed_slopes_are_no_parameter_and_come_back_after_to_empty() -> None:
    with torch.device("meta"):
        model = nn.ModuleList([with_alibi(config(), 0)])
    assert not [name for name, _ in model.named_parameters() if "slopes" in name]
    assert not [name for name in model.state_dict() if "slopes" in name]
    model.to_empty(device="cpu")
    for module in model.modules():
        if isinstance(module, Alibi):
            module.slopes.fill_(7.0)
            module.reset_buffers()
            assert module.slopes[0] == 1.0


def test_fixed_slopes_stay_float32_when_the_model_is_cast() -> None:
    model = compose(config("sdpa"), with_alibi).bfloat16()
    assert {module.slopes.dtype for module in model.modules() if isinstance(module, Alibi)} == {torch.float32}
    assert model(TOKENS).logits.dtype == torch.bfloat16


def test_trained_slopes_are_a_parameter_with_a_start_of_its_own() -> None:
    alibi = Alibi(4, trainable=True)
    assert [name for name, _ in alibi.named_parameters()] == ["slopes"]
    nn.init.zeros_(alibi.slopes)
    alibi.reset_buffers()
    assert not alibi.slopes.any(), "a checkpoint's slopes are not to be computed anew"
    alibi.reset_parameters()
    assert alibi.slopes[0] == 1.0
    alibi.slopes._is_hf_initialized = True
    nn.init.zeros_(alibi.slopes)
    alibi.reset_parameters()
    assert not alibi.slopes.any(), "what transformers has loaded stays"


@pytest.mark.parametrize(
    ("num_heads", "slopes", "message"), [(0, "default", "num_heads is 0"), (4, "steep", "unknown slopes 'steep'")]
)
def test_slopes_that_there_are_not(num_heads: int, slopes: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Alibi(num_heads, slopes=slopes)
