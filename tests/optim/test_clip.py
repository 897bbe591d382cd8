"""One norm, however the parameters are spread, and the same scaling as PyTorch's own function."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from forgather.distributed.environment import Environment
from forgather.distributed.mesh import Mesh
from forgather.errors import ConfigError
from forgather.optim.clip import GradientClip
from tests.ranks import RankPool


@pytest.fixture(scope="module")
def four_ranks() -> Iterator[RankPool]:
    with RankPool(4) as pool:
        yield pool


def make_model() -> nn.Module:
    torch.manual_seed(0)
    # 3 and 5 rows: on 4 ranks some hold nothing of a parameter
    return nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3), nn.Linear(3, 1))


def clip_spread(replicate: int | None, max_norm: float) -> tuple[float, float, list[list[float]]]:
    """Norm, the sum of what rides along, and the clipped gradients; replicate None leaves the model plain."""
    model = make_model()
    mesh = Mesh(Environment(device="cpu"), replicate=4 if replicate is None else replicate)
    if replicate is not None:
        fully_shard(model, mesh=mesh.device_mesh)
    model(torch.ones(2, 7)).square().sum().backward()  # the same on all ranks, so their mean is that of one
    clip = GradientClip(model.parameters(), max_norm, mesh)
    norm, riding = clip.norm(riding=torch.tensor(1.5))
    clip.scale(norm)
    gradients = [p.grad.full_tensor() if replicate is not None else p.grad for p in model.parameters()]
    return norm.item(), riding.item(), [gradient.flatten().tolist() for gradient in gradients]


@pytest.mark.parametrize("max_norm", [0.5, 1e6])
@pytest.mark.parametrize("replicate", [None, 1, 2, 4])
def test_every_element_counts_once(four_ranks, replicate, max_norm):
    model = make_model()
    model(torch.ones(2, 7)).square().sum().backward()
    expected = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm).item()
    for norm, riding, gradients in four_ranks.run(clip_spread, replicate, max_norm):
        assert norm == pytest.approx(expected, rel=1e-6)
        assert riding == 6.0
        for ours, theirs in zip(gradients, model.parameters(), strict=True):
            assert ours == pytest.approx(theirs.grad.flatten().tolist(), rel=1e-5)


def test_the_norm_of_large_gradients_is_exact():
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.zeros(size)) for size in (1, 70, 16_385, 1_000_003)]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter) * torch.rand_like(parameter) ** 4
    exact = sum(parameter.grad.double().square().sum() for parameter in parameters).sqrt()
    clip = GradientClip(parameters, None, Mesh(Environment(device="cpu")))
    assert clip.norm(riding=torch.zeros(()))[0].item() == pytest.approx(exact.item(), rel=1e-7)


def test_gradients_are_scaled_by_the_arithmetic_of_pytorch():
    ours, theirs = make_model(), make_model()
    for model in (ours, theirs):
        model(torch.ones(2, 7)).square().sum().backward()
    clip = GradientClip(ours.parameters(), 0.1, Mesh(Environment(device="cpu")))
    norm, riding = clip.norm(riding=torch.tensor(2.0))
    clip.scale(norm)
    total = torch.nn.utils.get_total_norm([parameter.grad for parameter in theirs.parameters()])
    assert norm.item() == pytest.approx(total.item(), rel=1e-6)
    torch.nn.utils.clip_grads_with_norm_(theirs.parameters(), 0.1, norm)
    assert riding.item() == 2.0
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_without_a_limit_gradients_are_measured_only():
    model = make_model()
    model(torch.ones(2, 7)).square().sum().backward()
    before = [parameter.grad.clone() for parameter in model.parameters()]
    clip = GradientClip(model.parameters(), None, Mesh(Environment(device="cpu")))
    clip.scale(clip.norm(riding=torch.zeros(()))[0])
    for parameter, gradient in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter.grad, gradient)


@pytest.mark.parametrize("limit", [0.0, -1.0])
def test_a_limit_that_leaves_nothing_is_refused(limit: float):
    with pytest.raises(ConfigError, match="leaves nothing"):
        GradientClip(make_model().parameters(), limit, Mesh(Environment(device="cpu")))
