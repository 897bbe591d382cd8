"""Parts that do not fit together say so when the model is made, not later in wrong numbers."""

from typing import Any

import pytest
import torch
from torch import nn

from forgather.models.parts.alibi import Alibi
from forgather.models.parts.layer_types import FULL, SLIDING, alternating, is_rotary, rotary_except_every, window
from forgather.models.parts.single_head import SingleHeadAttention
from tests.models.parts.composing import ROPE, TOKENS, compose, config, grouped
from tests.models.parts.kinds import MIXED, model_of


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": 30}, "hidden_size 30 is not a multiple of num_attention_heads 4: a hidden_size of 24 or 32"),
        ({"hidden_size": 30, "rotary": False}, "a hidden_size of 28 or 32 would be"),
        ({"num_kv_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"num_kv_heads": 0}, "num_key_value_heads is 0; it must be at least 1"),
        ({"num_heads": 0}, "num_attention_heads is 0"),
        ({"hidden_size": -4}, "hidden_size is -4"),
        ({"head_dim": 0}, "head_dim is 0"),
        ({"head_dim": 5}, "a head has 5 channels; rotary positions turn pairs"),
        ({"sliding_window": 0}, "sliding_window is 0"),
        ({"softcap": 0.0}, "softcap is 0"),
        ({"alibi": Alibi(2)}, "alibi has slopes for 2 heads, the attention has 4"),
    ],
)
def test_sizes_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grouped(config(), 0, **options)


def test_an_odd_head_without_rotary_positions_is_fine() -> None:
    assert compose(config(), lambda *where: grouped(*where, head_dim=5, rotary=False))(TOKENS).logits.isfinite().all()


def test_a_single_head_has_a_size() -> None:
    with pytest.raises(ValueError, match="hidden_size is 0"):
        SingleHeadAttention(config(), 0, hidden_size=0)
    with pytest.raises(ValueError, match="alibi has slopes for 4 heads, the attention has 1"):
        SingleHeadAttention(config(), 0, hidden_size=8, alibi=Alibi(4))


@pytest.mark.parametrize(
    ("kind", "implementation", "message"),
    [
        ("soft_capped", "sdpa", "sdpa has no soft-cap for scores: use eager, flex_attention"),
        ("soft_capped", "paged|sdpa", "sdpa has no soft-cap"),
        ("alibi", "flash_attention_2", "flash_attention_2 takes no bias on scores, which ALiBi is"),
        ("single_head_alibi", "flash_attention_3", "takes no bias on scores"),
    ],
)
@pytest.mark.parametrize("how", ["asked for", "changed to", "changed to by a mapping"])
def test_implementations_that_cannot_compute_it(kind: str, implementation: str, message: str, how: str) -> None:
    if how == "asked for":
        with pytest.raises(ValueError, match=message):
            model_of(kind, implementation)
        return
    model = model_of(kind)
    before = model(TOKENS).logits
    with pytest.raises(ValueError, match=message):
        model.set_attn_implementation(implementation if how == "changed to" else {"": implementation})
    assert model.config._attn_implementation == "eager"
    assert torch.equal(model(TOKENS).logits, before)


def test_where_none_is_asked_for_it_is_one_that_can() -> None:
    chosen = {kind: model_of(kind, attention=None).config._attn_implementation for kind in ("soft_capped", "alibi")}
    assert chosen == {"soft_capped": "eager", "alibi": "sdpa"}


def test_an_implementation_that_there_is_not() -> None:
    with pytest.raises(ValueError, match="guessing"):
        compose(config("guessing"))
    model = compose(config())
    with pytest.raises(ValueError, match="guessing"):
        model.set_attn_implementation("guessing")


@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        ({}, {"sliding_window": 4}, "layer 0 has sliding_attention over 4 tokens, where the config has full_attention"),
        ({"sliding_window": 4}, {"sliding_window": None}, "layer 0 has full_attention, where .* sliding_attention"),
        ({"sliding_window": 4}, {"sliding_window": 5}, "over 5 tokens, where .* sliding_window 4"),
        (MIXED, {"sliding_window": 4}, "layer 1 has sliding_attention over 4 tokens, where .* full_attention"),
    ],
)
def test_layers_are_what_the_config_says(sizes: dict[str, Any], options: dict[str, Any], message: str) -> None:
    """Caches drop tokens and masks hide them by the config: other layers would compute something else in silence."""
    with pytest.raises(ValueError, match=message):
        compose(config(**sizes), lambda *where: grouped(*where, **options))


def test_as_many_layers_as_the_config_has_types() -> None:
    made = config(**MIXED)
    with pytest.raises(ValueError, match="layer_types has 2 entries for 1 layers"):
        compose(made, layers=nn.ModuleList([Foreign(grouped(made, 0))]))


def test_rotary_layers_need_cosines() -> None:
    with pytest.raises(ValueError, match="layer 0 has rotary positions, but there is no rotary_emb"):
        compose(config(), rotary_emb=None)
    by_type = {"rope_parameters": {SLIDING: ROPE}}
    with pytest.raises(ValueError, match="rope_parameters is for sliding_attention, and layer 0 has full_attention"):
        compose(config(**by_type))


def test_neither_ids_nor_embeddings_or_both() -> None:
    model = compose(config())
    embedded = model.get_input_embeddings()(TOKENS)
    for inputs in ({}, {"input_ids": TOKENS, "inputs_embeds": embedded}):
        with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
            model(**inputs)
    assert torch.equal(model(inputs_embeds=embedded).logits, model(TOKENS).logits)


@pytest.mark.case(28)
def test_which_layers_turn() -> None:
    layers = rotary_except_every(8, 4)
    assert [layer_idx for layer_idx in range(8) if is_rotary(layers, layer_idx)] == [0, 1, 2, 4, 5, 6]
    assert rotary_except_every(3, None) == [1, 1, 1]
    assert is_rotary(None, 7)
    with pytest.raises(ValueError, match="interval is 0"):
        rotary_except_every(8, 0)
    with pytest.raises(ValueError, match="no_rope_layers has 2 entries, and none for layer 2"):
        is_rotary([1, 0], 2)


@pytest.mark.case(28)
@torch.no_grad()
def test_layers_without_rotary_positions_do_not_see_them() -> None:
    """Far positions turn the scores of the first layer and not of the second."""
    model = model_of("turned_by_layer")
    seen = {}
    for start in (0, 1):
        positions = torch.arange(24).mul(start + 1).unsqueeze(0)
        hidden = torch.randn(2, 24, 32, generator=torch.Generator().manual_seed(0))
        turn = model.model.rotary_emb(hidden, positions)
        seen[start] = [layer(hidden, position_embeddings=turn) for layer in model.model.layers]
    assert not torch.allclose(seen[0][0], seen[1][0], atol=1e-3)
    assert torch.equal(seen[0][1], seen[1][1])


def test_which_layers_have_a_window() -> None:
    layer_types = alternating(7, 3)
    assert layer_types == [SLIDING, SLIDING, FULL, SLIDING, SLIDING, FULL, SLIDING]
    assert [window(layer_types, layer_idx, 16) for layer_idx in range(3)] == [16, 16, None]
    assert alternating(2, 1) == [FULL, FULL]
    assert window(None, 5, 16) == 16
    assert window(None, 5, None) is None
    with pytest.raises(ValueError, match="full_every is 0"):
        alternating(4, 0)
    with pytest.raises(ValueError, match="layer_types: unknown type 'chunked_attention'; there are: full_attention"):
        window(["chunked_attention"], 0, 16)
    with pytest.raises(ValueError, match="layer 0 is sliding_attention, but there is no sliding_window"):
        window([SLIDING], 0, None)
    with pytest.raises(ValueError, match="layer_types has 1 entries, and none for layer 1"):
        window([FULL], 1, None)


class Foreign(nn.Module):
    """A layer of a project's own, without attention."""

    attention_type = FULL

    def __init__(self, self_attn: nn.Module) -> None:
        super().__init__()

    def forward(self, hidden_BLD: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return hidden_BLD * 2


def test_layers_of_a_projects_own_are_taken_as_they_are() -> None:
    model = compose(config(), layer=Foreign)
    hidden = model(TOKENS, output_hidden_states=True, use_cache=False)
    assert hidden.logits.isfinite().all()
