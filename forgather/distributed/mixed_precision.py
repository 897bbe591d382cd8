"""Computing in bf16 from fp32 parameters where FSDP does not do it: in a world of one.

The arithmetic is FSDP's, operation for operation, so that a run means the same on one process and on many: the forward
sees bf16 parameters, buffers keep their type, activations are what comes of the two, gradients of one backward are bf16
and are added up in fp32, and the optimizer sees only fp32. (`torch.autocast` is something else: it picks a type for
each operation and keeps norms and the residual stream in fp32.)
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn

from forgather.tensor_boxes import local_part

Precision = Literal["fp32", "bf16", "fp16"]

# What the forward and backward compute in; None leaves parameters as they are.
COMPUTE_DTYPE: dict[Precision, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class ComputeCopies:
    """Lends `model` copies of its parameters in `dtype` for the duration of each forward.

    Outside the forward the module holds its own parameters, so state dicts, optimizers and `parameters()` never see a
    copy. Copies are refreshed at each forward, as FSDP casts at each gather: that parameters have changed cannot be
    seen, since fused optimizers leave `_version` as it was. `held` keeps them as they are for several forwards.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self.model = model
        self.dtype = dtype
        # Filled at the first forward: until then loading or materialising may still replace parameters.
        self._slots: list[tuple[nn.Module, str, nn.Parameter, nn.Parameter]] = []
        self._is_held = False
        model.register_forward_pre_hook(self._lend)
        model.register_forward_hook(self._take_back, always_call=True)

    def lent(self) -> list[nn.Parameter]:
        """What the last forward has computed with: copies, and the parameters that need none."""
        copied = {id(master): copy for _, _, master, copy in self._slots}
        return [copied.get(id(parameter), parameter) for parameter in self.model.parameters()]

    @contextmanager
    def held(self) -> Iterator[None]:
        """Within, copies stay as they are now: backwards that are yet to come need them as their forwards saw them."""
        self._refresh()
        self._is_held = True
        try:
            yield
        finally:
            self._is_held = False

    def _refresh(self) -> None:
        if any(module._parameters[name] is not master for module, name, master, _ in self._slots) or not self._slots:
            self._slots = self._make_slots()
        if not self._slots:  # parameters that are all in `dtype` themselves
            return
        with torch.no_grad():
            torch._foreach_copy_(
                [local_part(copy) for *_, copy in self._slots], [local_part(master) for _, _, master, _ in self._slots]
            )

    def _lend(self, _model: nn.Module, _args: Any) -> None:
        if not self._is_held:
            self._refresh()
        for module, name, _, copy in self._slots:
            module._parameters[name] = copy

    def _take_back(self, _model: nn.Module, _args: Any, _output: Any) -> None:
        for module, name, master, _ in self._slots:
            module._parameters[name] = master

    def _make_slots(self) -> list[tuple[nn.Module, str, nn.Parameter, nn.Parameter]]:
        copies: dict[nn.Parameter, nn.Parameter] = {}  # a tied parameter has one copy in all its places
        slots = []
        for module in self.model.modules():
            for name, master in module._parameters.items():
                if master is None or not master.is_floating_point() or master.dtype == self.dtype:
                    continue
                if master not in copies:
                    copies[master] = self._make_copy(master)
                slots.append((module, name, master, copies[master]))
        return slots

    def _make_copy(self, master: nn.Parameter) -> nn.Parameter:
        copy = nn.Parameter(torch.empty_like(master, dtype=self.dtype), requires_grad=master.requires_grad)

        def hand_over(copy: torch.Tensor) -> None:
            assert copy.grad is not None
            if master.grad is None:
                master.grad = copy.grad.to(master.dtype)
            else:
                master.grad += copy.grad
            copy.grad = None
            # As autograd does for a gradient that it accumulates itself.
            for hook in (master._post_accumulate_grad_hooks or {}).values():
                hook(master)

        if copy.requires_grad:
            copy.register_post_accumulate_grad_hook(hand_over)  # type: ignore[no-untyped-call]
        return copy
