"""What two models compute differently shows, however little of it a short text would show."""

from typing import Any

import pytest
import torch

from forgather.conversion.gpt2_names import of_package, of_stock
from forgather.conversion.recipes import Recipe
from forgather.conversion.verify import logits_of, on_meta, require_equal, require_same_computation, shapes_of
from forgather.conversion.weight_sources import Read
from forgather.errors import ModelError
from tests.conversion.stock_models import CLASSES, LLAMA3, stock_model


def same(name: str) -> Recipe:
    return Recipe((name,))


def compare(family: str, one: dict[str, Any], other: dict[str, Any]) -> None:
    model_class = CLASSES[family][1]
    configs = [stock_model(family, **settings).config for settings in (one, other)]
    require_same_computation(model_class, configs[0], model_class, configs[1], same)


WINDOW = {"sliding_window": 64}
TYPES = ("sliding_attention", "full_attention")
DIFFERENT: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "a wide window": ("mistral", WINDOW, {"sliding_window": None}),
    "which layers have it": (
        "gemma3",
        WINDOW | {"layer_types": list(TYPES)},
        WINDOW | {"layer_types": list(reversed(TYPES))},
    ),
    "frequencies of far positions": ("llama", {}, {"rope_parameters": LLAMA3}),
    "epsilon": ("llama", {"rms_norm_eps": 1e-5}, {"rms_norm_eps": 1e-3}),
    "scale of scores": ("gemma3", {"query_pre_attn_scalar": 256}, {"query_pre_attn_scalar": 128}),
    "soft-cap": ("gemma3", {}, {"final_logit_softcapping": 30.0}),
    "activation": ("gpt2", {}, {"activation_function": "gelu"}),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_a_difference_of_computation_shows(what: str) -> None:
    family, one, other = DIFFERENT[what]
    compare(family, one, one)
    with pytest.raises(ModelError, match="logits differ by up to"):
        compare(family, one, other)


@pytest.mark.parametrize("family", CLASSES)
def test_ids_beyond_the_tokens_that_are_compared_give_no_warning(
    family: str, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    ids = {"bos_token_id": 700, "eos_token_id": 701, "pad_token_id": 702}
    capfd.readouterr()
    compare(family, {"vocab_size": 800} | ids, {"vocab_size": 800} | ids)
    assert "token_id" not in caplog.text + capfd.readouterr().err


@pytest.mark.parametrize("family", CLASSES)
@pytest.mark.parametrize("tied", [True, False])
def test_streamed_logits_are_those_of_the_whole_model(family: str, tied: bool) -> None:
    stored = stock_model(family, torch.bfloat16, tie_word_embeddings=tied)
    streamed = on_meta(type(stored), stored.config)
    logits = logits_of(streamed, stored.state_dict().__getitem__)
    assert all(parameter.is_meta for parameter in streamed.parameters())

    whole = type(stored)(streamed.config).eval()
    whole.load_state_dict(stored.state_dict())
    input_ids = torch.randint(288, (2, 24), generator=torch.Generator().manual_seed(0))
    position_ids = torch.stack((torch.arange(24), torch.arange(96 - 24, 96)))
    with torch.no_grad():
        expected = whole(input_ids=input_ids, position_ids=position_ids).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_weights_that_are_not_numbers_are_told() -> None:
    whole = stock_model("llama")
    weights = dict(whole.state_dict())
    one = on_meta(type(whole), whole.config)

    def reader(value: float) -> Read:
        return lambda name: torch.full_like(weights[name], value) if name == "model.norm.weight" else weights[name]

    require_equal(one, lambda: reader(1.0), one, lambda: reader(1.0))
    with pytest.raises(ModelError, match="are not finite"):
        require_equal(one, lambda: reader(float("nan")), one, lambda: reader(float("nan")))


def test_the_names_of_gpt2_lead_there_and_back() -> None:
    stock = on_meta(CLASSES["gpt2"][1], stock_model("gpt2", tie_word_embeddings=False).config)
    shapes = shapes_of(stock)
    draws = {name: torch.randn(shape) for name, shape in shapes.items()}
    ours = {
        name: of_package(name).make([draws[source] for source in of_package(name).names])
        for stock_name in shapes
        for name in of_stock(stock_name).names
    }
    for name in shapes:
        recipe = of_stock(name)
        assert torch.equal(recipe.make([ours[source] for source in recipe.names]), draws[name]), name
