"""Every kind of attention is one function: of its own tokens and those before, the same in each implementation."""

import pytest
import torch
from torch import nn
from transformers import PreTrainedConfig

from forgather.models.parts.norm import RMSNorm
from tests.models.parts.composing import POSITIONS, SIZES, TOKENS, compose, config, grouped
from tests.models.parts.kinds import KINDS, model_of

IMPLEMENTATIONS = ["eager", "sdpa", "flex_attention"]
ALL = [(kind, name) for kind in KINDS for name in IMPLEMENTATIONS if (kind, name) != ("soft_capped", "sdpa")]
OTHERS = [(kind, name) for kind, name in ALL if name != "eager"]
PADDING = torch.tensor([[0] * 5 + [1] * 19, [1] * 24])
NAMES = [f"{kind}-{name}" for kind, name in ALL]
pytestmark = pytest.mark.usefixtures("flex")


@pytest.mark.case(16, 46, 49)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("kind", "other"), OTHERS)
def test_implementations_are_one_function(kind: str, other: str, packed: bool) -> None:
    model = model_of(kind)
    results = []
    for name in ("eager", other):
        model.set_attn_implementation(name)
        model.zero_grad()
        output = model(TOKENS, position_ids=POSITIONS if packed else None, labels=TOKENS, use_cache=False)
        output.loss.backward()
        results.append((output.logits, [parameter.grad for parameter in model.parameters()]))
    (logits, gradients), (other_logits, other_gradients) = results
    assert len(gradients) == len(other_gradients)
    torch.testing.assert_close(other_logits, logits, rtol=1e-5, atol=2e-5)
    for (parameter, _), one, same in zip(model.named_parameters(), gradients, other_gradients, strict=True):
        torch.testing.assert_close(same, one, rtol=1e-5, atol=1e-5, msg=parameter)
        assert one.abs().max() > 0, f"{parameter} is not used"


@pytest.mark.case(46)
@pytest.mark.parametrize(("kind", "name"), ALL, ids=NAMES)
@torch.no_grad()
def test_packed_documents_are_as_alone(kind: str, name: str) -> None:
    model = model_of(kind, name)
    together = model(TOKENS, position_ids=POSITIONS).logits
    alone = torch.cat([model(part).logits for part in TOKENS.split([9, 10, 5], dim=1)], dim=1)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=2e-5)
    assert (together - model(TOKENS).logits)[:, 9:].abs().max() > 1e-2, "the documents would not have seen one another"


@pytest.mark.case(25)
@pytest.mark.parametrize(("kind", "name"), ALL, ids=NAMES)
@torch.no_grad()
def test_a_token_changes_nothing_before_it(kind: str, name: str) -> None:
    model = model_of(kind, name)
    changed = TOKENS.clone()
    changed[:, 11] = 2
    before, after = model(TOKENS).logits, model(changed).logits
    assert torch.equal(before[:, :11], after[:, :11])
    assert (before != after)[:, 11:14].any(-1).all()


@pytest.mark.parametrize(("kind", "name"), ALL, ids=NAMES)
@torch.no_grad()
def test_padding_on_the_left_is_not_seen(kind: str, name: str) -> None:
    model = model_of(kind, name)
    positions = (PADDING.cumsum(-1) - 1).clamp(min=0)
    padded = model(TOKENS, attention_mask=PADDING, position_ids=positions).logits
    torch.testing.assert_close(padded[:1, 5:], model(TOKENS[:1, 5:]).logits, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(padded[1:], model(TOKENS[1:]).logits, rtol=1e-5, atol=2e-5)
    assert padded.isfinite().all()


@pytest.mark.parametrize(("kind", "name"), ALL, ids=NAMES)
@torch.no_grad()
def test_padding_on_the_right_is_not_seen(kind: str, name: str) -> None:
    model = model_of(kind, name)
    padded = model(TOKENS, attention_mask=PADDING.flip(1)).logits
    torch.testing.assert_close(padded[:1, :19], model(TOKENS[:1, :19]).logits, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(padded[1:], model(TOKENS[1:]).logits, rtol=1e-5, atol=2e-5)


@pytest.mark.case(24)
@pytest.mark.parametrize("kind", ["windowed", "alibi_windowed"])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@torch.no_grad()
def test_a_window_ends_where_it_says(kind: str, name: str) -> None:
    model = model_of(kind, name, sliding_window=4, num_hidden_layers=1)
    changed = TOKENS.clone()
    changed[:, 0] = 2
    same = (model(TOKENS).logits == model(changed).logits).all(-1)
    assert same[:, 4:].all()
    assert not same[:, :4].any()


@pytest.mark.parametrize("name", ["eager", "sdpa"])
@torch.no_grad()
def test_windows_of_single_layers(name: str) -> None:
    """One layer sees four tokens and the next all of them: so a window over both would see seven."""
    changed = TOKENS.clone()
    changed[:, 0] = 2
    reached = []
    for kind in ("windowed", "windowed_by_layer"):
        model = model_of(kind, name)
        same = (model(TOKENS).logits == model(changed).logits).all(-1)
        reached.append(int((~same[0]).nonzero().max()))
    assert reached == [6, 23]


@pytest.mark.case(23)
@torch.no_grad()
def test_the_size_of_queries_does_not_matter_under_a_norm() -> None:
    def normed(made: PreTrainedConfig, layer_idx: int) -> nn.Module:
        return grouped(made, layer_idx, q_norm=RMSNorm(8), k_norm=RMSNorm(8))

    for attention, equal in ((normed, True), (grouped, False)):
        model = compose(config(), attention)
        before = model(TOKENS).logits
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight *= 10
        assert torch.allclose(model(TOKENS).logits, before, rtol=1e-4, atol=1e-4) == equal


@pytest.mark.case(16)
def test_shapes_of_grouped_heads() -> None:
    attention = grouped(config(), 0)
    shapes = {name: tuple(weight.shape) for name, weight in attention.named_parameters()}
    assert shapes == {
        "q_proj.weight": (32, 32),
        "k_proj.weight": (16, 32),
        "v_proj.weight": (16, 32),
        "o_proj.weight": (32, 32),
    }
    free = grouped(config(), 0, head_dim=10, bias=True, output_bias=False)
    shapes = {name: tuple(weight.shape) for name, weight in free.named_parameters()}
    assert shapes["q_proj.weight"] == (40, 32)
    assert shapes["k_proj.bias"] == (20,)
    assert shapes["o_proj.weight"] == (32, 40)
    assert "o_proj.bias" not in shapes


@torch.no_grad()
def test_scores_stay_below_the_soft_cap() -> None:
    """With scores bounded to a millionth, each token weighs all before it alike."""
    capped = compose(config(), lambda made, layer_idx: grouped(made, layer_idx, softcap=1e-6))
    weights = capped(TOKENS, output_attentions=True).attentions[0]
    wanted = torch.ones(24, 24).tril() / torch.arange(1, 25)[:, None]
    torch.testing.assert_close(weights, wanted.expand_as(weights), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_weights_are_recorded_for_every_kind() -> None:
    for kind in KINDS:
        heads = 1 if kind.startswith("single") else SIZES["num_attention_heads"]
        output = model_of(kind)(TOKENS, output_attentions=True, output_hidden_states=True)
        assert [tuple(weights.shape) for weights in output.attentions] == [(2, heads, 24, 24)] * 2
        assert len(output.hidden_states) == 3


def test_attention_drops_out_in_training_only() -> None:
    model = compose(config(), lambda made, layer_idx: grouped(made, layer_idx, dropout=0.5))
    assert torch.equal(model(TOKENS).logits, model(TOKENS).logits)
    model.train()
    assert not torch.equal(model(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "soft_capped"])
@torch.no_grad()
def test_half_precision_follows(kind: str, dtype: torch.dtype) -> None:
    """In each dtype sdpa and eager agree to its own precision, with padding too: no mask turns to NaN."""
    model = model_of(kind).to(dtype)
    logits = []
    for name in ("eager", "sdpa"):
        model.set_attn_implementation(name)
        logits.append(model(TOKENS, attention_mask=PADDING).logits[1])
    assert logits[0].dtype == dtype
    limit = 1e-5 if dtype == torch.float32 else 0.2
    torch.testing.assert_close(logits[0], logits[1], rtol=limit, atol=limit * logits[0].abs().max().item())
