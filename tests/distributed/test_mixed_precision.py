"""bf16 in a world of one: lent for the forward, invisible outside it, gradients added up in fp32."""

import torch
from torch import nn

from forgather.distributed.mixed_precision import ComputeCopies


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 6, bias=False)
        self.norm = nn.LayerNorm(6)
        self.second = nn.Linear(6, 6, bias=False)
        self.second.weight = self.first.weight
        self.register_buffer("scale", torch.tensor(1.0 + 2**-12))  # bf16 would lose what it has above 1
        self.frozen = nn.Parameter(torch.ones(6), requires_grad=False)
        self.seen: list[tuple[torch.dtype, torch.dtype, bool]] = []

    def forward(self, x):
        x = self.second(self.norm(self.first(x.to(self.first.weight.dtype)))) * self.frozen
        self.seen.append((x.dtype, self.scale.dtype, self.first.weight is self.second.weight))
        return x


def test_the_forward_sees_bf16_and_nothing_else_does():
    model = Tied()
    names, before = list(model.state_dict()), dict(model.named_parameters())
    ComputeCopies(model, torch.bfloat16)
    output = model(torch.ones(2, 6))
    assert output.dtype == torch.bfloat16
    assert model.seen == [(torch.bfloat16, torch.float32, True)]
    assert list(model.state_dict()) == names
    assert all(parameter is before[name] for name, parameter in model.named_parameters())


def test_gradients_of_microbatches_are_added_up_in_fp32():
    model = Tied()
    ComputeCopies(model, torch.bfloat16)
    parts = []
    for number in range(3):
        model.zero_grad()
        model(torch.full((2, 6), 1.0 + number)).square().sum().backward()
        parts.append(model.first.weight.grad.clone())
    model.zero_grad()
    for number in range(3):
        model(torch.full((2, 6), 1.0 + number)).square().sum().backward()
    assert model.first.weight.grad.dtype == torch.float32
    assert torch.equal(model.first.weight.grad, parts[0] + parts[1] + parts[2])
    assert torch.equal(parts[0], parts[0].bfloat16().float())  # of one backward they are bf16
    assert model.frozen.grad is None


def test_an_update_is_seen_by_the_next_forward_whatever_made_it():
    # A fused optimizer does not count as a change to autograd's version counter.
    for options in ({"fused": True}, {"foreach": True}, {}):
        model, plain = Tied(), Tied().bfloat16()
        ComputeCopies(model, torch.bfloat16)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, **options)
        model(torch.ones(2, 6)).square().sum().backward()
        optimizer.step()
        plain.load_state_dict(model.state_dict())
        assert torch.equal(model(torch.ones(2, 6)), plain(torch.ones(2, 6)))


def test_the_parameters_come_back_after_a_forward_that_fails():
    model = Tied()
    before = dict(model.named_parameters())
    ComputeCopies(model, torch.bfloat16)
    model(torch.ones(2, 6))
    try:
        model(torch.ones(2, 5))
    except RuntimeError:
        pass
    else:
        raise AssertionError("a wrong shape went through")
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
