"""What each initializer draws, whole or in shards."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from forgather.models.initialize import initialize
from forgather.models.parts.initializers import (
    Constant,
    DepthScaledNormal,
    FanInNormal,
    FanInUniform,
    Initializer,
    Keep,
    Normal,
    Ones,
    Orthogonal,
    TruncatedNormal,
    Uniform,
    XavierNormal,
    XavierUniform,
    ZeroRow,
    Zeros,
)


def drawn(initializer: Initializer, rows: int = 400, columns: int = 900, seed: int = 0) -> torch.Tensor:
    linear = nn.Linear(columns, rows, bias=False)
    initialize(linear, {"weight": initializer}, seed)
    return linear.weight.detach()


UNIFORM = math.sqrt(3)  # the bound of a uniform distribution in its standard deviations


@pytest.mark.parametrize(
    ("initializer", "std", "reach"),
    [
        (Normal(std=0.02), 0.02, None),
        (DepthScaledNormal(std=0.02, num_layers=4), 0.02 / math.sqrt(8), None),
        (TruncatedNormal(std=0.02), 0.02 * 0.9866, 0.06),
        (TruncatedNormal(std=0.02, cutoff=1.0), 0.02 * 0.5396, 0.02),
        (Uniform(bound=0.3), 0.3 / UNIFORM, 0.3),
        (FanInNormal(), 1 / 30, None),
        (FanInNormal(gain=2.0), 2 / 30, None),
        (FanInUniform(), 1 / 30 / UNIFORM, 1 / 30),
        (XavierNormal(gain=0.5), 0.5 * math.sqrt(2 / 1300), None),
        (XavierUniform(gain=0.5), 0.5 * math.sqrt(2 / 1300), 0.5 * UNIFORM * math.sqrt(2 / 1300)),
    ],
)
def test_spread(initializer: Initializer, std: float, reach: float | None) -> None:
    values = drawn(initializer)
    assert values.std().item() == pytest.approx(std, rel=0.01)
    assert values.mean().item() == pytest.approx(0.0, abs=std / 100)
    if reach is None:
        assert values.abs().max() > 3.5 * std
    else:
        assert 0.99 * reach < values.abs().max() <= reach * (1 + 1e-6)


def test_the_mean_of_a_normal() -> None:
    assert drawn(Normal(std=0.1, mean=3.0)).mean().item() == pytest.approx(3.0, abs=0.001)


@pytest.mark.parametrize(("initializer", "value"), [(Constant(value=0.7), 0.7), (Ones(), 1.0), (Zeros(), 0.0)])
def test_constants(initializer: Initializer, value: float) -> None:
    assert (drawn(initializer, 3, 4) == value).all()


@pytest.mark.parametrize(("rows", "columns"), [(20, 50), (50, 20)])
def test_orthogonal(rows: int, columns: int) -> None:
    values = drawn(Orthogonal(gain=3.0), rows, columns)
    product = values @ values.T if rows < columns else values.T @ values
    torch.testing.assert_close(product, 9 * torch.eye(20), rtol=1e-4, atol=1e-4)


@pytest.mark.case(30)
@pytest.mark.parametrize("inner", [Normal(std=1.0), FanInUniform()])
def test_the_row_of_the_padding_token_is_zero(inner: Initializer) -> None:
    values = drawn(ZeroRow(initializer=inner, row=2), 6, 50)
    assert not values[2].any()
    assert values[[0, 1, 3, 4, 5]].all(-1).all()
    assert torch.equal(drawn(ZeroRow(initializer=inner, row=None)), drawn(inner))


def test_the_padding_row_of_a_checkpoint_stays() -> None:
    """transformers marks what it has loaded, and asks all the same for the module to be initialised."""
    weight = nn.Parameter(torch.ones(4, 3))
    weight._is_hf_initialized = True
    for initializer in (ZeroRow(initializer=Normal(std=1.0), row=2), Orthogonal(), FanInUniform(), Constant(value=3.0)):
        initializer.fill(weight)
    assert (weight == 1).all()


@pytest.mark.parametrize(
    "initializer",
    [
        FanInNormal(),
        FanInUniform(),
        XavierNormal(),
        XavierUniform(),
        Orthogonal(),
        Uniform(bound=1.0),
        ZeroRow(initializer=Normal(std=1.0), row=70),
    ],
)
def test_a_seed_and_nothing_else_says_what_is_drawn(initializer: Any) -> None:
    torch.manual_seed(1)
    one = drawn(initializer, 100, 1000)
    torch.manual_seed(2)
    assert torch.equal(one, drawn(initializer, 100, 1000))
    assert not torch.equal(one, drawn(initializer, 100, 1000, seed=1))
    half = nn.Linear(1000, 100, bias=False, dtype=torch.bfloat16)
    initialize(half, {"weight": initializer}, 0)
    assert torch.equal(half.weight, one.bfloat16()), "a model in bfloat16 holds the same values, rounded"


def test_matrices_only() -> None:
    for initializer in (FanInNormal(), FanInUniform()):
        with pytest.raises(ValueError, match=r"for matrices, not for a shape of \[7\]"):
            initializer.fill(torch.empty(7))
    with pytest.raises(ValueError, match="Keep leaves the padding row"):
        ZeroRow(initializer=Keep(), row=1)
