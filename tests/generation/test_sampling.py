"""Which tokens may be drawn, and how often."""

import pytest
import torch

from forgather.errors import ModelError, TrainingError
from forgather.generation.sampling import Sampler

# Probabilities 0.5, 0.25, 0.15, 0.1 in another order.
LOGITS = torch.tensor([0.15, 0.5, 0.1, 0.25]).log()


def possible(**settings) -> set[int]:
    return set(Sampler(**settings).distribution(LOGITS).nonzero().flatten().tolist())


def test_temperature_zero_takes_the_likeliest():
    assert Sampler(temperature=0).choose(LOGITS) == 1


def test_temperature_one_is_the_models_own_distribution():
    assert torch.allclose(Sampler().distribution(LOGITS), LOGITS.exp())


def test_temperature_sharpens_and_flattens():
    assert Sampler(temperature=0.5).distribution(LOGITS)[1] == pytest.approx(0.25 / 0.345)
    assert Sampler(temperature=100.0).distribution(LOGITS)[1] == pytest.approx(0.25, abs=0.01)


def test_top_k_and_top_p_limit_what_is_possible():
    assert possible(top_k=1) == {1}
    assert possible(top_k=2) == {1, 3}
    assert possible(top_k=100) == {0, 1, 2, 3}
    assert possible(top_p=0.4) == {1}  # never none
    assert possible(top_p=0.51) == {1, 3}
    assert possible(top_p=0.76) == {0, 1, 3}
    assert possible(top_p=1.0) == {0, 1, 2, 3}
    assert possible(top_k=3, top_p=0.5) == {1}  # top_p counts within the k likeliest: 0.5 / 0.9 is enough
    assert Sampler(top_k=2).distribution(LOGITS).sum() == pytest.approx(1)


def test_what_is_drawn_follows_the_distribution_and_the_seed():
    def draw(seed: int) -> list[int]:
        sampler = Sampler(seed=seed)
        return [sampler.choose(LOGITS) for _ in range(2000)]

    drawn = draw(1)
    assert drawn == draw(1)
    assert drawn != draw(2)
    counts = torch.bincount(torch.tensor(drawn), minlength=4) / 2000
    assert torch.allclose(counts, LOGITS.exp(), atol=0.04)


def test_tokens_beyond_the_tokenizers_are_never_chosen():
    assert Sampler(temperature=0, vocab_size=1).choose(LOGITS) == 0
    assert {Sampler(seed=seed, vocab_size=2).choose(LOGITS) for seed in range(50)} == {0, 1}


def test_scores_that_are_no_numbers_are_an_error():
    with pytest.raises(ModelError, match="NaN"):
        Sampler().choose(torch.tensor([0.0, float("nan")]))


@pytest.mark.parametrize("settings", [{"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_settings_that_mean_nothing_are_errors_with_a_fix(settings):
    with pytest.raises(TrainingError, match="fix: use"):
        Sampler(**settings)
