"""An optimizer's state by parameter name, and how to have it before the first step.

What is saved is what the optimizer has learnt (`optimizer.state`). Hyper-parameters in its groups are the
configuration's: a resume with another learning rate or weight decay uses the new one.
"""

from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch.optim import Optimizer


@runtime_checkable
class MakesStates(Protocol):
    """An optimizer that can say what the state of a parameter is before its first step; ours do (`optim.partwise`)."""

    def new_state(self, group: Mapping[str, Any], parameter: torch.Tensor) -> dict[str, Any]: ...


def optimizer_state_by_name(optimizer: Optimizer, names: Mapping[torch.Tensor, str]) -> dict[str, dict[str, Any]]:
    """`{parameter name: {"exp_avg": ...}}` of the parameters that have a state; the tensors are the live ones."""
    return {names[parameter]: dict(state) for parameter, state in optimizer.state.items() if state}


def prepare_state(optimizer: Optimizer, names: Mapping[torch.Tensor, str], wanted: set[str]) -> None:
    """Let exactly the parameters named in `wanted` have a state, of the right shapes and any values.

    Unless the optimizer makes it, a state comes into being at a parameter's first step. That step is taken by a twin of
    the parameter, so that no weight changes and no hook of the optimizer is called; one parameter at a time, so that it
    needs little memory.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if names[parameter] not in wanted:
                optimizer.state.pop(parameter, None)
            elif not optimizer.state.get(parameter):
                optimizer.state[parameter] = _first_state(optimizer, group, parameter)


def _first_state(optimizer: Optimizer, group: dict[str, Any], parameter: torch.Tensor) -> dict[str, Any]:
    if isinstance(optimizer, MakesStates):
        return optimizer.new_state(group, parameter)
    twin = torch.zeros_like(parameter, requires_grad=True)
    twin.grad = torch.zeros_like(parameter)
    stand_in = object.__new__(type(optimizer))
    stand_in.__dict__.update(optimizer.__dict__)
    stand_in.state = defaultdict(dict)
    stand_in.param_groups = [{**group, "params": [twin]}]
    stand_in._optimizer_step_pre_hooks = OrderedDict()
    stand_in._optimizer_step_post_hooks = OrderedDict()
    # The class's method: a learning rate schedule of torch replaces the instance's, bound to the real optimizer.
    type(optimizer).step(stand_in)
    return dict(stand_in.state[twin])
