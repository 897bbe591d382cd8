"""What is sent of a fragment's values while they may change."""

from contextlib import suppress

import pytest
import torch

from forgather.diloco.combine import Change
from forgather.diloco.downloads import FIRST_S, LONGEST_S, ChangedError, Downloads
from forgather.diloco.first_values import spool_budget
from forgather.diloco.fragment_values import LONGEST_STEP_S, FragmentValues
from forgather.diloco.messages import Slice, Version, WantValues
from forgather.diloco.outer import DelayedNesterov, Nesterov, TorchOuter

START = Version(0, "start")
ALL = [Slice("w", (0, 0), (1000, 1000))]


def fragment(download: str) -> FragmentValues:
    return FragmentValues({"w": torch.zeros(1000, 1000)}, START, download)


def advanced(values: FragmentValues) -> FragmentValues:
    """A version later, with a change that leads to it."""
    values.begin()
    assert isinstance(values.change, Change)
    values.change.put("w", torch.ones(1000, 1000), torch.zeros(1000, 1000))
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
            assert sum(map(len, filter(None, answer.blocks()))) == answer.num_bytes


@pytest.mark.parametrize("have", [None, START], ids=["values", "change"])
@pytest.mark.parametrize("num_sent", [1, 3])
def test_an_answer_is_broken_off_when_other_values_take_the_place_of_what_it_sends(
    have: Version | None, num_sent: int
) -> None:
    values = advanced(fragment("bf16"))
    blocks = values.answer(WantValues(ALL, 0, have)).blocks()
    for _ in range(num_sent):
        next(blocks)
    values.begin()
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
    assert sum(map(len, filter(None, whole))) > 2_000_000
    with pytest.raises(ChangedError):
        list(change)
    assert values.answer(WantValues(ALL, 0, START)).ranges is None


def test_a_change_can_be_sent_while_it_is_made_and_the_published_values_are_the_old_ones() -> None:
    values = advanced(fragment("bf16"))
    before, second = values.version, Version(2, "second")
    values.step_s = 1.0
    values.begin()
    want = WantValues(ALL, 2, before)
    assert not values.can_answer(want)
    assert values.change is not None
    values.is_certain(second)
    assert values.can_answer(want)
    early = values.answer(want)
    blocks = early.blocks()
    assert next(blocks) == early.head
    assert next(blocks) is None
    assert not early.has_more()
    values.change.put("w", torch.ones(1000, 1000), torch.zeros(1000, 1000))
    assert early.has_more()
    assert len(early.head) + sum(len(block) for block in blocks if block is not None) == early.num_bytes
    values.move_begins()
    assert not values.can_answer(WantValues(ALL, 2, before, counted=1))  # who has counted is known when it is published
    for have in (None, START):
        assert not values.can_answer(WantValues(ALL, 1, have))
    answer = values.answer(want)
    assert (answer.version, answer.ranges is None) == (second, False)
    values.move()
    values.moved(second, before)
    assert sum(map(len, filter(None, answer.blocks()))) == answer.num_bytes
    assert values.can_answer(WantValues(ALL, 2, None))
    values.begin()
    assert not answer.is_current


def test_digests_are_of_the_values_as_they_are() -> None:
    values = fragment("bf16")
    known = values.digests
    before = values.digest(ALL[0], known)
    assert values.digest(ALL[0], known) == before
    advanced(values)
    assert values.digest(ALL[0], values.digests) != before
    # Whoever was still at the values before notes what it has found where nobody looks for that of these.
    known.clear()
    values.digest(ALL[0], known)
    assert values.digests is not known


def test_a_version_that_takes_long_to_make_is_sent_when_it_is_there() -> None:
    """A worker whose answer has begun would take the silence for a server that has gone."""
    values = advanced(fragment("bf16"))
    values.step_s = LONGEST_STEP_S + 1
    values.begin()
    values.is_certain(Version(2, "second"))
    assert not values.can_answer(WantValues(ALL, 2, Version(1, "next")))


@pytest.mark.parametrize("download", ["bf16", "int8", "int4"])
def test_a_part_of_a_change_is_sent_as_views_and_is_what_the_codec_cuts_out(download: str) -> None:
    values = advanced(fragment(download))
    assert values.change is not None
    cut = Slice("w", (10, 0), (900, 1000))
    answer = values.answer(WantValues([cut], 0, START))
    assert answer.ranges is not None
    blocks = [block for block in answer.blocks() if block is not None]
    body = b"".join(blocks)[len(answer.head) :]
    encoder, ((start, stop),) = values.change.codec, answer.ranges[0]
    expected = torch.empty(encoder.encoded_bytes(stop - start), dtype=torch.uint8)
    encoder.cut(values.change.of("w"), 1_000_000, start, stop, expected)
    assert body == bytes(expected.numpy())
    first = values.change.data.data_ptr()
    views = [block for block in blocks if isinstance(block, memoryview)]
    for view in views:
        assert first <= torch.frombuffer(view, dtype=torch.uint8).data_ptr() < first + values.change.data.nbytes
    assert len(body) - sum(map(len, views)) < 300_000  # what is left over of each piece is small


class TestDownloads:
    """What a new version waits for."""

    def broken(self, downloads: Downloads, worker: str, times: int, slices: list[Slice] = ALL) -> None:
        for _ in range(times):
            with pytest.raises(ChangedError), downloads.sending(worker, slices):
                raise ChangedError

    def test_one_that_was_broken_off_is_waited_for_the_next_time_and_longer_each_time(self) -> None:
        downloads = Downloads()
        with downloads.sending("a", ALL):
            assert downloads.waited_for() == {}
        for times in range(1, 4):
            self.broken(downloads, "a", 1)
            assert downloads.waited_for() == {}  # it has not come again
            with suppress(ConnectionError), downloads.sending("a", ALL):
                assert downloads.waited_for() == {"a": FIRST_S * 2 ** (times - 1)}
                raise ConnectionError
        self.broken(downloads, "a", 100)
        with downloads.sending("a", ALL):
            assert downloads.waited_for() == {"a": LONGEST_S}
        with downloads.sending("a", ALL):
            assert downloads.waited_for() == {}  # it has had one

    def test_each_rank_of_a_worker_has_its_own(self) -> None:
        downloads = Downloads()
        others = [Slice("w", (0, 0), (1, 1000))]
        self.broken(downloads, "a", 1)
        with downloads.sending("a", others):
            assert downloads.waited_for() == {}
        with downloads.sending("a", ALL):
            assert downloads.waited_for() == {"a": FIRST_S}


def test_memory_for_contributions_is_what_the_outer_optimizers_state_leaves() -> None:
    values = [FragmentValues({"w": torch.zeros(40 << 20)}, START, "fp32")]  # 160 MiB
    largest, model = 160 << 20, 160 << 20
    assert spool_budget(values, 0) == 2 * model - largest
    assert spool_budget(values, 1) == spool_budget(values, 2) == 64 << 20
    assert [Nesterov().num_states, Nesterov(momentum=0.0).num_states, DelayedNesterov().num_states] == [1, 0, 2]
    assert [TorchOuter("AdamW", lr=0.1).num_states, TorchOuter("SGD", lr=0.1).num_states] == [2, 0]
