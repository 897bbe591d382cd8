"""The outer optimizer: moves a master value by the mean of what the workers have made of it.

    outer.step(name, master, mean)   # master moves, in place, by the gradient master - mean

`mean` is the weighted mean of the workers' local values. Ours with learning rate 1 and no momentum makes the master the
mean, bit for bit, so one worker then trains as it would alone.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from forgather.errors import CheckpointError, ConfigError

_PIECE = 1 << 18  # elements that are worked on at a time, so that they stay in a cache


class Outer(Protocol):
    """An optimizer of one tensor at a time, whose state is tensors by name."""

    def require_parameters(self, parameters: Mapping[str, Sequence[int]]) -> None:
        """ConfigError if it cannot step parameters of these shapes."""

    def step(self, name: str, master: Tensor, mean: Tensor) -> None:
        """Move `master` (fp32, contiguous) in place; `mean`, of its shape, may be overwritten."""

    def state_tensors(self) -> dict[str, Tensor]:
        """The state itself, no copy of it."""

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take what `state_tensors` gave for the state, and keep it; CheckpointError for another optimizer's."""

    @property
    def num_states(self) -> int:
        """How many tensors of a parameter's size it keeps of each."""

    def describe(self) -> str:
        """One line that says what it is, equal for equal optimizers."""


class Nesterov:
    """SGD with momentum m <- momentum m + g, value <- value - lr (g + momentum m), or with `nesterov` off - lr m.

    The first part is taken as an interpolation towards the mean, which is exact at lr 1, also where master - mean is
    rounded. Without momentum there is no state: at lr 1 that is averaging.
    """

    def __init__(self, lr: float = 0.7, momentum: float = 0.9, nesterov: bool = True) -> None:
        _require_rates(lr, momentum)
        self.lr = lr
        self.momentum = momentum
        self.nesterov = nesterov
        self._momenta: dict[str, Tensor] = {}

    def require_parameters(self, parameters: Mapping[str, Sequence[int]]) -> None:
        """Any will do."""

    @torch.no_grad()
    def step(self, name: str, master: Tensor, mean: Tensor) -> None:
        if self.momentum == 0:
            self._momenta.pop(name, None)  # it had one, which is not to come back
            _move_towards(master, mean, self.lr)
            return
        if name not in self._momenta:
            self._momenta[name] = torch.zeros_like(master)
        room = torch.empty(min(_PIECE, master.numel()))
        for value, target, momentum in _pieces(master, mean, self._momenta[name]):
            gradient = torch.sub(value, target, out=room[: value.numel()])
            _move_towards(value, target, self.lr)
            momentum.mul_(self.momentum)
            if self.nesterov:
                momentum.add_(gradient)
                value.sub_(momentum, alpha=self.lr * self.momentum)
            else:  # lr m is lr g, which was moved by already, and what is left of the momentum before
                value.sub_(momentum, alpha=self.lr)
                momentum.add_(gradient)

    def state_tensors(self) -> dict[str, Tensor]:
        if self.momentum == 0:
            return {}
        return {f"{name}.momentum": momentum for name, momentum in self._momenta.items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        kinds = _by_kind(tensors, ("momentum",) if self.momentum else (), self.describe())
        self._momenta = kinds.get("momentum", {})

    @property
    def num_states(self) -> int:
        return 0 if self.momentum == 0 else 1

    def describe(self) -> str:
        if self.momentum == 0:
            return f"averaging, lr {self.lr:g}"
        return f"SGD, lr {self.lr:g}, {'Nesterov ' if self.nesterov else ''}momentum {self.momentum:g}"


class DelayedNesterov:
    """Delayed Nesterov (arXiv:2401.09135), for a server to which workers come one by one.

    Each arrival moves by lr g / every at once; after `every` of them m <- momentum m + their mean, and
    value <- value - lr momentum m. So `every` arrivals together move as far as one step with their mean; with `every` 1
    it is Nesterov's.
    """

    def __init__(self, lr: float = 0.7, momentum: float = 0.9, every: int = 8) -> None:
        _require_rates(lr, momentum)
        if every < 1:
            raise ConfigError(f"momentum every {every} arrivals", fix="every: the number of workers, or more")
        self.lr = lr
        self.momentum = momentum
        self.every = every
        self._momenta: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] = {}
        self._arrivals: dict[str, Tensor] = {}  # since the momentum was used last; as tensors, which are saved

    def require_parameters(self, parameters: Mapping[str, Sequence[int]]) -> None:
        """Any will do."""

    @torch.no_grad()
    def step(self, name: str, master: Tensor, mean: Tensor) -> None:
        if name not in self._momenta:
            self._momenta[name] = torch.zeros_like(master)
            self._sums[name] = torch.zeros_like(master)
            self._arrivals[name] = torch.zeros((), dtype=torch.int64)
        arrivals = self._arrivals[name].add_(1)
        is_full = bool(arrivals == self.every)
        room = torch.empty(min(_PIECE, master.numel()))
        for value, target, momentum, total in _pieces(master, mean, self._momenta[name], self._sums[name]):
            total.add_(torch.sub(value, target, out=room[: value.numel()]))
            _move_towards(value, target, self.lr / self.every)
            if is_full:
                momentum.mul_(self.momentum).add_(total, alpha=1 / self.every)
                value.sub_(momentum, alpha=self.lr * self.momentum)
                total.zero_()
        if is_full:
            arrivals.zero_()

    def state_tensors(self) -> dict[str, Tensor]:
        kinds = {"momentum": self._momenta, "sum": self._sums, "arrivals": self._arrivals}
        return {f"{name}.{kind}": tensor for kind, tensors in kinds.items() for name, tensor in tensors.items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        kinds = _by_kind(tensors, ("momentum", "sum", "arrivals"), self.describe())
        self._momenta, self._sums, self._arrivals = kinds["momentum"], kinds["sum"], kinds["arrivals"]

    @property
    def num_states(self) -> int:
        return 2

    def describe(self) -> str:
        return f"SGD, lr {self.lr:g}, delayed Nesterov momentum {self.momentum:g} every {self.every} arrivals"


class TorchOuter:
    """Any optimizer with the interface of `torch.optim`, given as a class or as text: "torch.optim.AdamW".

    Each tensor is stepped by an optimizer of its own, which lives for that step; only the state stays.
    """

    def __init__(self, optimizer: str | type[torch.optim.Optimizer], **arguments: Any) -> None:
        self.optimizer = _found(optimizer) if isinstance(optimizer, str) else optimizer
        self.arguments = arguments
        self._states: dict[str, dict[str, Tensor]] = {}
        self.num_states = 0
        self._try_it()

    def _try_it(self) -> None:
        """Make two steps with a small matrix, so that what would fail in a round fails now."""
        name, master = "", torch.ones(2, 2)
        try:
            for _ in range(2):
                self.step(name, master, torch.zeros(2, 2))
        except (TypeError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"{self.describe()} cannot be the outer optimizer: {error}",
                fix="torch.optim.SGD with lr 0.7, momentum 0.9, nesterov true",
            ) from error
        self.num_states = sum(state.shape == master.shape for state in self._states.pop(name).values())

    def require_parameters(self, parameters: Mapping[str, Sequence[int]]) -> None:
        for name, shape in parameters.items():
            try:
                self.optimizer([nn.Parameter(torch.empty(*shape, device="meta"))], **self.arguments)
            except (TypeError, ValueError) as error:
                raise ConfigError(
                    f"{self.describe()} refuses {name} of shape {list(shape)}: {error}",
                    fix="an optimizer for all shapes, as torch.optim.SGD is",
                ) from error

    def step(self, name: str, master: Tensor, mean: Tensor) -> None:
        parameter = nn.Parameter(master)
        parameter.grad = torch.sub(master, mean, out=mean)
        optimizer = self.optimizer([parameter], **self.arguments)
        if name in self._states:
            optimizer.state[parameter] = self._states[name]
        optimizer.step()
        state = {key: each for key, each in optimizer.state[parameter].items() if each is not None}
        strange = [key for key, each in state.items() if not isinstance(each, Tensor)]
        if strange:
            raise TypeError(f"it keeps {', '.join(strange)}, which are no tensors and could not be saved")
        self._states[name] = state

    def state_tensors(self) -> dict[str, Tensor]:
        return {f"{name}.{key}": tensor for name, state in self._states.items() for key, tensor in state.items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        probe = TorchOuter(self.optimizer, **self.arguments)
        probe.step("probe", torch.ones(2, 2), torch.zeros(2, 2))
        known = tuple(key.removeprefix("probe.") for key in probe.state_tensors())
        kinds = _by_kind(tensors, known, self.describe())
        names = dict.fromkeys(name.rpartition(".")[0] for name in tensors)
        self._states = {name: {key: kinds[key][name] for key in known} for name in names}

    def describe(self) -> str:
        given = "".join(f", {key} {value}" for key, value in sorted(self.arguments.items()))
        return f"{self.optimizer.__module__}.{self.optimizer.__qualname__}{given}"


def staleness_weight(staleness: int) -> float:
    """The weight of a contribution that began `staleness` versions ago: 1 / sqrt(1 + staleness) (arXiv:1903.03934)."""
    assert staleness >= 0, "nobody begins with a version that is still to come"
    return float((1 + staleness) ** -0.5)


def _move_towards(value: Tensor, target: Tensor, weight: float) -> None:
    if weight == 1:
        value.copy_(target)  # an interpolation would make 0.0 of -0.0
    else:
        value.lerp_(target, weight)


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same stretch of each, one after another; they are views."""
    rows = [tensor.view(-1) for tensor in tensors]
    yield from zip(*(torch.split(row, _PIECE) for row in rows), strict=True)


def _by_kind(tensors: Mapping[str, Tensor], kinds: Sequence[str], optimizer: str) -> dict[str, dict[str, Tensor]]:
    """State tensors as kind: parameter: tensor, all kinds for each parameter or CheckpointError."""
    found: dict[str, dict[str, Tensor]] = {kind: {} for kind in kinds}
    for key, tensor in tensors.items():
        name, _, kind = key.rpartition(".")
        if kind not in kinds:
            raise CheckpointError(
                f"{key} is no state of this outer optimizer ({optimizer})",
                fix="start the server with the outer optimizer that the state was saved with",
            )
        found[kind][name] = tensor
    for kind in kinds:
        missing = {name.rpartition(".")[0] for name in tensors} - found[kind].keys()
        if missing:
            raise CheckpointError(f"the outer optimizer's state of {min(missing)} lacks {kind} ({optimizer})")
    return found


def _found(spec: str) -> type[torch.optim.Optimizer]:
    """The class that `spec` names: `torch.optim.AdamW`, or `AdamW` for short."""
    module, _, name = spec.rpartition(".")
    try:
        found: Callable[..., Any] | None = getattr(import_module(module or "torch.optim"), name, None)
    except ImportError as error:
        raise ConfigError(f"the outer optimizer {spec} cannot be imported: {error}", fix="torch.optim.SGD") from error
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        raise ConfigError(f"{spec} is no optimizer", fix="torch.optim.SGD, or another class of torch.optim")
    return found


def _require_rates(lr: float, momentum: float) -> None:
    if not lr > 0:
        raise ConfigError(f"the outer lr is {lr}", fix="0.7, or 1 for averaging")
    if not 0 <= momentum < 1:
        raise ConfigError(f"the outer momentum is {momentum}", fix="0.9, or 0 for averaging")
