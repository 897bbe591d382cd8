"""What stands before and after the layers: embeddings, positions, heads."""

import math

import pytest
import torch
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from forgather.models.parts.embedding import ScaledEmbedding
from forgather.models.parts.head import SoftcappedLinear, output_head
from forgather.models.parts.positions import LearnedPositions, SinusoidalPositions
from forgather.trainers.loss import find_reason_for_logits
from tests.models.parts.composing import TOKENS, Model, compose, config, grouped


def unturned(*where: object) -> nn.Module:
    return grouped(*where, rotary=False)


@pytest.mark.case(22)
@torch.no_grad()
def test_scaled_embeddings_are_of_unit_size() -> None:
    embedding = ScaledEmbedding(1000, 64)
    nn.init.normal_(embedding.weight, std=64**-0.5, generator=torch.Generator().manual_seed(0))
    assert embedding(torch.arange(1000)).std().item() == pytest.approx(1.0, rel=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scaled_embeddings_are_gemmas(dtype: torch.dtype) -> None:
    """In bfloat16 the factor itself is rounded: sqrt(48) is 6.9375 there."""
    ours = ScaledEmbedding(61, 48, padding_idx=1).to(dtype)
    theirs = Gemma3TextScaledWordEmbedding(61, 48, 1, embed_scale=math.sqrt(48)).to(dtype)
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(ours(TOKENS), theirs(TOKENS))
    assert not ours(torch.tensor([1])).any()


def test_a_scale_is_a_number_or_sqrt() -> None:
    embedding = ScaledEmbedding(5, 4, scale=0.25)
    assert torch.equal(embedding(torch.arange(5)), embedding.weight * 0.25)
    with pytest.raises(ValueError, match="unknown scale 'cube'"):
        ScaledEmbedding(5, 4, scale="cube")


def tied_model() -> Model:
    made = config("sdpa", tie_word_embeddings=True)
    return compose(made, embed_tokens=ScaledEmbedding(made.vocab_size, made.hidden_size))


def test_scaled_embeddings_tie_and_resize() -> None:
    model = tied_model()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    before = model(TOKENS).logits
    model.resize_token_embeddings(70, mean_resizing=False)
    assert isinstance(model.get_input_embeddings(), ScaledEmbedding)
    assert model.get_input_embeddings().scale == math.sqrt(32)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model(TOKENS).logits.shape == (2, 24, 70)
    torch.testing.assert_close(model(TOKENS).logits[..., :61], before)


@pytest.mark.parametrize("kind", [LearnedPositions, SinusoidalPositions])
@torch.no_grad()
def test_positions_are_added(kind: type[LearnedPositions | SinusoidalPositions]) -> None:
    """They tell order apart, and each document of a packed row begins anew."""
    positions = kind(32, 32)
    model = compose(config("sdpa"), unturned, embed_positions=positions)
    seen = []
    model.model.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(TOKENS)
    torch.testing.assert_close(seen[0], model.model.embed_tokens(TOKENS) + positions(torch.arange(24).unsqueeze(0)))
    packed = torch.cat([torch.arange(16), torch.arange(8)]).expand(2, -1)
    apart = torch.cat([model(TOKENS[:, :16]).logits, model(TOKENS[:, 16:]).logits], dim=1)
    torch.testing.assert_close(model(TOKENS, position_ids=packed).logits, apart, rtol=1e-5, atol=2e-5)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    plain = model.generate(TOKENS[:, :6], use_cache=False, **options)
    assert torch.equal(plain, model.generate(TOKENS[:, :6], **options))


def test_sinusoids_are_the_papers() -> None:
    table = SinusoidalPositions(50, 6)(torch.arange(50))
    for position in (0, 1, 7, 49):
        for pair in range(3):
            angle = position / 10_000 ** (2 * pair / 6)
            assert table[position, 2 * pair].item() == pytest.approx(math.sin(angle), abs=1e-5)
            assert table[position, 2 * pair + 1].item() == pytest.approx(math.cos(angle), abs=1e-5)
    assert SinusoidalPositions(5, 7)(torch.arange(5)).shape == (5, 7)


def test_sinusoids_are_in_no_checkpoint_and_stay_float32() -> None:
    wanted = SinusoidalPositions(9, 6).table
    with torch.device("meta"):
        positions = SinusoidalPositions(9, 6)
    assert not positions.state_dict()
    positions.to_empty(device="cpu").reset_buffers()
    assert torch.equal(positions.table, wanted)
    assert torch.equal(positions.bfloat16().table, wanted)
    model = compose(config("sdpa"), unturned, embed_positions=SinusoidalPositions(32, 32)).bfloat16()
    assert model(TOKENS).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", [LearnedPositions, SinusoidalPositions])
@torch.no_grad()
def test_a_sequence_beyond_the_last_position(kind: type[LearnedPositions | SinusoidalPositions]) -> None:
    model = compose(config("sdpa"), unturned, embed_positions=kind(20, 32))
    with pytest.raises(ValueError, match="a sequence of 24 tokens is longer than the 20 positions"):
        model(TOKENS)
    past = model(TOKENS[:, :19]).past_key_values
    past = model(TOKENS[:, 19:20], past_key_values=past).past_key_values
    with pytest.raises(ValueError, match="a sequence of 21 tokens is longer than the 20 positions"):
        model(TOKENS[:, 20:21], past_key_values=past)
    packed = torch.cat([torch.arange(12), torch.arange(12)]).expand(2, -1)
    assert model(TOKENS, position_ids=packed).logits.shape[1] == 24, "a packed row may be longer than its documents"


@torch.no_grad()
def test_dropout_of_embeddings_is_in_training_only() -> None:
    model = compose(config("sdpa"), dropout=0.5)
    assert torch.equal(model(TOKENS).logits, model(TOKENS).logits)
    seen = []
    model.model.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model.train()(TOKENS)
    assert 0.4 < (seen[0] == 0).float().mean() < 0.6


@pytest.mark.case(27)
@torch.no_grad()
def test_a_soft_cap_bounds_logits() -> None:
    head = SoftcappedLinear(16, 8, softcap=30.0)
    plain = nn.Linear(16, 8, bias=False)
    plain.load_state_dict(head.state_dict())
    hidden = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(head(hidden), 30 * (plain(hidden) / 30).tanh())
    assert plain(hidden * 60).abs().max() > 30
    assert head(hidden * 60).abs().max() < 30
    uncapped = SoftcappedLinear(16, 8)
    uncapped.load_state_dict(head.state_dict())
    assert torch.equal(uncapped(hidden), plain(hidden))
    with pytest.raises(ValueError, match="softcap is 0"):
        SoftcappedLinear(16, 8, softcap=0)


def test_which_heads_leave_the_logits_unmade() -> None:
    """The training loss asks the head for the loss itself only where the logits are a plain product."""
    made = config("sdpa")
    reasons = {}
    for name, head in {
        "plain": output_head(32, 61),
        "bias": output_head(32, 61, bias=True),
        "capped": output_head(32, 61, softcap=30.0),
    }.items():
        model = compose(made)
        model.lm_head = head
        reasons[name] = find_reason_for_logits(model)
    assert reasons == {"plain": None, "bias": "the head has a bias", "capped": "the head is a SoftcappedLinear"}


def test_a_soft_capped_head_resizes() -> None:
    model = compose(config("sdpa"))
    model.lm_head = output_head(32, 61, softcap=2.0)
    nn.init.normal_(model.lm_head.weight, generator=torch.Generator().manual_seed(0))
    model.resize_token_embeddings(70, mean_resizing=False)
    logits = model(TOKENS).logits
    assert logits.shape == (2, 24, 70)
    assert 1.99 < logits.abs().max() <= 2
