"""Contributions become a mean, a step, and a change to send: on numbers worked out by hand, and bit for bit."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from forgather.checkpoint.storage import raw_bytes
from forgather.diloco.codec import codec
from forgather.diloco.combine import Change, Guard, Share, combine, lineage, shares
from forgather.diloco.contribution import (
    Examination,
    Held,
    Part,
    Plan,
    plan_payload,
    require_slices,
    require_whole,
)
from forgather.diloco.frame import ProtocolError
from forgather.diloco.messages import Contribution, Identity, Slice, Version
from forgather.diloco.outer import Nesterov, TorchOuter
from forgather.diloco.pieces import box_of, pieces
from forgather.errors import ConfigError

SHAPES = {"w": (6, 10), "b": (7,), "s": ()}


def values(seed: int, shapes: Mapping[str, Sequence[int]] = SHAPES) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def whole(shapes: Mapping[str, Sequence[int]] = SHAPES) -> list[Slice]:
    return [Slice(name, (0,) * len(shape), tuple(shape)) for name, shape in shapes.items()]


class Room:
    """Bytes that are there already."""

    def __init__(self, data: Tensor) -> None:
        self.data = data
        self.num_bytes = self.num_readable = len(data)
        self.is_released = False

    def view(self, start: int, length: int) -> Tensor:
        return self.data[start : start + length]

    def forget(self, start: int, length: int) -> None:
        pass

    def release(self) -> None:
        self.is_released = True


def part(tensors: Mapping[str, Tensor], slices: Sequence[Slice] | None = None, **header: Any) -> Part:
    slices = whole() if slices is None else slices
    said = Contribution(Version(0, ""), "differences", "fp32", slices)
    said = replace(said, **header)
    encoder = codec(said.codec)
    starts, runs, at = [], [], 0
    for each in slices:
        box = box_of(tensors[each.name], each).contiguous().view(-1)
        run = torch.empty(encoder.encoded_bytes(box.numel()), dtype=torch.uint8)
        encoder.encode(box, run, None)
        starts.append(at)
        runs.append(run)
        at += len(run)
    return Part(said, Plan(starts, at), Room(torch.cat(runs)))  # type: ignore[arg-type]


def held(name: str, *parts: Part, norm: float = 1.0) -> Held:
    made = Held(name, 0, 0, parts[0].header)
    for number, each in enumerate(parts):
        made.put(number, replace(each, squared_norm=norm**2 / len(parts)))
    return made


def outer_step(
    contributions: Sequence[Held],
    master: dict[str, Tensor],
    outer: Any = None,
    change: Change | None = None,
    **others: Any,
) -> dict[str, Tensor]:
    """The master values after a step, from published values that were the same."""
    published = {name: value.clone() for name, value in master.items()}
    taken = shares(contributions, Guard())
    combine(taken, master, published, outer or Nesterov(1.0, 0.0), change, **others)
    return master


def scalar(value: float) -> dict[str, Tensor]:
    return {"x": torch.tensor([value])}


X = [Slice("x", (0,), (1,))]


@pytest.mark.training_case(66)
def test_plain_steps_on_hand_computed_numbers() -> None:
    master = outer_step([held("a", part(scalar(0.5), X, content="values"))], scalar(1.0))
    assert master["x"].item() == 0.5
    two = [held("a", part(scalar(1.0), X)), held("b", part(scalar(3.0), X))]
    assert outer_step(two, scalar(0.0))["x"].item() == -2.0


@pytest.mark.training_case(67)
def test_three_steps_with_nesterov_momentum() -> None:
    outer, master = Nesterov(0.1, 0.9), scalar(0.0)
    for _ in range(3):
        outer_step([held("a", part(scalar(1.0), X))], master, outer)
    assert master["x"].item() == pytest.approx(-0.8049)


def test_a_mean_is_weighted_by_tokens() -> None:
    two = [held("a", part(scalar(1.0), X, tokens=3)), held("b", part(scalar(5.0), X, tokens=1))]
    assert outer_step(two, scalar(0.0))["x"].item() == -2.0


def test_the_values_of_one_worker_become_the_masters_bit_for_bit() -> None:
    local = values(1)
    local["w"][0, 0], local["b"][0] = -0.0, 1e-40
    master = outer_step([held("a", part(local, content="values"))], values(0))
    for name, value in local.items():
        assert bytes(raw_bytes(master[name])) == bytes(raw_bytes(value))


def test_values_and_differences_of_the_same_work_give_the_same_mean() -> None:
    base, one, two = values(0), values(1), values(2)
    as_values = [held("a", part(one, content="values")), held("b", part(two, content="values"))]
    differences = {name: base[name] - two[name] for name in base}
    mixed = [as_values[0], held("b", part(differences))]
    expected = outer_step(as_values, values(0))
    for name, value in outer_step(mixed, values(0)).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-6)
        torch.testing.assert_close(value, (one[name] + two[name]) / 2, rtol=0, atol=1e-6)


def test_any_cut_into_slices_gives_the_same_bits() -> None:
    """Rows, columns, and both; of tensors that are larger than a piece, too."""
    shapes = {"w": (1030, 520), "b": (7,)}
    difference = values(3, shapes)

    def cut(*boxes: tuple[int, int, int, int]) -> list[Slice]:
        return [Slice("w", (row, column), (rows, columns)) for row, column, rows, columns in boxes]

    rest = [Slice("b", (0,), (7,))]
    cuts = [
        [cut((0, 0, 1030, 520)) + rest],
        [cut((0, 0, 515, 520)), cut((515, 0, 515, 520)) + rest],
        [cut((0, 0, 1030, 100)) + rest, cut((0, 100, 1030, 420))],
        [cut((0, 0, 1, 1), (0, 1, 1, 519)), cut((1, 0, 1029, 260)), cut((1, 260, 1029, 260)) + rest],
    ]
    results = []
    for parts in cuts:
        contribution = held("a", *(part(difference, slices, parts=len(parts)) for slices in parts))
        require_whole(contribution.parts.values(), shapes)
        other = held("b", part(values(4, shapes), whole(shapes)))
        results.append(outer_step([contribution, other], values(0, shapes)))
    for result in results[1:]:
        for name in shapes:
            assert torch.equal(result[name], results[0][name])
    expected = values(0, shapes)["w"] - (difference["w"] + values(4, shapes)["w"]) / 2
    torch.testing.assert_close(results[0]["w"], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("download", ["bf16", "int8", "int4"])
def test_what_a_change_loses_is_in_the_next_ones(download: str) -> None:
    """After many changes the published values are as near to the master's as after one."""
    shapes = {"w": (40, 50)}
    change = Change(shapes, download)
    master = values(0, shapes)
    published = {"w": master["w"].clone()}
    worker = published["w"].clone()
    for round in range(30):
        difference = {"w": values(round + 1, shapes)["w"] * 0.01}
        combine([Share(held("a", part(difference, whole(shapes))), 1.0)], master, published, Nesterov(1.0, 0.0), change)
        before = published["w"].clone()
        change.apply(published)
        run = torch.empty(2000)
        change.codec.decode(change.of("w"), 2000, run)
        worker += run.view(40, 50)
        assert torch.equal(worker, published["w"])  # whoever decodes the same bytes has the same bits
        assert not torch.equal(before, published["w"])
    lost = float((master["w"] - published["w"]).abs().max())
    assert lost < {"bf16": 4e-4, "int8": 4e-4, "int4": 8e-3}[download]
    assert lost > 0


@pytest.mark.parametrize("content", ["values", "differences"])
def test_a_step_is_made_on_the_master_by_how_far_workers_came_from_what_was_published(content: str) -> None:
    """The master has moved a little further than what was published, and keeps that."""
    change = Change({"x": (1,)}, "bf16")
    master, published = scalar(10.25), scalar(10.0)
    sent = {"values": scalar(9.0), "differences": scalar(1.0)}[content]
    taken = shares([held("a", part(sent, X, content=content)), held("b", part(scalar(3.0), X))], Guard())
    combine(taken, master, published, Nesterov(1.0, 0.0), change)
    assert master["x"].item() == 10.25 - 2
    change.apply(published)
    assert published["x"].item() == 10.25 - 2


def test_any_optimizer_of_torch_takes_the_step() -> None:
    ours, theirs = values(0), values(0)
    difference = values(1)
    sgd = TorchOuter("torch.optim.SGD", lr=0.7, momentum=0.9, nesterov=True)
    nesterov = Nesterov(0.7, 0.9)
    for _ in range(3):
        outer_step([held("a", part(difference))], ours, nesterov)
        outer_step([held("a", part(difference))], theirs, sgd)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-5)


def test_a_stale_contribution_moves_less() -> None:
    master = outer_step([held("a", part(scalar(1.0), X))], scalar(0.0), damping=0.5)
    assert master["x"].item() == -0.5


class TestGuard:
    def contributions(self) -> list[Held]:
        return [
            held(name, part(scalar(norm), X), norm=norm)
            for name, norm in zip("abcd", (1.0, 1.2, 0.8, 40.0), strict=True)
        ]

    def test_without_it_all_count_as_they_are(self) -> None:
        assert [share.scale for share in shares(self.contributions(), Guard())] == [1.0] * 4

    def test_an_outlier_is_cut_down_to_a_multiple_of_the_median(self) -> None:
        taken = shares(self.contributions(), Guard("clip", factor=2.0))
        assert [share.scale for share in taken] == [1.0, 1.0, 1.0, pytest.approx(2 * 1.1 / 40)]
        assert sum(share.weight for share in taken) == pytest.approx(1)
        master = scalar(0.0)
        combine(taken, master, scalar(0.0), Nesterov(1.0, 0.0), None)
        assert master["x"].item() == pytest.approx(-(1.0 + 1.2 + 0.8 + 2.2) / 4)

    def test_or_left_out(self) -> None:
        taken = shares(self.contributions(), Guard("refuse", factor=2.0))
        assert [share.held.worker for share in taken] == ["a", "b", "c"]
        assert [share.weight for share in taken] == [pytest.approx(1 / 3)] * 3

    def test_two_have_no_median_that_says_anything(self) -> None:
        assert len(shares(self.contributions()[2:], Guard("refuse"))) == 2

    def test_settings_that_mean_nothing_are_errors(self) -> None:
        for wrong in ({"kind": "maybe"}, {"kind": "clip", "factor": 0.5}, {"kind": "clip", "factor": float("nan")}):
            with pytest.raises(ConfigError):
                Guard(**wrong)  # type: ignore[arg-type]


def test_a_lineage_tells_contributions_apart() -> None:
    one, two = held("a", part(scalar(1.0), X)), held("b", part(scalar(1.0), X))
    names = {
        lineage("start", shares([one], Guard())),
        lineage("other", shares([one], Guard())),
        lineage("start", shares([two], Guard())),
        lineage("start", shares([one, two], Guard())),
        lineage("start", shares([held("a", replace(part(scalar(1.0), X), digest="another"))], Guard())),
        lineage("start", shares([one, held("b", part(scalar(1.0), X, tokens=2))], Guard())),
    }
    assert len(names) == 6
    assert lineage("start", shares([one, two], Guard())) == lineage("start", shares([one, two], Guard()))


def squared_norm(part: Part, published: Mapping[str, Tensor]) -> float:
    """That of a part which is all there."""
    examination = Examination(part, published)
    examination.go_on()
    return examination.squared_norm


class TestSound:
    """What a contribution must be."""

    @pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
    @pytest.mark.parametrize("content", ["values", "differences"])
    @pytest.mark.training_case(79)
    def test_numbers_that_are_not_finite_are_refused(self, number: float, content: str) -> None:
        tensors = values(1)
        tensors["b"][3] = number
        with pytest.raises(ProtocolError, match="b has numbers that are not finite") as refused:
            squared_norm(part(tensors, content=content), values(0))
        assert refused.value.status == 422

    def test_a_norm_is_that_of_the_differences_also_where_its_square_overflows(self) -> None:
        base, local = values(0), values(1)
        difference = {name: base[name] - local[name] for name in base}
        expected = sum(float(each.double().square().sum()) for each in difference.values())
        assert squared_norm(part(difference), base) == pytest.approx(expected)
        assert squared_norm(part(local, content="values"), base) == pytest.approx(expected, rel=1e-5)
        assert squared_norm(part(scalar(1e30), X), scalar(0.0)) == pytest.approx(1e60)

    def test_what_has_come_is_looked_through_while_the_rest_still_comes(self) -> None:
        tensors = values(1)
        tensors["b"][2] = float("nan")
        mine = part(tensors)
        room: Any = mine.room
        examination = Examination(mine, values(0))
        room.num_readable = 239
        assert not examination.has_work
        room.num_readable = 240
        assert examination.has_work
        examination.go_on()
        assert examination.squared_norm == pytest.approx(float(tensors["w"].square().sum()))
        room.num_readable = 272
        with pytest.raises(ProtocolError, match="b has numbers"):
            examination.go_on()

    def test_parts_must_be_every_element_once(self) -> None:
        rows = [Slice("w", (0, 0), (3, 10)), Slice("w", (3, 0), (3, 10))]
        rest = whole()[1:]
        tensors = values(1)
        require_whole([part(tensors, [rows[0]]), part(tensors, [rows[1], *rest])], SHAPES)
        with pytest.raises(ProtocolError, match="30 elements of w, which has 60"):
            require_whole([part(tensors, [rows[0], *rest])], SHAPES)
        with pytest.raises(ProtocolError, match="come twice"):
            require_whole([part(tensors, [rows[0]]), part(tensors, [Slice("w", (2, 0), (3, 10)), *rest])], SHAPES)
        columns = [Slice("w", (0, 0), (6, 5)), Slice("w", (0, 4), (6, 5))]
        with pytest.raises(ProtocolError, match="come twice"):
            require_whole([part(tensors, [columns[0]]), part(tensors, [columns[1], *rest])], SHAPES)

    @pytest.mark.training_case(68)
    def test_a_header_must_fit_the_model(self) -> None:
        identity, good = Identity("a", 0, 0), part(values(1)).header
        assert plan_payload(identity, good, SHAPES, upload="fp32").num_bytes == 4 * 60 + 32 + 8
        for wrong, message in (
            (replace(good, slices=[Slice("v", (0,), (1,))]), "no parameter 'v'"),
            (replace(good, slices=[Slice("w", (0, 0), (7, 10))]), "no part of shape"),
            (replace(good, slices=[Slice("w", (0,), (6,))]), "no part of shape"),
            (replace(good, codec="bf16"), "the server wants fp32"),
            (replace(good, slices=[*whole(), *whole()]), "elements, of a fragment that has"),
            (replace(good, slices=[Slice("b", (0,), (0,))] * 65), "more than 64 slices of b"),
        ):
            with pytest.raises(ProtocolError, match=message):
                plan_payload(identity, wrong, SHAPES, upload="fp32")
        with pytest.raises(ProtocolError, match="no part 1 of 1"):
            plan_payload(Identity("a", 0, 0, 1), good, SHAPES, upload="fp32")
        with pytest.raises(ProtocolError, match="would lose"):
            plan_payload(identity, replace(good, codec="bf16", content="values"), SHAPES, upload="bf16")
        require_slices([], SHAPES)

    def test_a_part_that_comes_again_replaces_the_one_before_and_gives_its_room_back(self) -> None:
        contribution = held("a", part(values(1)))
        first = contribution.parts[0].room
        contribution.put(0, part(values(2)))
        assert first.is_released  # type: ignore[attr-defined]
        master = outer_step([contribution], {name: torch.zeros(shape) for name, shape in SHAPES.items()})
        assert torch.equal(master["w"], -values(2)["w"])


def test_pieces_are_views_of_all_elements_in_row_major_order() -> None:
    for box in (torch.arange(24.0).view(2, 3, 4), torch.arange(60.0).view(3, 4, 5)[:, 1:3, 1:], torch.tensor(3.0)):
        for most in (1, 3, 5, 100):
            seen = []
            for start, view in pieces(box, most):
                assert start == len(seen)
                assert view.numel() <= most
                seen += view.reshape(-1).tolist()
            assert seen == box.reshape(-1).tolist()
