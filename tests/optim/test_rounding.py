"""Stochastic rounding is unbiased, leaves alone what needs none, and draws for an element what its place says."""

import pytest
import torch

from forgather.optim.rounding import Rounding, random_bits, random_bits_of_range, stochastic_round

WHOLE = torch.Size((6, 10))


def rounded(values: torch.Tensor, key: int) -> torch.Tensor:
    return stochastic_round(values, random_bits(key, torch.arange(values.numel()).view_as(values)))


@pytest.mark.training_case(83)
def test_what_bf16_can_represent_stays():
    exact = torch.randn(1000).bfloat16().float()
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 1.0, -2.0, 3.3895313892515355e38])
    for values in (exact, special):
        for key in range(20):
            assert torch.equal(rounded(values, key).float(), values)
    assert rounded(torch.full((3,), float("nan")), 1).isnan().all()


@pytest.mark.training_case(83)
def test_the_result_is_bf16_of_the_same_shape_and_one_of_the_two_neighbours():
    values = torch.randn(30, 40)
    result = rounded(values, 7)
    assert result.dtype == torch.bfloat16
    assert result.shape == values.shape
    down = (values.view(torch.int32) & ~0xFFFF).view(torch.float32)
    up = ((values.view(torch.int32) & ~0xFFFF) + 0x10000).view(torch.float32)
    assert ((result.float() == down) | (result.float() == up)).all()
    assert (result.float() == down).any()
    assert (result.float() == up).any()


@pytest.mark.training_case(83)
def test_the_same_key_gives_the_same_and_another_key_something_else():
    values = torch.randn(1000)
    assert torch.equal(rounded(values, 5), rounded(values, 5))
    assert not torch.equal(rounded(values, 5), rounded(values, 6))
    assert not torch.equal(rounded(values, 5), rounded(values, 5 + (1 << 40)))


@pytest.mark.training_case(83)
@pytest.mark.parametrize("fraction", [0.01, 0.25, 0.5, 0.9])
def test_the_mean_over_many_elements_and_over_many_keys_is_the_value(fraction):
    value = 1.0 + fraction / 128  # neighbours are 1 and 1 + 1/128
    many = rounded(torch.full((200_000,), value), 3).float()
    deviation = (fraction * (1 - fraction) / 200_000) ** 0.5
    assert (many.mean().item() - 1) * 128 == pytest.approx(fraction, abs=4 * deviation)
    here = torch.stack([rounded(torch.tensor([-value]), key)[0].float() for key in range(4000)])
    deviation = (fraction * (1 - fraction) / 4000) ** 0.5
    assert -(here.mean().item() + 1) * 128 == pytest.approx(fraction, abs=4 * deviation)


def test_bits_are_even_and_neighbours_unrelated():
    bits = random_bits(99, torch.arange(1 << 18))
    assert (bits.min().item(), bits.max().item()) == (0, 65535)
    counts = torch.bincount(bits >> 8, minlength=256).double()
    expected = bits.numel() / 256
    assert (((counts - expected) ** 2 / expected).sum() / 255).item() == pytest.approx(1, abs=0.5)  # chi squared
    centred = bits.double() - bits.double().mean()
    for distance in (1, 2, 16, 256):
        related = (centred[:-distance] * centred[distance:]).mean() / centred.square().mean()
        assert abs(related.item()) < 4 / bits.numel() ** 0.5


@pytest.mark.parametrize(("start", "count"), [(0, 8), (3, 8), (5, 1), (2**33 + 1, 6)])
def test_a_range_has_the_bits_of_its_places(start, count):
    places = torch.arange(start, start + count)
    assert torch.equal(random_bits_of_range(7, start, count, places.device), random_bits(7, places))


@pytest.mark.parametrize("box", [((2, 0), (3, 10)), ((0, 4), (6, 3)), ((1, 3), (4, 6))])
def test_a_part_is_rounded_as_it_is_in_the_whole(box):
    values = torch.randn(WHOLE)
    whole = torch.empty(WHOLE, dtype=torch.bfloat16)
    Rounding(1, "w", 4, ((0, 0), tuple(WHOLE)), WHOLE).write(whole.view(-1), values.view(-1), 0)
    (row, column), (rows, columns) = box
    mine = (slice(row, row + rows), slice(column, column + columns))
    part = torch.empty(rows * columns, dtype=torch.bfloat16)
    rounding = Rounding(1, "w", 4, box, WHOLE)
    for start in range(0, rows * columns, 7):  # in pieces
        piece = slice(start, start + 7)
        rounding.write(part[piece], values[mine].reshape(-1)[piece], start)
    assert torch.equal(part.view(rows, columns), whole[mine])


@pytest.mark.parametrize("other", [(2, "w", 4), (1, "v", 4), (1, "w", 5)])
def test_seed_name_and_step_each_change_what_is_drawn(other):
    values = torch.randn(WHOLE).view(-1)
    results = []
    for seed, name, step in ((1, "w", 4), other):
        target = torch.empty(60, dtype=torch.bfloat16)
        Rounding(seed, name, step, ((0, 0), tuple(WHOLE)), WHOLE).write(target, values, 0)
        results.append(target)
    assert not torch.equal(*results)


def test_without_a_seed_and_in_other_dtypes_values_are_rounded_to_nearest():
    values = torch.randn(60)
    for seed, dtype in ((None, torch.bfloat16), (1, torch.float16), (1, torch.float32)):
        target = torch.empty(60, dtype=dtype)
        Rounding(seed, "w", 1, ((0, 0), tuple(WHOLE)), WHOLE).write(target, values, 0)
        assert torch.equal(target, values.to(dtype))
