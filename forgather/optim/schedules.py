"""Learning-rate schedules: pure functions of the step, as a factor of the optimizer's learning rate.

`step` counts from 0 and is the step about to be made. Nothing is remembered, so a resumed run needs no state, and a
changed schedule holds from the first step after the resume. Bind the numbers in a config:

    schedule: !partial:forgather.optim.schedules:warmup_cosine
      steps: ${steps}
      warmup: 100
"""

import math
from collections.abc import Callable

from forgather.errors import ConfigError

Schedule = Callable[[int], float]


def constant(step: int, *, warmup: int = 0) -> float:
    """A linear rise over `warmup` steps, then 1."""
    return _rise(step, warmup)


def warmup_cosine(step: int, *, steps: int, warmup: int = 0, final: float = 0.1) -> float:
    """A linear rise over `warmup` steps, then half a cosine down to `final` at the last of `steps`."""
    _require_room(steps, warmup=warmup)
    if step < warmup:
        return _rise(step, warmup)
    return final + (1 - final) * (1 + math.cos(math.pi * _progress(step, warmup, steps))) / 2


def warmup_stable_decay(step: int, *, steps: int, decay: int, warmup: int = 0, final: float = 0.0) -> float:
    """A linear rise over `warmup` steps, 1 until `decay` steps before the end, then a line down to `final`.

    The stable part can be prolonged at will: only the last `decay` steps depend on how many `steps` there are
    (Hu et al., MiniCPM, 2024, section 4).
    """
    _require_room(steps, warmup=warmup, decay=decay)
    if step < warmup:
        return _rise(step, warmup)
    return 1 - (1 - final) * _progress(step, steps - decay, steps)


def _rise(step: int, warmup: int) -> float:
    # The first step has a learning rate above zero: it would do nothing otherwise.
    return min(1.0, (step + 1) / warmup) if warmup > 0 else 1.0


def _progress(step: int, start: int, end: int) -> float:
    """From 0 before `start` to 1 at the last step before `end`, and 1 ever after."""
    return min(1.0, max(0.0, (step + 1 - start) / (end - start))) if end > start else 0.0


def _require_room(steps: int, **parts: int) -> None:
    if sum(parts.values()) > steps:
        asked = " + ".join(f"{name} {count}" for name, count in parts.items())
        raise ConfigError(
            f"the schedule has {asked} steps, but the run has {steps}",
            fix=f"lower {' or '.join(parts)}, or raise steps",
        )
