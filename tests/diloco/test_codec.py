"""Codecs lose nothing that they do not give back, cut where blocks begin, and decode to the same bits everywhere."""

import math
import threading

import pytest
import torch

from forgather.diloco.codec import CODEC_NAMES, codec
from forgather.diloco.encoding import BLOCK, Codec
from forgather.errors import ConfigError

BLOCKWISE = ("int8", "int4")
SIZES = (0, 1, 2, 63, 64, 65, 127, 128, 129, 1000, 512 * BLOCK - 1, 512 * BLOCK + 1, 3 * 512 * BLOCK + 333)


def draw(numel: int, seed: int = 0, scale: float = 1e-3) -> torch.Tensor:
    """Values as differences have them: of unequal magnitude from block to block."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randn(-(-numel // BLOCK), BLOCK, generator=generator)
    return (blocks * torch.rand(len(blocks), 1, generator=generator) * scale).view(-1)[:numel].clone()


def encode(of: Codec, values: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
    encoded = torch.full((of.encoded_bytes(values.numel()),), 0xA5, dtype=torch.uint8)  # what nobody wrote shows
    of.encode(values, encoded, residual)
    return encoded


def decode(of: Codec, encoded: torch.Tensor, numel: int, start: int = 0, stop: int | None = None) -> torch.Tensor:
    out = torch.full(((numel if stop is None else stop) - start,), torch.nan)
    of.decode(encoded, numel, out, start)
    return out


@pytest.mark.parametrize("name", CODEC_NAMES)
@pytest.mark.parametrize("numel", SIZES)
def test_what_decodes_and_what_is_left_are_what_was_given(name, numel):
    of, values, before = codec(name), draw(numel), draw(numel, seed=1)
    kept, residual = values.clone(), before.clone()
    encoded = encode(of, values, residual)
    decoded = decode(of, encoded, numel)
    assert torch.equal(values, kept)
    torch.testing.assert_close(decoded + residual, values + before, rtol=0, atol=1e-8)
    assert torch.equal(decoded.double() + residual.double(), (values + before).double()), "exactly"
    assert torch.equal(encode(of, values + before), encoded), "the residual is added, no more"
    if name == "fp32":
        assert torch.equal(decoded, values + before)
        assert not residual.any()


@pytest.mark.parametrize("name", CODEC_NAMES)
@pytest.mark.parametrize("numel", SIZES)
def test_a_difference_in_parts_is_encoded_as_the_whole_of_it(name, numel):
    of, values, minus = codec(name), draw(numel), draw(numel, seed=1)
    residual, in_parts = draw(numel, seed=2), draw(numel, seed=2)
    expected = encode(of, values - minus, residual)
    found = torch.full_like(expected, 0xA5)
    cut = numel // 2 // BLOCK * BLOCK
    for start, stop in ((cut, numel), (0, cut)):
        part = slice(start, stop)
        of.encode_part(values[part], found, numel, start, in_parts[part], minus=minus[part])
    assert torch.equal(found, expected)
    assert torch.equal(in_parts, residual)
    of.encode(values, found, minus=minus)
    assert torch.equal(found, encode(of, values - minus))


@pytest.mark.parametrize("name", CODEC_NAMES)
def test_sizes_are_multiples_of_eight_and_as_small_as_they_say(name):
    of = codec(name)
    assert all(of.encoded_bytes(numel) % 8 == 0 for numel in range(1000))
    a_million = {"fp32": 4_000_000, "bf16": 2_000_000, "int8": 1_031_256, "int4": 531_288}  # 7813 blocks
    assert of.encoded_bytes(1_000_000) == a_million[name]
    assert of.encoded_bytes(0) == 0


@pytest.mark.parametrize(("name", "largest"), [("int8", 127), ("int4", 7)])
def test_the_error_is_at_most_half_a_step_of_the_block(name, largest):
    values = draw(1000)
    decoded = decode(codec(name), encode(codec(name), values), 1000)
    for block, after in zip(values.split(BLOCK), decoded.split(BLOCK), strict=True):
        step = block.abs().max() / largest
        assert (block - after).abs().max() <= step * 0.5001
        assert (block - after).abs().max() > step * 0.3, "no finer than it can be: the test's own check"


def test_the_bytes_of_int8_and_int4_by_hand():
    values = torch.zeros(130)
    values[0], values[1], values[64], values[127] = 7.0, -3.0, 2.0, -7.0  # a scale of 1 in int4
    values[129] = 0.5
    encoded = encode(codec("int4"), values)
    assert encoded.numel() == 80  # two scales, 64 bytes, 2 bytes, filled up from 74
    assert encoded[:8].view(torch.float32).tolist() == pytest.approx([1.0, 0.5 / 7])
    elements = encoded[8:].tolist()
    assert elements[:2] == [(7 + 8) | (2 + 8) << 4, (-3 + 8) | 8 << 4]
    assert elements[2:63] == [8 | 8 << 4] * 61
    assert elements[63] == 8 | (-7 + 8) << 4
    assert elements[64:66] == [8 | 8 << 4, (7 + 8) | 8 << 4]
    assert elements[66:] == [0] * 6
    encoded = encode(codec("int8"), values[:3] * 127 / 7)
    assert encoded.view(torch.int8).tolist() == [0, 0, -128, 63, 127, -54, 0, 0]  # a scale of 1.0 in front


@pytest.mark.parametrize("name", CODEC_NAMES)
@pytest.mark.parametrize("numel", [1, 100, 200, 1000, 2 * 512 * BLOCK + 77])
def test_any_part_decodes_to_the_same_bits_as_in_the_whole(name, numel):
    of = codec(name)
    encoded = encode(of, draw(numel))
    whole = decode(of, encoded, numel)
    points = sorted({0, 1, 63, 64, 100, 127, 128, 129, 256, 300, 512 * BLOCK, 512 * BLOCK + 5, numel - 1, numel})
    points = [point for point in points if point <= numel]
    for start in points:
        for stop in points:
            if start <= stop:
                assert torch.equal(decode(of, encoded, numel, start, stop), whole[start:stop]), (start, stop)


@pytest.mark.parametrize("name", CODEC_NAMES)
@pytest.mark.parametrize("numel", [1, 127, 128, 300, 1000])
def test_a_cut_is_the_encoding_of_the_part(name, numel):
    of, values = codec(name), draw(numel)
    encoded = encode(of, values)
    for start in range(0, numel + 1, BLOCK):
        for stop in sorted({*range(start, numel + 1, BLOCK), numel}):
            out = torch.full((of.encoded_bytes(stop - start),), 0xA5, dtype=torch.uint8)
            of.cut(encoded, numel, start, stop, out)
            assert torch.equal(out, encode(of, values[start:stop])), (start, stop)


@pytest.mark.parametrize("name", CODEC_NAMES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("at", [5, 133, 270])
def test_what_is_no_number_stays_none_and_leaves_the_residual_sound(name, bad, at):
    of, values, residual = codec(name), draw(300), torch.full((300,), 1e-5)
    values[at] = bad
    decoded = decode(of, encode(of, values, residual), 300)
    assert not decoded[at].isfinite()
    block = slice(at // BLOCK * BLOCK, at // BLOCK * BLOCK + BLOCK)
    assert residual.isfinite().all()
    assert residual[at] == 0
    others = torch.ones(300, dtype=torch.bool)
    others[block] = False
    assert decoded[others].isfinite().all()
    expected = torch.full((300,), 1e-5)
    expected[others] += values[others]
    assert torch.equal((decoded.double() + residual.double())[others], expected.double()[others])


@pytest.mark.parametrize("name", BLOCKWISE)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 3e38])  # the last is too large to be scaled back
def test_a_block_of_no_numbers_has_the_same_bytes_on_every_processor(name, bad):
    values, residual = draw(BLOCK), torch.zeros(BLOCK)
    values[3], values[4] = bad, bad / 2
    encoded = encode(codec(name), values, residual)
    assert encoded[:4].view(torch.int32).item() == 0x7FC00000, "the one NaN"
    zeros = {"int8": 0, "int4": 8 | 8 << 4}[name]
    assert (encoded[4 : 4 + codec(name).encoded_bytes(BLOCK) - 8] == zeros).all()
    assert decode(codec(name), encoded, BLOCK).isnan().all()
    assert not residual.any()


@pytest.mark.parametrize("name", CODEC_NAMES)
@pytest.mark.parametrize("magnitude", [0.0, 1e-45, 1e-40, 1.2e-38, 1e-36, 1e30, 1e38])
def test_very_small_and_very_large_numbers(name, magnitude):
    of, values = codec(name), torch.linspace(-1, 1, 200) * magnitude
    residual = torch.zeros(200)
    encoded = encode(of, values, residual)
    decoded = decode(of, encoded, 200)
    assert decoded.isfinite().all()
    assert torch.equal(decoded.double() + residual.double(), values.double())
    if name in BLOCKWISE:
        scales = encoded[:8].view(torch.float32)
        assert (scales >= torch.finfo(torch.float32).tiny).all(), "no subnormal scale"


@pytest.mark.parametrize("name", CODEC_NAMES)
def test_over_many_rounds_all_that_was_given_arrives(name):
    of, numel, rounds = codec(name), 700, 200
    residual, arrived, given = torch.zeros(numel), torch.zeros(numel).double(), torch.zeros(numel).double()
    without = torch.zeros(numel).double()
    for number in range(rounds):
        values = draw(numel, seed=number % 3) + 1e-5  # a drift far below a step of int4
        given += values.double()
        arrived += decode(of, encode(of, values, residual), numel).double()
        without += decode(of, encode(of, values), numel).double()
    error, error_without = (given - arrived).abs().max(), (given - without).abs().max()
    one_step = draw(numel).abs().max() / 7
    assert error <= one_step, "no more is missing after 200 rounds than one encoding loses"
    if name == "int4":
        assert error_without > 10 * one_step, "which is not so without the residual"


def test_threads_do_not_share_temporaries():
    of, numel = codec("int4"), 20 * BLOCK
    inputs = [draw(numel, seed=seed) for seed in range(4)]
    expected = [encode(of, values) for values in inputs]
    wrong = []

    def work(index: int) -> None:
        for _ in range(200):
            encoded = encode(of, inputs[index])
            decoded = decode(of, encoded, numel)
            if not torch.equal(encoded, expected[index]) or not torch.equal(encode(of, decoded), encoded):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_autograd_and_inference_mode_do_not_matter():
    results = []

    def in_inference_mode() -> None:  # in a thread of its own, whose temporaries are made there
        with torch.inference_mode():
            encode(codec("int4"), draw(BLOCK))
        parameter = torch.nn.Parameter(draw(BLOCK))
        results.append(decode(codec("int4"), encode(codec("int4"), parameter, torch.zeros(BLOCK)), BLOCK))

    thread = threading.Thread(target=in_inference_mode)
    thread.start()
    thread.join()
    assert torch.equal(results[0], decode(codec("int4"), encode(codec("int4"), draw(BLOCK)), BLOCK))
    assert not results[0].requires_grad


@pytest.mark.parametrize(("asked", "near"), [("int6", "int"), ("fp33", "fp32"), ("bfloat16", "bf16"), ("zip", "bf16")])
def test_another_name_is_refused_with_the_nearest(asked, near):
    with pytest.raises(ConfigError, match=asked) as caught:
        codec(asked)
    assert caught.value.fix is not None
    assert near in caught.value.fix


def test_what_does_not_fit_is_not_begun():
    of = codec("int8")
    with pytest.raises(AssertionError, match="bytes are given"):
        of.encode(torch.zeros(300), torch.zeros(8, dtype=torch.uint8))
    with pytest.raises(AssertionError, match="in the run"):
        of.decode(encode(of, torch.zeros(300)), 300, torch.zeros(200), start=101)
    with pytest.raises(AssertionError, match="begins with a block"):
        of.cut(encode(of, torch.zeros(300)), 300, 64, 300, torch.zeros(of.encoded_bytes(236), dtype=torch.uint8))
    with pytest.raises(AssertionError, match="ends with a block"):
        of.cut(encode(of, torch.zeros(300)), 300, 0, 64, torch.zeros(of.encoded_bytes(64), dtype=torch.uint8))
    with pytest.raises(AssertionError, match="one row of fp32"):
        of.encode(torch.zeros(300, dtype=torch.float64), encode(of, torch.zeros(300)))


@pytest.mark.parametrize("name", ["fp32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("numel", [0, 1, 130, 300_000, 1_000_000])
def test_squared_norm_is_that_of_what_decodes(name: str, numel: int) -> None:
    encoder = codec(name)
    values = 1e-3 * torch.randn(numel, generator=torch.Generator().manual_seed(numel))
    encoded = torch.empty(encoder.encoded_bytes(numel), dtype=torch.uint8)
    encoder.encode(values, encoded)
    decoded = torch.empty(numel)
    encoder.decode(encoded, numel, decoded)
    expected = float(decoded.double().square().sum())
    assert encoder.squared_norm(encoded, numel) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("name", ["fp32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("where", [0, 299_999])
@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_squared_norm_is_not_finite_where_one_element_is_not(name: str, where: int, broken: float) -> None:
    encoder, numel = codec(name), 300_000
    values = torch.full((numel,), 1e-3)
    values[where] = broken
    encoded = torch.empty(encoder.encoded_bytes(numel), dtype=torch.uint8)
    encoder.encode(values, encoded)
    assert not math.isfinite(encoder.squared_norm(encoded, numel))
