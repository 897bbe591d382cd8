"""Outer optimizers move values as tables made by hand say, and go on after a save as if nothing had been."""

import copy
from collections.abc import Sequence

import pytest
import torch

from forgather.diloco import outer as outer_module
from forgather.diloco.outer import DelayedNesterov, Nesterov, Outer, TorchOuter, staleness_weight
from forgather.errors import CheckpointError, ConfigError


def follow(outer: Outer, start: float, gradients: Sequence[float]) -> list[float]:
    """The values after each of these gradients, master minus mean."""
    master = torch.tensor([start])
    values = []
    for gradient in gradients:
        outer.step("w", master, master - gradient)
        values.append(master.item())
    return values


@pytest.mark.parametrize(
    ("outer", "gradients", "values"),
    [
        # m 1, 1.5, 2.75; the value moves by 0.5 (g + 0.5 m): 0.75, 0.875, 1.6875
        (Nesterov(0.5, 0.5), [1, 1, 2], [0.25, -0.625, -2.3125]),
        # by 0.5 m: 0.5, 0.75, 1.375
        (Nesterov(0.5, 0.5, nesterov=False), [1, 1, 2], [0.5, -0.25, -1.625]),
        # averaging: the means themselves
        (Nesterov(1, 0), [0.5, 0.25, -3], [0.5, 0.25, 3.25]),
        (Nesterov(0.5, 0), [1, 1, 2], [0.5, 0.0, -1.0]),
        # by g / 4; after the second m = (1 + 3) / 2 and 0.5 * 0.5 * 2 more; after the third only g / 4
        (DelayedNesterov(0.5, 0.5, every=2), [1, 3, 2], [0.75, -0.5, -1.0]),
        (TorchOuter("torch.optim.SGD", lr=0.5, momentum=0.5, nesterov=True), [1, 1, 2], [0.25, -0.625, -2.3125]),
    ],
    ids=["nesterov", "momentum", "averaging", "half averaging", "delayed", "torch"],
)
def test_three_rounds_by_hand(outer, gradients, values):
    assert follow(outer, 1.0, gradients) == values


@pytest.mark.training_case(66)
def test_averaging_takes_the_mean_of_the_workers():
    master = torch.tensor([1.0])
    Nesterov(1.0, 0.0).step("w", master, torch.tensor([0.5]))
    assert master.item() == 0.5
    master = torch.tensor([0.0])
    Nesterov(1.0, 0.0).step("w", master, torch.tensor([-1.0, -3.0]).mean(0, keepdim=True))
    assert master.item() == -2.0


@pytest.mark.training_case(67)
def test_nesterov_goes_further_than_plain_descent():
    values = follow(Nesterov(0.1, 0.9), 0.0, [1, 1, 1])
    assert values == pytest.approx([-0.19, -0.461, -0.8049], abs=1e-6)
    assert values[-1] < -0.3


@pytest.mark.training_case(70)
def test_delayed_nesterov_moves_no_further_for_coming_in_parts():
    assert follow(DelayedNesterov(1.0, 0.9, every=3), 0.0, [1, 1, 1]) == pytest.approx([-1 / 3, -2 / 3, -1.9], abs=1e-6)


def test_delayed_nesterov_with_one_arrival_is_nesterov():
    gradients = torch.randn(20, generator=torch.Generator().manual_seed(0)).tolist()
    delayed, plain = (follow(each, 1.0, gradients) for each in (DelayedNesterov(0.7, 0.9, every=1), Nesterov(0.7, 0.9)))
    assert delayed == pytest.approx(plain, rel=1e-5, abs=1e-6)


def test_staleness_weights_by_hand():
    assert [staleness_weight(staleness) for staleness in (0, 3, 8, 15)] == pytest.approx([1.0, 0.5, 1 / 3, 0.25])
    with pytest.raises(AssertionError, match="still to come"):
        staleness_weight(-1)


def test_averaging_gives_the_mean_bit_for_bit():
    generator = torch.Generator().manual_seed(0)
    master, mean = (
        torch.randn(10_000, generator=generator) * 10 ** torch.arange(10_000).remainder(9) for _ in range(2)
    )
    mean[:3] = torch.tensor([-0.0, 1e-40, -1e-45])
    outer = Nesterov(1.0, 0.0)
    outer.step("w", master, mean.clone())
    assert torch.equal(master.view(torch.int32), mean.view(torch.int32))
    assert outer.state_tensors() == {}, "and no memory is taken"


@pytest.mark.parametrize("nesterov", [True, False])
def test_ours_is_torchs_sgd(nesterov):
    generator = torch.Generator().manual_seed(0)
    ours, theirs = Nesterov(0.7, 0.9, nesterov), TorchOuter("SGD", lr=0.7, momentum=0.9, nesterov=nesterov)
    masters = torch.randn(2, 50, generator=generator)
    masters[1] = masters[0]
    for _ in range(10):
        mean = masters[0] - torch.randn(50, generator=generator)
        ours.step("w", masters[0], mean.clone())
        theirs.step("w", masters[1], mean.clone())
    torch.testing.assert_close(masters[0], masters[1])


OUTERS = [
    lambda: Nesterov(),
    lambda: Nesterov(1.0, 0.0),
    lambda: DelayedNesterov(every=3),
    lambda: TorchOuter("torch.optim.AdamW", lr=0.1),
    lambda: TorchOuter(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True),
    lambda: TorchOuter("torch.optim.SGD", lr=1.0),
    lambda: TorchOuter("torch.optim.Adagrad", lr=0.1),
    lambda: TorchOuter("torch.optim.Rprop", lr=0.1),
]


@pytest.mark.parametrize("make", OUTERS, ids=[make().describe() for make in OUTERS])
def test_saved_and_loaded_it_goes_on_as_if_nothing_had_been(make):
    names = ["model.a", "b"]
    generator = torch.Generator().manual_seed(0)
    rounds = [{name: torch.randn(4, 5, generator=generator) for name in names} for _ in range(8)]

    def run(outer: Outer, masters: dict[str, torch.Tensor], means: Sequence[dict[str, torch.Tensor]]) -> None:
        for mean in means:
            for name, master in masters.items():
                outer.step(name, master, mean[name].clone())

    whole, masters = make(), {name: torch.ones(4, 5) for name in names}
    run(whole, masters, rounds)
    first, resumed, again = make(), make(), {name: torch.ones(4, 5) for name in names}
    run(first, again, rounds[:4])
    saved = copy.deepcopy(first.state_tensors())
    run(first, {name: torch.ones(4, 5) for name in names}, rounds[:2])  # what is saved is not what it goes on with
    resumed.load(saved)
    run(resumed, again, rounds[4:])
    assert all(torch.equal(again[name], masters[name]) for name in names)
    expected, found = whole.state_tensors(), resumed.state_tensors()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    assert whole.describe() == resumed.describe()


@pytest.mark.parametrize("make", [lambda: Nesterov(), lambda: Nesterov(0.7, 0.9, False), lambda: DelayedNesterov()])
def test_walking_in_pieces_changes_nothing(monkeypatch, make):
    generator = torch.Generator().manual_seed(0)
    master, mean = torch.randn(2, 7, 9, generator=generator)
    results = []
    for piece in (1 << 20, 10):
        monkeypatch.setattr(outer_module, "_PIECE", piece)
        outer, moved = make(), master.clone()
        for _ in range(3):
            outer.step("w", moved, mean.clone())
        results.append(moved)
    assert torch.equal(*results)
    assert not torch.equal(results[0], master)


@pytest.mark.parametrize("outer", [Nesterov(), DelayedNesterov(), TorchOuter("SGD", lr=0.7, momentum=0.9)])
def test_each_name_has_a_state_of_its_own_and_scalars_are_parameters_too(outer):
    one, other, scalar = torch.ones(3), torch.ones(3), torch.ones(())
    outer.step("one", one, torch.zeros(3))
    outer.step("one", one, torch.zeros(3))
    outer.step("other", other, torch.zeros(3))
    outer.step("scalar", scalar, torch.zeros(()))
    fresh = torch.ones(3)
    type_of_outer = {"DelayedNesterov": DelayedNesterov, "Nesterov": Nesterov}.get(type(outer).__name__)
    (type_of_outer() if type_of_outer else TorchOuter("SGD", lr=0.7, momentum=0.9)).step("w", fresh, torch.zeros(3))
    assert torch.equal(other, fresh)
    assert scalar == fresh[0]
    assert not torch.equal(one, other)


@pytest.mark.parametrize(
    ("spec", "arguments", "message"),
    [
        ("torch.optim.LBFGS", {"lr": 0.1}, "closure"),
        ("torch.optim.SparseAdam", {"lr": 0.1}, "dense gradients"),
        ("torch.optim.SGD", {"lr": 0.1, "momentun": 0.9}, "momentun"),
        ("torch.optim.SGD", {"lr": -1.0}, "learning rate"),
        ("torch.optim.Nadamm", {}, "no optimizer"),
        ("torch.nn.Linear", {}, "no optimizer"),
        ("no_such_module.SGD", {}, "cannot be imported"),
    ],
)
def test_what_cannot_be_an_outer_optimizer_is_refused_at_once(spec, arguments, message):
    with pytest.raises(ConfigError, match=message) as caught:
        TorchOuter(spec, **arguments)
    assert caught.value.fix is not None


def test_shapes_that_it_cannot_step_are_refused_before_the_first_round():
    shapes = {"matrix": (3, 3), "norm": (3,)}
    TorchOuter("torch.optim.Muon", lr=0.1).require_parameters({"matrix": (3, 3)})
    with pytest.raises(ConfigError, match=r"refuses norm of shape \[3\]"):
        TorchOuter("torch.optim.Muon", lr=0.1).require_parameters(shapes)
    for outer in (Nesterov(), DelayedNesterov(), TorchOuter("AdamW", lr=0.1)):
        outer.require_parameters(shapes)


@pytest.mark.parametrize(
    "make", [lambda: Nesterov(lr=0), lambda: Nesterov(lr=float("nan")), lambda: DelayedNesterov(lr=-1)]
)
def test_a_rate_that_moves_nowhere_is_refused(make):
    with pytest.raises(ConfigError, match="outer lr"):
        make()


@pytest.mark.parametrize("momentum", [-0.1, 1.0, float("nan")])
def test_a_momentum_that_never_ends_is_refused(momentum):
    with pytest.raises(ConfigError, match="outer momentum"):
        Nesterov(momentum=momentum)
    with pytest.raises(ConfigError, match="outer momentum"):
        DelayedNesterov(momentum=momentum)


def test_momentum_never_used_is_refused():
    with pytest.raises(ConfigError, match="every 0 arrivals"):
        DelayedNesterov(every=0)


def test_a_momentum_that_was_set_to_none_leaves_no_state_and_does_not_come_back():
    outer, master = Nesterov(1.0, 0.9), torch.ones(3)
    outer.step("w", master, torch.zeros(3))
    outer.momentum = 0.0
    Nesterov(1.0, 0.0).load(outer.state_tensors())
    outer.step("w", master, torch.zeros(3))
    outer.momentum = 0.9
    assert outer.state_tensors() == {}


def test_the_state_of_another_optimizer_is_refused():
    nesterov, delayed = Nesterov(), DelayedNesterov()
    for outer in (nesterov, delayed):
        outer.step("w", torch.ones(3), torch.zeros(3))
    with pytest.raises(CheckpointError, match=r"is no state of this outer optimizer \(SGD") as caught:
        Nesterov().load(delayed.state_tensors())
    assert caught.value.fix is not None
    with pytest.raises(CheckpointError, match="lacks"):
        DelayedNesterov().load(nesterov.state_tensors())
    with pytest.raises(CheckpointError, match="averaging"):
        Nesterov(1.0, 0.0).load(nesterov.state_tensors())
    with pytest.raises(CheckpointError, match="AdamW"):
        TorchOuter("AdamW", lr=0.1).load(nesterov.state_tensors())
