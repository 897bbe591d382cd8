"""The curves of learning rates: pure functions of how much of a run is done.

`done` is what will be done once the step about to be made is made, in the unit of the lengths beside it: steps, or
tokens. At `done` 0 nothing is, and a warm-up begins at 0; the first step has `done` above 0, so it does something.
"""

import math
from collections.abc import Callable

from forgather.errors import ConfigError

Shape = Callable[[int], float]  # a factor of the peak rate, by what is done
Curve = Callable[[float, float, float], float]  # (progress from 0 to 1, first value, last value) -> value between


def rise(done: int, warmup: int) -> float:
    """A line from 0 to 1 over `warmup`, then 1."""
    return min(1.0, done / warmup) if warmup > 0 else 1.0


def fall(done: int, start: int, length: int, first: float, last: float, curve: Curve) -> float:
    """`first` until `start`, then along `curve` to `last` at `start + length` and ever after."""
    progress = (done - start) / length
    if progress >= 1:
        return last
    return curve(progress, first, last) if progress > 0 else first


def linear(progress: float, first: float, last: float) -> float:
    """A straight line."""
    return first + (last - first) * progress


def cosine(progress: float, first: float, last: float) -> float:
    """Half a cosine: flat at both ends (Loshchilov and Hutter, SGDR, 2017)."""
    return last + (first - last) * (1 + math.cos(math.pi * progress)) / 2


def sqrt(progress: float, first: float, last: float) -> float:
    """Steep at first, then flatter: 1 - sqrt (Hägele et al., Scaling laws beyond fixed durations, 2024, section 4)."""
    return first + (last - first) * math.sqrt(progress)


def inverse(progress: float, first: float, last: float) -> float:
    """A line between the inverses of the rates; `last` must be above 0."""
    return 1 / (progress / last + (1 - progress) / first)


def exponential(progress: float, first: float, last: float) -> float:
    """The same fraction less in every step (Hu et al., MiniCPM, 2024, section 4); `last` must be above 0."""
    return float(first * (last / first) ** progress)


CURVES: dict[str, Curve] = {
    "linear": linear,
    "cosine": cosine,
    "sqrt": sqrt,
    "inverse": inverse,
    "exponential": exponential,
}


def curve_named(name: str, last: float) -> Curve:
    """The curve of that name, for one that ends at `last`; ConfigError where there is none, or none that ends there."""
    if name not in CURVES:
        raise ConfigError(f"there is no curve {name!r} to decay along", fix=f"use {', '.join(CURVES)}")
    if last <= 0 and name in ("inverse", "exponential"):
        raise ConfigError(f"a decay along {name} cannot end at {last:g}", fix="let final be above 0, 0.01 say")
    return CURVES[name]
