"""What is sent of a fragment's values while they may change."""

import pytest
import torch

from forgather.diloco.combine import Change
from forgather.diloco.fragment_values import ChangedError, FragmentValues
from forgather.diloco.messages import Slice, Version, WantValues

START = Version(0, "start")
ALL = [Slice("w", (0, 0), (1000, 1000))]


def fragment(download: str) -> FragmentValues:
    return FragmentValues({"w": torch.zeros(1000, 1000)}, START, download)


def advanced(values: FragmentValues) -> FragmentValues:
    """A version later, with a change that leads to it."""
    values.begin()
    assert isinstance(values.change, Change)
    values.change.codec.encode(torch.ones(1_000_000), values.change.of("w"), None)
    values.move_begins()
    values.move()
    values.moved(Version(1, "next"), START)
    return values


def test_a_body_is_as_long_as_it_was_said_to_be() -> None:
    values = advanced(fragment("bf16"))
    cut = [Slice("w", (10, 0), (30, 1000)), Slice("w", (100, 3), (700, 99))]
    for slices in (ALL, cut):
        for have in (None, START):
            answer = values.answer(WantValues(slices, 0, have))
            assert sum(map(len, answer.blocks())) == answer.num_bytes


@pytest.mark.parametrize("have", [None, START], ids=["values", "change"])
@pytest.mark.parametrize("num_sent", [1, 3])
def test_an_answer_is_broken_off_when_other_values_take_the_place_of_what_it_sends(
    have: Version | None, num_sent: int
) -> None:
    values = advanced(fragment("bf16"))
    blocks = values.answer(WantValues(ALL, 0, have)).blocks()
    for _ in range(num_sent):
        next(blocks)
    values.move_begins()
    with pytest.raises(ChangedError):
        list(blocks)


def test_while_the_next_change_is_made_the_values_can_be_sent_and_the_change_not() -> None:
    values = advanced(fragment("bf16"))
    change = values.answer(WantValues(ALL, 0, START)).blocks()
    whole = values.answer(WantValues(ALL, 0, None)).blocks()
    next(change)
    next(whole)
    values.begin()
    assert sum(map(len, whole)) > 2_000_000
    with pytest.raises(ChangedError):
        list(change)
    assert values.answer(WantValues(ALL, 0, START)).ranges is None


def test_digests_are_of_the_values_as_they_are() -> None:
    values = fragment("bf16")
    before = values.digest(ALL[0])
    assert values.digest(ALL[0]) == before
    assert advanced(values).digest(ALL[0]) != before
