"""How layers put attention, feed-forward and norms together."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from forgather.models.parts.layer import (
    AttentionOnlyLayer,
    DeepNetLayer,
    PostNormLayer,
    PreNormLayer,
    SandwichLayer,
    deepnet_alpha,
    deepnet_beta,
)
from forgather.models.parts.mlp import MLP
from forgather.models.parts.norm import RMSNorm
from tests.models.parts.composing import TOKENS, Model, compose, config, grouped

BEFORE = ("input_layernorm", "post_attention_layernorm")
AFTER = ("post_attention_layernorm", "post_feedforward_layernorm")
AROUND = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
LAYERS: dict[str, tuple[Callable[..., GradientCheckpointingLayer], tuple[str, ...]]] = {
    "pre": (PreNormLayer, BEFORE),
    "post": (PostNormLayer, AFTER),
    "deepnet": (partial(DeepNetLayer, alpha=2.0), AFTER),
    "sandwich": (SandwichLayer, AROUND),
}


class Times(nn.Module):
    """A stand-in for a branch or a norm: multiplies, or adds."""

    attention_type = "full_attention"

    def __init__(self, factor: float, *, plus: float = 0.0, weights: bool = False) -> None:
        super().__init__()
        self.factor, self.plus, self.weights = factor, plus, weights

    def forward(self, x: torch.Tensor, **kwargs: Any) -> Any:
        y = self.factor * x + self.plus
        return (y, None) if self.weights else y


def layer_of(kind: str, self_attn: nn.Module, mlp: nn.Module, norm: Callable[[], nn.Module], **options: Any) -> Any:
    made, norms = LAYERS[kind]
    return made(self_attn=self_attn, mlp=mlp, **{name: norm() for name in norms}, **options)


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        # attention is 3x, feed-forward 5x; norms add 1, 10, 100 and 1000 in the order in which they are declared
        ("pre", (2 + 3 * (2 + 1)) + 5 * ((2 + 3 * (2 + 1)) + 10)),
        ("post", (2 + 3 * 2 + 1) + 5 * (2 + 3 * 2 + 1) + 10),
        ("deepnet", 2 * (2 * 2 + 3 * 2 + 1) + 5 * (2 * 2 + 3 * 2 + 1) + 10),
        ("sandwich", (2 + 3 * 3 + 10) + 5 * (2 + 3 * 3 + 10 + 100) + 1000),
    ],
)
def test_formulas(kind: str, wanted: float) -> None:
    added = iter([1.0, 10.0, 100.0, 1000.0])
    layer = layer_of(kind, Times(3, weights=True), Times(5), lambda: Times(1, plus=next(added)))
    assert layer(torch.tensor(2.0)).item() == wanted


def test_attention_only() -> None:
    layer = AttentionOnlyLayer(self_attn=Times(3, weights=True), input_layernorm=Times(1, plus=1))
    assert layer(torch.tensor(2.0)).item() == 2 + 3 * 3


@pytest.mark.case(15)
@torch.no_grad()
def test_branches_that_give_nothing_leave_the_stream_as_it_is() -> None:
    model = compose(config())
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    hidden = model(TOKENS, output_hidden_states=True).hidden_states
    assert torch.equal(hidden[0], hidden[1])


@pytest.mark.case(21)
def test_constants_of_deepnet() -> None:
    assert [deepnet_alpha(layers) for layers in (4, 8, 32)] == pytest.approx([1.682, 2.0, 2.828], abs=1e-3)
    assert [deepnet_beta(layers) for layers in (4, 8, 32)] == pytest.approx([0.4204, 0.3536, 0.25], abs=1e-4)


@pytest.mark.parametrize("kind", LAYERS)
def test_dropout_is_on_what_branches_add(kind: str) -> None:
    """With all of it dropped a layer is what it does to the stream alone."""
    layer = layer_of(kind, Times(3, weights=True), Times(5), lambda: Times(1), dropout=1.0)
    assert layer.eval()(torch.ones(4)).tolist() != [1.0] * 4
    stream = 4.0 if kind == "deepnet" else 1.0  # alpha, twice
    assert layer.train()(torch.ones(4)).tolist() == [stream] * 4


def recomputing(kind: str) -> Model:
    made = config("sdpa", num_hidden_layers=4)

    def layer(self_attn: nn.Module) -> nn.Module:
        mlp = MLP(hidden_size=32, intermediate_size=48)
        return layer_of(kind, self_attn, mlp, lambda: RMSNorm(32))  # type: ignore[no-any-return]

    return compose(made, grouped, layer=layer).train()


@pytest.mark.case(26)
@pytest.mark.parametrize("kind", LAYERS)
def test_recomputation_changes_nothing(kind: str) -> None:
    results = []
    for every in (None, 1, 2):
        model = recomputing(kind)
        if every is not None:
            model.activation_checkpointing_enable(every_n_layers=every)
            flags = [layer.gradient_checkpointing for layer in model.model.layers]
            assert flags == ([True] * 4 if every == 1 else [True, False, True, False])
        calls: list[nn.Module] = []
        for layer in model.model.layers:
            layer.self_attn.register_forward_hook(lambda module, *args: calls.append(module))  # noqa: B023
        loss = model(TOKENS, labels=TOKENS).loss
        loss.backward()
        assert len(calls) == 4 + (0 if every is None else 4 // every), "what was not kept is computed again"
        results.append([loss, *(parameter.grad for parameter in model.parameters())])
    for one, two, three in zip(*results, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)


def test_recomputation_draws_the_same_dropout() -> None:
    gradients = []
    for recompute in (False, True):
        made = config("sdpa")
        model = compose(made, lambda *where: grouped(*where, dropout=0.3), dropout=0.2).train()
        if recompute:
            model.activation_checkpointing_enable()
        torch.manual_seed(0)
        model(TOKENS, labels=TOKENS).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)
