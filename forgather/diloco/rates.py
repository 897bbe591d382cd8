"""The rates of the outer optimizer, which an operator may change: in force, as they were given, and as they are saved.

A server that is started again goes on with the rates that were in force, unless it is given others than it was before.
"""

from collections.abc import Mapping
from typing import Any

from forgather.errors import ConfigError

NAMES = ("lr", "momentum")


class Rates:
    """`lr` and `momentum` of `outer`, as far as it has them. They change between its steps, when `apply` is called."""

    def __init__(self, outer: Any) -> None:
        self._outer = outer
        self.given = self.in_force
        self._next: dict[str, float] = {}

    @property
    def in_force(self) -> dict[str, float]:
        """What a step that is made now is made with."""
        return {name: float(getattr(self._outer, name)) for name in NAMES if hasattr(self._outer, name)}

    def require(self, **rates: float) -> None:
        """ConfigError unless the outer optimizer has these, and they mean something."""
        for name, rate in rates.items():
            if not hasattr(self._outer, name):
                raise ConfigError(f"{self._outer.describe()} has no {name}", fix="restart the server with another")
            _require_rate(name, rate)

    def change(self, **rates: float) -> None:
        """Have them from the next `apply` on."""
        self._next |= rates

    def apply(self) -> None:
        """No step is being made: what was changed is in force."""
        self._set(self._next)
        self._next.clear()

    def put(self, rates: Mapping[str, float]) -> dict[str, float]:
        """Have these in force, as for a version that is made again; returns those that were."""
        before = self.in_force
        self._set(rates)
        return before

    def state_dict(self) -> dict[str, Any]:
        return {"given": dict(self.given), "in_force": self.in_force | self._next, "optimizer": self._outer.describe()}

    def load_state_dict(self, state: Mapping[str, Any]) -> list[str]:
        """Go on with what was saved, before the optimizer takes its state; says in words what is not as it was."""
        if state["given"] != self.given or not self.given:
            is_same = self._outer.describe() == state["optimizer"]
            return [] if is_same else [f"the outer optimizer is {self._outer.describe()}; it was {state['optimizer']}"]
        self._set(state["in_force"])
        return [
            f"outer_{name} is {rate:g}, as it was set; the flag says {self.given[name]:g}"
            for name, rate in self.in_force.items()
            if rate != self.given[name]
        ]

    def _set(self, rates: Mapping[str, float]) -> None:
        for name, rate in rates.items():
            if hasattr(self._outer, name):
                setattr(self._outer, name, rate)


def _require_rate(name: str, rate: float) -> None:
    is_number = isinstance(rate, int | float) and not isinstance(rate, bool)
    if name == "lr" and not (is_number and 0 < rate < float("inf")):
        raise ConfigError(f"outer_lr is {rate!r}", fix="outer_lr: 0.7, or 1 for averaging")
    if name == "momentum" and not (is_number and 0 <= rate < 1):
        raise ConfigError(f"outer_momentum is {rate!r}", fix="outer_momentum: 0.9, or 0 for averaging")
