"""Our optimizers do in one process what torch's do, and on every mesh what they do in one process."""

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import nn

from forgather.errors import ConfigError
from forgather.optim.adafactor import Adafactor
from forgather.optim.adamw import AdamW
from forgather.optim.groups import describe_groups
from forgather.optim.muon import Muon
from forgather.optim.sgd import SGD
from tests.optim.updates import (
    MESHES,
    OPTIMIZERS,
    SHAPES,
    gradient_of,
    load_and_step,
    step_alone,
    step_and_save,
    step_spread,
    value_of,
)
from tests.ranks import RankPool

MATRICES = ("q_proj.weight", "o_proj.weight")


@pytest.fixture(scope="module")
def four_ranks() -> Iterator[RankPool]:
    with RankPool(4) as pool:
        yield pool


def step_torch(make, names, **options):
    """Values after three steps of one of torch's optimizers; vectors have no decay."""
    parameters = {name: nn.Parameter(value_of(name)) for name in names}
    groups = [
        {"params": [p for p in parameters.values() if p.dim() < 2], "weight_decay": 0.0},
        {"params": [p for p in parameters.values() if p.dim() >= 2]},
    ]
    optimizer = make([group for group in groups if group["params"]], **options)
    for step in range(3):
        for name, parameter in parameters.items():
            parameter.grad = gradient_of(name, step)
        optimizer.step()
    return {name: parameter.detach() for name, parameter in parameters.items()}


def test_adamw_gives_the_bits_of_torch():
    ours = step_alone("adamw")
    for name, value in step_torch(
        torch.optim.AdamW, SHAPES, lr=0.02, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    ).items():
        assert torch.equal(ours[name], value)


def test_sgd_gives_the_bits_of_torch():
    ours = step_alone("sgd")
    options = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True, "fused": True}
    for name, value in step_torch(torch.optim.SGD, SHAPES, **options).items():
        assert torch.equal(ours[name], value)


def test_adafactor_is_that_of_torch():
    ours = step_alone("adafactor")
    for name, value in step_torch(torch.optim.Adafactor, SHAPES, lr=0.05, weight_decay=0.01).items():
        torch.testing.assert_close(ours[name], value, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("scale", ["match_rms_adamw", "original"])
def test_muon_gives_the_bits_of_torch_for_matrices_and_those_of_adamw_for_the_rest(scale):
    ours = step_alone("muon", compute_in="bf16", scale=scale)
    options = {"lr": 0.02, "weight_decay": 0.1}
    theirs = step_torch(torch.optim.Muon, MATRICES, adjust_lr_fn=scale, **options)
    others = [name for name in SHAPES if name not in MATRICES and name != "experts.up"]
    theirs |= step_torch(torch.optim.AdamW, others, betas=(0.9, 0.95), fused=True, **options)
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


def test_a_stack_of_matrices_is_a_matrix_each():
    ours = step_alone("muon")["experts.up"]
    for number in range(3):
        parameter = nn.Parameter(value_of("experts.up")[number])
        optimizer = Muon([{"params": [("up", parameter)]}], lr=0.02, compute_in="fp32")
        for step in range(3):
            parameter.grad = gradient_of("experts.up", step)[number]
            optimizer.step()
        torch.testing.assert_close(ours[number], parameter.detach())


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_every_mesh_does_what_one_process_does(four_ranks, kind, mesh):
    alone = step_alone(kind)
    for spread in four_ranks.run(step_spread, mesh, kind):
        assert spread.keys() == alone.keys()
        for name, tensor in alone.items():
            # Not bit for bit: torch's fused kernel computes the last few elements of a part with other instructions,
            # and Adafactor adds its sums up in another order.
            torch.testing.assert_close(spread[name], tensor, rtol=2e-6, atol=3e-7)
            if kind == "muon" and name in MATRICES:
                assert torch.equal(spread[name], tensor)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_bf16_is_rounded_alike_on_every_mesh(four_ranks, kind, mesh):
    options = {} if kind == "adafactor" else {"state_dtype": "parameter"}
    alone = step_alone(kind, dtype=torch.bfloat16, seed=3, **options)
    for spread in four_ranks.run(step_spread, mesh, kind, dtype=torch.bfloat16, seed=3, **options):
        for name, tensor in alone.items():
            if kind != "adafactor":
                assert torch.equal(spread[name], tensor)
            elif name in SHAPES:  # 1e-7 more or less turns one rounding in a thousand
                assert (spread[name] == tensor).float().mean() > 0.98


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        ("shard 4", "tensor 2 x shard 2, columns and rows"),
        ("tensor 2 x shard 2, rows of rows", "replicate 2 x shard 2"),
        ("replicate 2 x shard 2", "alone"),
    ],
)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_state_saved_on_one_mesh_goes_on_on_another(four_ranks, tmp_path, kind, saved, loaded):
    undisturbed = step_alone(kind, steps=4)
    four_ranks.run(step_and_save, tmp_path, saved, kind)
    if loaded == "alone":
        results = [load_and_step(tmp_path, loaded, kind)]
    else:
        results = four_ranks.run(load_and_step, tmp_path, loaded, kind)
    for result in results:
        for name, tensor in undisturbed.items():
            torch.testing.assert_close(result[name], tensor, rtol=2e-6, atol=3e-7)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_bf16_follows_fp32_and_depends_on_the_seed(kind):
    exact = step_alone(kind)
    rounded, other = (step_alone(kind, dtype=torch.bfloat16, seed=seed) for seed in (1, 2))
    for name in SHAPES:
        assert rounded[name].dtype == torch.bfloat16
        torch.testing.assert_close(rounded[name].float(), exact[name], rtol=0.03, atol=0.03)
    assert any(not torch.equal(rounded[name], other[name]) for name in SHAPES)


def test_updates_too_small_for_bf16_are_made_on_average_only_with_stochastic_rounding():
    moved = {}
    for stochastic in (True, False):
        parameter = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
        optimizer = AdamW([{"params": [("w", parameter)]}], lr=1e-4, weight_decay=0.0, stochastic_rounding=stochastic)
        for _ in range(50):
            parameter.grad = torch.ones_like(parameter)
            optimizer.step()
        moved[stochastic] = 1 - parameter.detach().float().mean().item()
    assert moved[False] == 0.0
    assert moved[True] == pytest.approx(50 * 1e-4, rel=0.05)


def test_a_fused_step_with_found_inf_changes_nothing():
    parameter = nn.Parameter(torch.ones(5))
    optimizer = AdamW([{"params": [("w", parameter)]}])
    optimizer.found_inf = torch.ones(())
    parameter.grad = torch.full((5,), float("nan"))
    optimizer.step()
    assert torch.equal(parameter.detach(), torch.ones(5))
    assert optimizer.state[parameter]["step"] == 0


def test_groups_of_muon_are_cut_by_what_updates_them_and_described():
    parameters = [(name, nn.Parameter(value_of(name))) for name in SHAPES]
    optimizer = Muon([{"name": "rest", "params": parameters}])
    assert [group["param_names"] for group in optimizer.param_groups] == [
        ["q_proj.weight", "o_proj.weight", "experts.up"],
        ["embed_tokens.weight", "norm.weight", "scale", "lm_head.weight"],
    ]
    assert describe_groups(optimizer) == (
        "rest by muon 3 tensors, 276 parameters, weight_decay 0.1; "
        "rest by adamw 4 tensors, 165 parameters, weight_decay 0.1"
    )


@pytest.mark.parametrize("make", [AdamW, Muon])
def test_parameters_without_names_are_refused(make):
    with pytest.raises(ConfigError, match="needs the names of its parameters"):
        make([{"params": [nn.Parameter(torch.ones(2, 2))]}])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(AdamW, state_dtype="fp8"), "state_dtype is 'fp8'"),
        (partial(Muon, scale="none"), "scale is 'none'"),
        (partial(Muon, compute_in="fp16"), "compute_in is 'fp16'"),
        (partial(AdamW, lr=-1e-3), r"lr is -0\.001"),
        (partial(AdamW, weight_decay=float("nan")), "weight_decay is nan"),
        (partial(AdamW, betas=(0.9, 1.0)), r"betas: 0\.9, 1\.0"),
        (partial(SGD, momentum=1.5), r"momentum: 1\.5"),
        (partial(SGD, momentum=0, nesterov=True), "nesterov is true, but its momentum is 0"),
        (partial(Adafactor, lr=float("inf")), "lr is inf"),
    ],
)
def test_options_that_are_unknown_or_lead_nowhere_are_refused(make, message):
    with pytest.raises(ConfigError, match=message) as error:
        make([{"params": [("w", nn.Parameter(torch.ones(2, 2)))]}])
    assert error.value.fix.startswith("use ")
