"""When something that is done again and again in a run is done: a function of the step, so a resume shifts nothing."""

from math import floor
from typing import Literal

from forgather.errors import ConfigError

Every = int | Literal["epoch"] | None


class Interval:
    """Due at steps `every`, 2 `every`, ...; with `epoch` at the step that ends a pass over the data; with None never.

    With `first`, due at that step first and then every so many. `steps_per_epoch` need not be whole. `name` is what the
    config calls it, for the ConfigError that anything else as `every` gives.
    """

    def __init__(
        self, name: str, every: Every, *, first: int | None = None, steps_per_epoch: float | None = None
    ) -> None:
        is_count = isinstance(every, int) and not isinstance(every, bool)
        if (is_count and every < 1) or not (is_count or every is None or every == "epoch"):  # type: ignore[operator]
            raise ConfigError(f"{name} is {every!r}", fix="use a number of steps from 1, epoch, or null for never")
        if every == "epoch" and steps_per_epoch is None:
            raise ConfigError(f"{name} is epoch, but what it belongs to counts steps", fix="use a number of steps")
        if first is not None and first < 1:
            raise ConfigError(f"the first step of {name} is {first}", fix="count steps from 1")
        self.every = every
        self.first = first
        self.steps_per_epoch = steps_per_epoch

    def is_due(self, step: int) -> bool:
        """Whether it is done when `step` steps have been made."""
        if self.every is None or (self.first is not None and step < self.first):
            return False
        if self.every == "epoch":
            assert self.steps_per_epoch is not None, "checked when it was made"
            return floor(step / self.steps_per_epoch) > floor((step - 1) / self.steps_per_epoch)
        return (step - (self.first or self.every)) % self.every == 0
