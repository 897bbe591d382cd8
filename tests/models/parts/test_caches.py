"""A cache changes how fast a model goes on, and nothing else."""

from typing import Any

import pytest
import torch
from transformers import Cache, DynamicCache, StaticCache

from tests.models.parts.composing import TOKENS, Model, compose, config
from tests.models.parts.kinds import KINDS, model_of

IMPLEMENTATIONS = ["eager", "sdpa"]
ALL = [(kind, name) for kind in KINDS for name in IMPLEMENTATIONS if (kind, name) != ("soft_capped", "sdpa")]
NAMES = [f"{kind}-{name}" for kind, name in ALL]
GREEDY: dict[str, Any] = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None}


def empty_cache(kind: str, model: Model) -> Cache:
    if kind == "dynamic":
        return DynamicCache(config=model.config)
    return StaticCache(config=model.config, max_cache_len=40)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize(("kind", "name"), ALL, ids=NAMES)
@torch.no_grad()
def test_going_on_in_pieces_is_as_at_once(kind: str, name: str, cache: str) -> None:
    """Pieces of several tokens and of one, across the ends of windows (4 and 5 tokens)."""
    model = model_of(kind, name)
    whole = model(TOKENS, use_cache=False).logits
    past = empty_cache(cache, model)
    pieces = [model(piece, past_key_values=past).logits for piece in TOKENS.split([3, 1, 1, 6, 1, 9, 1, 2], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-5, atol=2e-5)


@pytest.mark.case(45)
@pytest.mark.parametrize(("kind", "name"), ALL, ids=NAMES)
def test_greedy_text_is_the_same_with_any_cache_and_padding(kind: str, name: str) -> None:
    model = model_of(kind, name)
    prompt = TOKENS[:, :7]
    plain = model.generate(prompt, use_cache=False, **GREEDY)
    assert plain.shape == (2, 23)
    assert torch.equal(plain, model.generate(prompt, **GREEDY))
    assert torch.equal(plain, model.generate(prompt, cache_implementation="static", disable_compile=True, **GREEDY))
    padded = torch.cat([torch.ones(2, 6, dtype=torch.long), prompt], dim=1)
    mask = (torch.arange(13) >= 6).long().expand(2, -1)
    for cache in ({}, {"use_cache": False}, {"cache_implementation": "static", "disable_compile": True}):
        assert torch.equal(plain[:, 7:], model.generate(padded, attention_mask=mask, **cache, **GREEDY)[:, 13:])


@torch.no_grad()
def test_a_windowed_layer_keeps_no_more_than_its_window() -> None:
    model = model_of("windowed_by_layer", "sdpa")
    past = model(TOKENS).past_key_values
    assert [layer.keys.shape[2] for layer in past.layers] == [3, 24]  # the fourth is the token that comes


@torch.no_grad()
def test_single_heads_keep_what_they_are_given() -> None:
    past = model_of("single_head", "sdpa")(TOKENS).past_key_values
    assert [tuple(layer.keys.shape) for layer in past.layers] == [(2, 1, 24, 32)] * 2


def test_beams_are_reordered_with_their_cache() -> None:
    for kind in ("grouped", "alibi", "single_head"):
        model = model_of(kind, "sdpa")
        options = {"num_beams": 3, "max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
        cached = model.generate(TOKENS[:, :5], **options)
        assert torch.equal(cached, model.generate(TOKENS[:, :5], use_cache=False, **options))


@torch.no_grad()
def test_no_cache_is_opened_in_training_or_when_unwanted() -> None:
    model = compose(config("sdpa"))
    assert isinstance(model(TOKENS).past_key_values, DynamicCache)
    assert model(TOKENS, use_cache=False).past_key_values is None
    assert model.train()(TOKENS).past_key_values is None
    assert isinstance(model(TOKENS, use_cache=True).past_key_values, DynamicCache)
