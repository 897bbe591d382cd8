"""Models whose weights somebody else will fill: constructed in the time it takes to get memory."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel, initialization

_DRAWS = frozenset(
    getattr(torch.Tensor, name)
    for name in ("normal_", "uniform_", "random_", "bernoulli_", "exponential_", "cauchy_", "log_normal_", "geometric_")
)


@contextmanager
def no_init_weights() -> Iterator[None]:
    """Inside, a model gets memory for its weights and no values in it; ties hold, and buffers have their values.

    That holds for torch's modules, for those of transformers and for code loaded with a model, whether they draw by
    `torch.nn.init` or by the methods of tensors. torch and transformers are changed for all threads until it ends.
    """
    # Own functions for it, because transformers' context of this name leaves out ties and buffers too, and because it
    # is in force again inside `initialize_weights`, where transformers puts back what others have replaced.
    with ExitStack() as changes:
        for module, name in _initialisers():
            changes.enter_context(_replaced(module, name, _left_alone))
        changes.enter_context(_replaced(PreTrainedModel, "initialize_weights", _compute_buffers))
        changes.enter_context(_NoDraws())
        yield


class _NoDraws(TorchFunctionMode):
    """Modules of other people draw by methods of tensors."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        return args[0] if func in _DRAWS else func(*args, **(kwargs or {}))


def _initialisers() -> list[tuple[ModuleType, str]]:
    """Where torch and transformers keep the functions of torch.nn.init; some modules import them by name."""
    names = [name for name in vars(nn.init) if name.endswith("_") and not name.startswith("_")]
    modules = [module for name, module in sys.modules.items() if name.startswith("torch.nn.modules.")]
    return [
        (module, name)
        for module in (nn.init, initialization, *modules)
        for name in names
        if callable(getattr(module, name, None))
    ]


def _left_alone(tensor: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
    return tensor


@torch.no_grad()
def _compute_buffers(model: PreTrainedModel) -> None:
    """What is left of initialising: the buffers that are in no checkpoint, and that `from_pretrained` makes empty."""

    def visit(module: nn.Module, base: PreTrainedModel) -> None:
        base = module if isinstance(module, PreTrainedModel) else base
        if module._non_persistent_buffers_set:
            reset_buffers = getattr(module, "reset_buffers", None)
            if reset_buffers is not None:
                reset_buffers()
            else:
                base._init_weights(module)
        for child in module.children():
            visit(child, base)

    visit(model, model)


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = vars(owner)[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
