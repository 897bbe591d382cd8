"""Every option of a step computes what the plain step computes; what cannot go together is refused."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from forgather.distributed.environment import Environment
from forgather.distributed.mesh import Mesh
from forgather.errors import ConfigError, TrainingError
from forgather.trainers.fused_backward import FusedBackward
from forgather.trainers.loss_scale import LossScale
from forgather.trainers.update import Update
from tests.ranks import RankPool
from tests.trainers.optional import ADAMW, SGD, assert_equal_bits, build, local, parameters, run
from tests.trainers.tiny import microbatches, tiny_llama


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[RankPool]:
    with RankPool(2) as pool:
        yield pool


def make_update(**options: Any) -> Update:
    optimizer = ADAMW(tiny_llama().parameters())
    return Update(optimizer, lambda step: 1.0, Mesh(Environment(device="cpu")), **options)


# The optimizer within the backward


@pytest.mark.training_case(14)
@pytest.mark.parametrize("optimizer", [ADAMW, SGD], ids=["adamw", "sgd"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_fused_with_the_backward_is_the_same_step(optimizer, tied, precision):
    options = {"optimizer": optimizer, "tied": tied, "precision": precision}
    ours, expected = run(fuse_optimizer_with_backward=True, **options), run(**options)
    assert ours["norms"] == pytest.approx(expected["norms"], rel=1e-6)
    assert_equal_bits(ours | {"norms": expected["norms"]}, expected)


@pytest.mark.training_case(14)
def test_fused_with_the_backward_of_shards_is_the_same_step(two_ranks):
    ours = two_ranks.run(run, fuse_optimizer_with_backward=True, recompute="full")
    expected = two_ranks.run(run)
    for mine, theirs in zip(ours, expected, strict=True):
        assert mine["norms"] == pytest.approx(theirs["norms"], rel=1e-6)
        assert_equal_bits(mine | {"norms": theirs["norms"]}, theirs)


def most_gradients(**options: Any) -> int:
    """How many parameters have a gradient at one time, at most."""
    step = build(Mesh(Environment(device="cpu")), **options)
    everything = list(step.model.parameters())
    seen = []
    for parameter in everything:  # after the hooks that are there
        parameter.register_post_accumulate_grad_hook(lambda _: seen.append(sum(p.grad is not None for p in everything)))
    step(0, microbatches(0, 0, 1, 1))
    assert len(seen) == len(everything)
    assert all(parameter.grad is None for parameter in everything)
    return max(seen)


def test_no_gradient_is_kept_when_it_is_fused():
    assert most_gradients() == len(list(tiny_llama().parameters()))
    assert most_gradients(fuse_optimizer_with_backward=True) == 0


@pytest.mark.training_case(11)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_grad_norm": 1.0}, "max_grad_norm is 1.0"),
        ({"num_microbatches": 4}, "a step has 4 microbatches"),
        ({"precision": "fp16"}, "precision is fp16"),
        ({"on_non_finite": "skip"}, "on_non_finite is skip"),
    ],
)
def test_what_cannot_be_fused_is_refused(options, message):
    with pytest.raises(ConfigError, match=f"fuse_optimizer_with_backward: {message}"):
        make_update(fuse_optimizer_with_backward=True, **{"max_grad_norm": None, **options})


@pytest.mark.parametrize("axis", ["pipeline", "replicate"])
def test_a_mesh_whose_gradients_are_not_ready_is_refused(axis):
    mesh = SimpleNamespace(environment=Environment(device="cpu"), coordinate=lambda _axis: 0)
    vars(mesh).update({"pipeline": 1, "replicate": 1, "shard": 1, "tensor": 1, axis: 2})
    with pytest.raises(ConfigError, match=f"mesh.{axis} is 2"):
        Update(
            ADAMW(tiny_llama().parameters()),
            lambda step: 1.0,
            mesh,
            max_grad_norm=None,
            fuse_optimizer_with_backward=True,
        )


def test_hooks_on_the_optimizer_are_refused_when_it_is_fused():
    step = build(Mesh(Environment(device="cpu")), fuse_optimizer_with_backward=True)
    step.update.optimizer.register_step_post_hook(lambda *_: None)
    with pytest.raises(ConfigError, match="something hangs on the optimizer's steps"):
        step(0, microbatches(0, 0, 1, 1))


def break_fused(what: str) -> str:
    """The second of two steps goes wrong on rank 1 alone; returns what this rank says of it."""
    mesh = Mesh(Environment(device="cpu"))
    step = build(mesh, fuse_optimizer_with_backward=True)
    step(0, microbatches(0, mesh.data_rank, mesh.data_ranks, 1))
    before = [local(parameter).detach().clone() for parameter in step.update.parameters]
    if what == "loss":
        compute = step.loss
        # Its gradients are finite, so nothing but the loss tells.
        step.loss = lambda batch: compute(batch) + (float("inf") if mesh.data_rank == mesh.data_ranks - 1 else 0.0)
    else:
        step.model.model.layers[0].mlp.down_proj.weight.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(TrainingError) as error:
        step(1, microbatches(1, mesh.data_rank, mesh.data_ranks, 1))
    after = [local(parameter).detach() for parameter in step.update.parameters]
    if what == "loss":
        assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert all(bool(parameter.isfinite().all()) for parameter in after)
    return str(error.value)


def test_fused_a_loss_that_is_not_finite_changes_nothing(two_ranks):
    for message in [break_fused("loss"), *two_ranks.run(break_fused, "loss")]:
        assert message.startswith("step 2: loss inf")
        assert "the step was not applied" in message


def test_fused_a_gradient_that_is_not_finite_stops_the_run_and_is_not_applied():
    message = break_fused("gradient")
    assert message.startswith("step 2: loss ")
    assert "no checkpoint has any of it" in message


def test_where_the_optimizer_reads_a_flag_nobody_looks_at_the_numbers():
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    optimizer.found_inf = flag = torch.zeros(())
    fused = FusedBackward(optimizer, Mesh(Environment(device="cpu")), flag=flag)
    before = parameters(model)
    for scale, bias_is_sound in ((float("nan"), False), (1.0, False), (1.0, True)):
        hook = model.bias.register_hook(lambda gradient, sound=bias_is_sound: gradient if sound else gradient / 0)
        loss = model(torch.ones(1, 3)).sum()
        assert fused.begin(loss.detach() * scale)
        loss.backward()
        hook.remove()
        assert bool(flag) is not bias_is_sound
        assert torch.equal(model.bias, before[1]) is not bias_is_sound
        if not torch.isfinite(torch.tensor(scale)):
            assert torch.equal(model.weight, before[0])


# Loss scale


@pytest.mark.training_case(16)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_without_fp16_nothing_is_scaled_and_nothing_of_a_scale_is_saved(precision):
    update = make_update(precision=precision)
    loss = torch.tensor(2.0)
    assert update.scaled(loss) is loss
    assert "loss_scale" not in update.state_dict()
    assert update.metrics() == {}


@pytest.mark.training_case(17)
def test_fp16_scales_the_loss_from_65536_or_what_is_asked_and_saves_its_scale():
    update = make_update(precision="fp16")
    assert update.scaled(torch.tensor(2.0)) == 2 * 65536
    assert make_update(precision="fp16", loss_scale=1024).scale.factor == 1024
    update.scale.adapt(torch.tensor(True))
    other = make_update(precision="fp16")
    other.load_state_dict(update.state_dict())
    assert other.scale.factor == 32768
    assert other.metrics() == {"skipped_steps": 0, "loss_scale": 32768}


def test_the_scale_doubles_when_all_is_calm_and_halves_at_an_overflow_but_not_below_one():
    scale = LossScale(torch.device("cpu"), 2.0, growth_every=3)
    factors = []
    for is_overflow in (False, False, False, True, False, True, True, True, False, False, False):
        scale.adapt(torch.tensor(is_overflow))
        factors.append(float(scale.factor))
    assert factors == [2, 2, 4, 2, 2, 1, 1, 1, 1, 1, 2]
    with pytest.raises(ConfigError, match=r"loss_scale is 0.5"):
        LossScale(torch.device("cpu"), 0.5)


@pytest.mark.training_case(17)
def test_in_fp16_a_step_is_that_of_fp32_but_for_rounding(two_ranks):
    expected = run(max_grad_norm=1.0)
    for ours in [run(max_grad_norm=1.0, precision="fp16"), run(max_grad_norm=1.0, precision="fp16", accumulate=4)]:
        assert ours["losses"] == pytest.approx(expected["losses"], rel=2e-3)
        assert ours["norms"] == pytest.approx(expected["norms"], rel=2e-2)
    both = two_ranks.run(run, max_grad_norm=1.0, precision="fp16")
    assert both[0]["norms"] == both[1]["norms"] == pytest.approx(expected["norms"], rel=2e-2)


def overflow_one_rank() -> dict[str, Any]:
    """Steps in fp16 whose first overflows on the last rank alone: a gradient there is infinite."""
    mesh = Mesh(Environment(device="cpu"))
    schedule: list[int] = []
    step = build(mesh, precision="fp16", max_grad_norm=1.0, schedule=lambda number: schedule.append(number) or 1.0)
    before = parameters(step.model)
    scaled = step.update.scaled
    if mesh.data_rank == mesh.data_ranks - 1:
        step.update.scaled = lambda loss: scaled(loss) * float("inf")
    result = step(0, microbatches(0, mesh.data_rank, mesh.data_ranks, 1))
    step.update.scaled = scaled
    unchanged = all(torch.equal(a, b) for a, b in zip(parameters(step.model), before, strict=True))
    state = [dict(values) for values in step.update.optimizer.state.values()]
    second = step(1, microbatches(1, mesh.data_rank, mesh.data_ranks, 1))
    return {
        "unchanged": unchanged,
        "optimizer": state,
        "statistics": [result.loss_sum.item(), int(result.num_targets), result.grad_norm.item()],
        "schedule": schedule[1:],  # the first is asked for when the step is made
        "metrics": step.update.metrics(),
        "finite": bool(second.grad_norm.isfinite()),
        "changed": any(not torch.equal(a, b) for a, b in zip(parameters(step.model), before, strict=True)),
    }


@pytest.mark.training_case(18)
def test_an_overflow_leaves_parameters_schedule_and_statistics(two_ranks):
    for seen in [overflow_one_rank(), *two_ranks.run(overflow_one_rank)]:
        assert seen["unchanged"]
        assert seen["optimizer"] == []
        assert seen["statistics"] == [0.0, 0, 0.0]
        # Asked for the first step once it is left out, the second is made as if it were the first.
        assert seen["schedule"] == [-1, 0]
        assert seen["metrics"] == {"skipped_steps": 1, "loss_scale": 32768}
        assert seen["finite"]
        assert seen["changed"]


# Steps left out


def test_a_step_left_out_is_as_if_it_had_not_been():
    mesh = Mesh(Environment(device="cpu"))
    step = build(mesh, on_non_finite="skip", max_grad_norm=1.0)
    step(0, microbatches(0, 0, 1, 2))
    compute = step.loss
    step.loss = lambda batch: compute(batch) * float("nan")
    step(1, microbatches(1, 0, 1, 2))
    step.loss = compute
    step(2, microbatches(2, 0, 1, 2))
    assert step.update.state_dict()["skipped"] == 1

    expected = build(mesh, max_grad_norm=1.0)
    for number in (0, 2):
        expected(number, microbatches(number, 0, 1, 2))
    for ours, theirs in zip(parameters(step.model), parameters(expected.model), strict=True):
        assert torch.equal(ours, theirs)


def test_how_many_were_left_out_is_saved():
    update = make_update(on_non_finite="skip")
    update.watch.skipped, update.watch.skipped_in_a_row = 5, 2
    other = make_update(on_non_finite="skip")
    other.load_state_dict(update.state_dict())
    assert (other.watch.skipped, other.watch.skipped_in_a_row) == (5, 2)
    assert other.metrics() == {"skipped_steps": 5}


# What is kept for the backward


@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_offloaded_activations_are_the_same_bits(recompute, precision):
    ours = run(offload_from=0, recompute=recompute, precision=precision, dropout=0.3)
    assert_equal_bits(ours, run(precision=precision, dropout=0.3))


@pytest.mark.parametrize(("recompute", "offload_from"), [("full", None), ("selective", None), (2, 0)])
def test_shards_are_the_same_bits_when_activations_are_not_kept(two_ranks, recompute, offload_from):
    ours = two_ranks.run(run, recompute=recompute, offload_from=offload_from, accumulate=2, dropout=0.3)
    for mine, theirs in zip(ours, two_ranks.run(run, accumulate=2, dropout=0.3), strict=True):
        assert_equal_bits(mine, theirs)


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_compiled_shards_are_the_same_bits(two_ranks, recompute):
    ours = two_ranks.run(run, compile={"backend": "aot_eager"}, recompute=recompute, accumulate=2)
    for mine, theirs in zip(ours, two_ranks.run(run, accumulate=2), strict=True):
        assert_equal_bits(mine, theirs)
