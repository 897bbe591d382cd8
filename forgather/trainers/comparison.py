"""Whether two recordings of the same steps agree, and where they first do not.

The readings are those of `trainers.recording`: whole tensors, so it does not matter how each was spread.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np

from forgather.trainers.recording import Array, Kind, Reading

# A tensor whose gradient is this small beside the whole gradient may be rounding alone: that of a key's bias, say,
# which the softmax cancels. Optimizers that divide by the gradient's own size make steps of it as long as any other's.
NOISE = 1e-6
# A gradient that is smaller than this part of the whole is measured against this part of it.
SMALL = 1e-3
# Copies of one tensor come of the same arithmetic; this allows a device that adds in any order.
_REPLICA_TOLERANCE = 1e-6
# Within a step, in the order in which it makes them.
_ORDER: tuple[Kind, ...] = ("targets", "loss", "gradient", "grad_norm", "parameter")


@dataclass(frozen=True)
class Difference:
    """How far the plans are apart in one value; `size` is relative, infinite where there is nothing to compare."""

    step: int
    kind: Kind
    name: str
    size: float
    note: str = ""

    @property
    def what(self) -> str:
        return f"{self.kind} {self.name}".rstrip()


@dataclass
class StepComparison:
    """How far the plans are apart in one step; step 0 is before the first."""

    step: int
    scalars: dict[Kind, tuple[float, float]] = field(default_factory=dict)  # the values of both plans
    worst: dict[Kind, Difference] = field(default_factory=dict)  # the largest of each kind
    beyond: list[Difference] = field(default_factory=list)  # those beyond tolerance, in the order of the step
    noise: list[str] = field(default_factory=list)  # parameters that are not judged: their gradients are rounding


class Comparison:
    """Judges the readings of two plans, given in the same order; keeps no tensor.

    A scalar's difference is relative to its value, a tensor's is the 2-norm of the difference relative to the 2-norm of
    the tensor. `tolerance` is for losses and gradient norms, `tensor_tolerance` for gradients and parameters: an
    optimizer that divides by the gradient's size turns rounding in small elements into larger steps, and training
    makes small differences grow.
    """

    def __init__(self, tolerance: float = 1e-5, tensor_tolerance: float = 1e-3) -> None:
        self.tolerance = tolerance
        self.tensor_tolerance = tensor_tolerance
        self._largest_share: dict[str, float] = {}  # of a tensor's gradient in the whole gradient, over all steps

    def compare(self, a: Iterable[Reading], b: Iterable[Reading]) -> Iterator[StepComparison]:
        """One comparison a step."""
        for step, pairs in groupby(zip(a, b, strict=True), key=lambda pair: pair[0].step):
            yield self.judge(step, pairs)

    def judge(self, step: int, pairs: Iterable[tuple[Reading, Reading]]) -> StepComparison:
        """Compare all that was read of one step; each pair is looked at once."""
        done = StepComparison(step)
        measured = [_measure(a, b) for a, b in pairs]
        whole = math.sqrt(sum(each.norm**2 for each in measured if each.kind == "gradient"))
        for each in sorted(measured, key=lambda each: _ORDER.index(each.kind)):
            if each.scalars is not None:
                done.scalars[each.kind] = each.scalars
            if self._is_noise(each, whole):
                done.noise += [each.name] if each.kind == "parameter" else []
                continue
            scale = max(each.norm, SMALL * whole) if each.kind == "gradient" else each.norm
            size = 0.0 if each.apart == 0 else each.apart / scale if scale > 0 else math.inf
            found = Difference(step, each.kind, each.name, size, each.note)
            if each.kind not in done.worst or not size <= done.worst[each.kind].size:
                done.worst[each.kind] = found
            if not size <= self._tolerance_of(each.kind):
                done.beyond.append(found)
        return done

    def _is_noise(self, measured: "_Measured", whole: float) -> bool:
        """Whether rounding is all there is to a gradient, or has been all that has moved a parameter."""
        if measured.kind == "gradient" and whole > 0:
            share = measured.norm / whole
            self._largest_share[measured.name] = max(self._largest_share.get(measured.name, 0.0), share)
            return share < NOISE
        return measured.kind == "parameter" and self._largest_share.get(measured.name, 1.0) < NOISE

    def _tolerance_of(self, kind: Kind) -> float:
        if kind in ("gradient", "parameter"):
            return self.tensor_tolerance
        return 0.0 if kind == "targets" else self.tolerance


@dataclass(frozen=True)
class _Measured:
    """What is kept of a pair of readings."""

    kind: Kind
    name: str
    norm: float
    apart: float
    note: str = ""
    scalars: tuple[float, float] | None = None


def _measure(a: Reading, b: Reading) -> _Measured:
    assert (a.step, a.kind, a.name) == (b.step, b.kind, b.name), f"{a.kind} {a.name} beside {b.kind} {b.name}"
    if a.value is None or b.value is None:
        present = a if a.value is not None else b
        if present.value is None or not present.value.any():
            return _Measured(a.kind, a.name, 0.0, 0.0)
        return _Measured(a.kind, a.name, 1.0, math.inf, f"plan {'B' if b.value is None else 'A'} has none")
    if a.value.shape != b.value.shape:
        return _Measured(a.kind, a.name, 1.0, math.inf, f"shapes {list(a.value.shape)} and {list(b.value.shape)}")
    if not a.name:
        left, right = float(a.value), float(b.value)
        return _Measured(a.kind, "", abs(left), abs(left - right), scalars=(left, right))
    norm = max(_norm(a.value), _norm(b.value))
    for plan, reading in (("A", a), ("B", b)):
        if not reading.replicas <= _REPLICA_TOLERANCE * norm:
            note = f"ranks of plan {plan} hold different copies"
            return _Measured(a.kind, a.name, norm, reading.replicas, note)
    return _Measured(a.kind, a.name, norm, _norm(a.value - b.value))


def _norm(values: Array) -> float:
    return float(np.linalg.norm(values.ravel().astype(np.float64)))
