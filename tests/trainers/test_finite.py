"""The verdict on a step, at once and one step late; either way a bad step changes nothing."""

import pytest
import torch
from torch import nn

from forgather.errors import ConfigError, TrainingError
from forgather.metrics.step_result import StepResult
from forgather.trainers.finite import Evidence, FiniteWatch
from forgather.trainers.loss_scale import LossScale
from tests.trainers.tiny import rows_of_step

GOOD, BAD = torch.tensor(1.0), torch.tensor(float("inf"))
CPU = torch.device("cpu")


def make_optimizer() -> tuple[nn.Parameter, torch.optim.Optimizer]:
    parameter = nn.Parameter(torch.ones(4))
    return parameter, torch.optim.AdamW([parameter], lr=0.1, fused=True)


def update(parameter, optimizer) -> None:
    parameter.grad = torch.ones(4)
    optimizer.step()


def evidence(step: int, losses=()) -> Evidence:
    return Evidence(step, rows_of_step(step, rows=4), losses)


def judge(watch: FiniteWatch, step: int, loss: torch.Tensor, norm: torch.Tensor) -> None:
    watch.observe(evidence(step), loss, norm)
    watch.settle()


def result(loss: torch.Tensor) -> StepResult:
    return StepResult(loss, torch.tensor(7), loss * 2, 0.1, 64)


@pytest.mark.parametrize(("loss", "norm"), [(BAD, GOOD), (GOOD, BAD), (GOOD * float("nan"), GOOD)])
def test_the_verdict_comes_at_once_on_a_cpu(loss, norm):
    watch = FiniteWatch(make_optimizer()[1], CPU)
    assert watch.observe(evidence(6), GOOD, GOOD)
    with pytest.raises(TrainingError, match=r"step 8: loss (nan|inf|1.0) and gradient norm (inf|1.0)"):
        watch.observe(evidence(7), loss, norm)


def test_the_rows_to_blame_are_named():
    watch = FiniteWatch(make_optimizer()[1], CPU)
    with pytest.raises(TrainingError, match="not finite is the loss of samples 29-30;"):
        watch.observe(evidence(7, [GOOD, BAD, BAD, GOOD]), BAD, BAD)
    with pytest.raises(TrainingError, match="each loss is finite, a gradient of samples 28-31 is not;"):
        watch.observe(evidence(7, [GOOD] * 4), GOOD, BAD)
    with pytest.raises(TrainingError, match="not finite is the loss of samples 28-31;"):
        watch.observe(evidence(7, [GOOD, BAD]), BAD, BAD)  # losses of other microbatches than those of the loader


def test_a_late_verdict_names_the_step_and_nothing_was_changed_since():
    parameter, optimizer = make_optimizer()
    watch = FiniteWatch(optimizer, CPU, deferred=True)
    watch.observe(evidence(0), GOOD, GOOD)
    update(parameter, optimizer)
    after_good = parameter.detach().clone()
    assert not torch.equal(after_good, torch.ones(4))

    watch.observe(evidence(1), GOOD, BAD)
    update(parameter, optimizer)
    assert torch.equal(parameter, after_good)
    assert optimizer.state[parameter]["step"] == 1
    with pytest.raises(TrainingError, match=r"step 2: loss 1\.0 and gradient norm inf"):
        watch.observe(evidence(2), GOOD, GOOD)
    update(parameter, optimizer)
    assert torch.equal(parameter, after_good)  # also the step that was queued meanwhile


def test_a_late_verdict_is_asked_for_before_anything_is_kept():
    watch = FiniteWatch(make_optimizer()[1], CPU, deferred=True)
    watch.observe(evidence(0), GOOD, GOOD)
    watch.settle()
    watch.observe(evidence(1), BAD, GOOD)
    with pytest.raises(TrainingError, match="step 2"):
        watch.settle()
    watch.settle()  # said once


def test_an_optimizer_that_cannot_read_the_flag_is_waited_for():
    plain = torch.optim.AdamW([nn.Parameter(torch.ones(1))], lr=0.1)
    assert not FiniteWatch(plain, torch.device("meta")).deferred
    assert FiniteWatch(make_optimizer()[1], torch.device("meta")).deferred


@pytest.mark.parametrize("deferred", [False, True])
def test_so_many_steps_in_a_row_are_left_out_and_counted(deferred):
    parameter, optimizer = make_optimizer()
    said: list[str] = []
    options = {"on_non_finite": "skip", "max_skips": 2, "say": said.append, "deferred": deferred}
    watch = FiniteWatch(optimizer, CPU, **options)
    applied = []
    for step, loss in enumerate([GOOD, BAD, BAD, GOOD, BAD, BAD]):
        before = parameter.detach().clone()
        if watch.observe(evidence(step), loss, GOOD):
            update(parameter, optimizer)
        applied.append(not torch.equal(parameter, before))
        counted = watch.count(result(loss))
        expected = [0.0, 0, 2.0, 64] if loss is BAD else [1.0, 7, 2.0, 64]
        assert [counted.loss_sum, counted.num_targets, counted.grad_norm, counted.tokens] == expected
    watch.settle()
    assert applied == [True, False, False, True, False, False]
    assert (watch.skipped, watch.skipped_in_a_row) == (4, 2)
    assert [line.split(":")[0] for line in said] == ["step 2", "step 3", "step 5", "step 6"]
    with pytest.raises(TrainingError, match=r"step 7: .* and 2 before it were left out in a row"):
        judge(watch, 6, BAD, GOOD)


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_only_a_gradient_may_overflow_and_only_while_a_smaller_scale_is_left(deferred, bad):
    scale = LossScale(CPU, 2.0)
    watch = FiniteWatch(make_optimizer()[1], CPU, scale=scale, deferred=deferred)
    if bad == "gradient":
        judge(watch, 0, GOOD, BAD)
        assert (watch.skipped, scale.factor) == (1, 1.0)
    with pytest.raises(TrainingError, match=r"step 2: loss"):
        judge(watch, 1, BAD if bad == "loss" else GOOD, BAD)


def test_a_policy_that_does_not_exist_is_refused():
    with pytest.raises(ConfigError, match="on_non_finite is 'ignore'"):
        FiniteWatch(make_optimizer()[1], CPU, on_non_finite="ignore")
