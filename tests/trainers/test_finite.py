"""The verdict on a step, at once and one step late; either way a bad step changes nothing."""

import pytest
import torch
from torch import nn

from forgather.errors import TrainingError
from forgather.trainers.finite import FiniteWatch

GOOD, BAD = torch.tensor(1.0), torch.tensor(float("inf"))


def make_optimizer() -> tuple[nn.Parameter, torch.optim.Optimizer]:
    parameter = nn.Parameter(torch.ones(4))
    return parameter, torch.optim.AdamW([parameter], lr=0.1, fused=True)


def update(parameter, optimizer) -> None:
    parameter.grad = torch.ones(4)
    optimizer.step()


@pytest.mark.parametrize(("loss", "norm"), [(BAD, GOOD), (GOOD, BAD), (GOOD * float("nan"), GOOD)])
def test_the_verdict_comes_at_once_on_a_cpu(loss, norm):
    watch = FiniteWatch(make_optimizer()[1], torch.device("cpu"))
    watch.observe(6, GOOD, GOOD)
    with pytest.raises(TrainingError, match=r"step 8: loss (nan|inf|1.0) and gradient norm (inf|1.0)"):
        watch.observe(7, loss, norm)


def test_a_late_verdict_names_the_step_and_nothing_was_changed_since():
    parameter, optimizer = make_optimizer()
    watch = FiniteWatch(optimizer, torch.device("cpu"), deferred=True)
    watch.observe(0, GOOD, GOOD)
    update(parameter, optimizer)
    after_good = parameter.detach().clone()
    assert not torch.equal(after_good, torch.ones(4))

    watch.observe(1, GOOD, BAD)
    update(parameter, optimizer)
    assert torch.equal(parameter, after_good)
    assert optimizer.state[parameter]["step"] == 1
    with pytest.raises(TrainingError, match=r"step 2: loss 1\.0 and gradient norm inf"):
        watch.observe(2, GOOD, GOOD)
    update(parameter, optimizer)
    assert torch.equal(parameter, after_good)  # also the step that was queued meanwhile


def test_a_late_verdict_is_asked_for_before_anything_is_kept():
    watch = FiniteWatch(make_optimizer()[1], torch.device("cpu"), deferred=True)
    watch.observe(0, GOOD, GOOD)
    watch.settle()
    watch.observe(1, BAD, GOOD)
    with pytest.raises(TrainingError, match="step 2"):
        watch.settle()
    watch.settle()  # said once


def test_an_optimizer_that_cannot_read_the_flag_is_waited_for():
    plain = torch.optim.AdamW([nn.Parameter(torch.ones(1))], lr=0.1)
    assert not FiniteWatch(plain, torch.device("meta")).deferred
    assert FiniteWatch(make_optimizer()[1], torch.device("meta")).deferred
