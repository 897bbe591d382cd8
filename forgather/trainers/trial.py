"""A few steps of SGD that show whether a model can be trained at all: its own loss, backward, and an update.

It makes no run and needs no mesh. Each batch is what the model is called with, `labels` included; see `trial_batches`.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from forgather.errors import ModelError
from forgather.metrics.meter import peak_memory_bytes


@dataclass(frozen=True)
class TrialStep:
    """What one step gave; on the meta device nothing but the shape of the logits."""

    step: int  # from 1
    logits_shape: tuple[int, ...]
    loss: float | None = None
    grad_norm: float | None = None
    tokens_per_s: float | None = None
    peak_memory_bytes: int | None = None  # since the process began: torch's on CUDA, resident memory on a CPU
    without_gradient: tuple[str, ...] = ()  # trainable parameters that backward did not reach
    problem: str | None = None  # what is not finite; the last step then


def try_training(
    model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]], *, lr: float, fuse: bool = False
) -> Iterator[TrialStep]:
    """Train `model` in place, a step for each batch, and give each step's numbers as they come.

    With `fuse` each parameter is updated within backward, as soon as its gradient is whole, and the gradient is let go:
    the same values with the memory of one gradient. It ends after the first step with a number that is not finite; an
    update of all parameters at once is then not made. Raises ModelError where the model refuses a batch or `lr`.
    """
    model.train()
    first = next(model.parameters())
    if lr > torch.finfo(first.dtype).max:
        name = str(first.dtype).removeprefix("torch.")
        raise ModelError(f"a learning rate of {lr:g} is more than {name} holds", fix="lower it, to 0.01 for example")
    update = _InBackward(model, lr) if fuse else _AfterBackward(model, lr)
    try:
        for number, batch in enumerate(batches, start=1):
            if first.is_meta:
                _check_positions(model, batch)
            step = _step(model, _on(first.device, batch), update, number)
            yield step
            if step.problem is not None:
                return
    finally:
        update.close()


def _check_positions(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> None:
    """Positions have values before they go to the meta device, where a model cannot see that one is beyond its last."""
    positions = batch.get("position_ids", torch.arange(batch["input_ids"].shape[-1]))
    for module in model.modules():
        check = getattr(module, "check_positions", None)
        if check is not None:
            with _refusing():
                check(positions)


@contextmanager
def _refusing() -> Iterator[None]:
    """Parts know nothing of Forgather and its errors."""
    try:
        yield
    except ValueError as error:
        raise ModelError(str(error), fix="change the flag or parameter that the message names") from error


def _on(device: torch.device, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # transformers chooses masks by the values of these two; meta has none, and no shape depends on them.
    left_out = ("attention_mask", "position_ids") if device.type == "meta" else ()
    return {name: tensor.to(device) for name, tensor in batch.items() if name not in left_out}


def _step(model: PreTrainedModel, batch: Mapping[str, Tensor], update: "_Update", number: int) -> TrialStep:
    device = batch["input_ids"].device
    tokens = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).sum()
    begun = _now(device)
    with _refusing():
        outputs = model(**batch, use_cache=False)
    shape = tuple(outputs.logits.shape)
    if device.type == "meta":
        outputs.loss.backward()
        update.norms()
        update.apply()
        return TrialStep(number, shape)

    loss = outputs.loss.item()
    if not math.isfinite(loss):
        return TrialStep(number, shape, loss=loss, problem=f"loss {loss}: {_first_not_finite(model, batch)}")
    outputs.loss.backward()
    norms = update.norms()
    grad_norm = torch.linalg.vector_norm(torch.stack(list(norms.values()))).item() if norms else 0.0
    if not math.isfinite(grad_norm):
        problem = f"gradient norm {grad_norm}: {_some([name for name in norms if not norms[name].isfinite()])}"
        seconds = _now(device) - begun
    else:
        update.apply()
        seconds = _now(device) - begun
        problem = None
        ruined = [name for name, parameter in model.named_parameters() if not parameter.isfinite().all()]
        if ruined:
            problem = f"the update left values that are not finite in {_some(ruined)}; lower the learning rate"
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return TrialStep(
        number,
        shape,
        loss,
        grad_norm,
        tokens_per_s=int(tokens) / seconds,
        peak_memory_bytes=peak_memory_bytes(device),
        without_gradient=tuple(name for name in trained if name not in norms),
        problem=problem,
    )


class _AfterBackward:
    """One optimizer for all parameters, which steps when all gradients are there."""

    def __init__(self, model: nn.Module, lr: float) -> None:
        self.trained = _trained(model)
        self.optimizer = torch.optim.SGD(self.trained.values(), lr=lr)

    def norms(self) -> dict[str, Tensor]:
        """The norm of each gradient of this backward, by the parameter's name."""
        return {name: _norm(each.grad) for name, each in self.trained.items() if each.grad is not None}

    def apply(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def close(self) -> None:
        self.optimizer.zero_grad()


class _InBackward:
    """An optimizer for each parameter, which steps as soon as autograd has its gradient."""

    def __init__(self, model: nn.Module, lr: float) -> None:
        self.found: dict[str, Tensor] = {}
        self.handles = []
        for name, parameter in _trained(model).items():
            hook = self._hook(name, torch.optim.SGD([parameter], lr=lr))
            handle = parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
            self.handles.append(handle)

    def _hook(self, name: str, optimizer: torch.optim.SGD) -> Callable[[Tensor], None]:
        def step(parameter: Tensor) -> None:
            assert parameter.grad is not None, "torch calls it once the gradient is accumulated"
            self.found[name] = _norm(parameter.grad)
            optimizer.step()
            optimizer.zero_grad()

        return step

    def norms(self) -> dict[str, Tensor]:
        found, self.found = self.found, {}
        return found

    def apply(self) -> None:
        """Backward has done it."""

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()


_Update = _AfterBackward | _InBackward


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trained:
        raise ModelError("no parameter of the model is trainable", fix="let some require a gradient")
    return trained


def _norm(gradient: Tensor) -> Tensor:
    # In float32 at least: squares of float16 overflow.
    return torch.linalg.vector_norm(gradient, dtype=torch.promote_types(gradient.dtype, torch.float32))


def _now(device: torch.device) -> float:
    """Seconds, once what was asked of the device is done."""
    if device.type not in ("cpu", "meta"):
        torch.get_device_module(device).synchronize(device)
    return time.perf_counter()


@torch.no_grad()
def _first_not_finite(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> str:
    """Where a forward first leaves the finite numbers: a parameter, or else the output of a module."""
    ruined = [name for name, parameter in model.named_parameters() if not parameter.isfinite().all()]
    if ruined:
        return f"values that are not finite in {_some(ruined)}"
    found: list[str] = []

    def look(name: str) -> Callable[[nn.Module, object, object], None]:
        def hook(_module: nn.Module, _inputs: object, output: object) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if isinstance(first, Tensor) and first.is_floating_point() and not first.isfinite().all():
                found.append(name)

        return hook

    handles = [module.register_forward_hook(look(name)) for name, module in model.named_modules()]
    model(**batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return f"the first output that is not finite is that of {found[0]}" if found else "the loss alone is not finite"


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
