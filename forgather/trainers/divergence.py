"""Ends a run whose loss has left its way: a short mean of it has risen far above a long one."""

import math
from collections import deque
from collections.abc import Mapping
from typing import Any, Literal, Protocol

from forgather.errors import ConfigError, TrainingError
from forgather.trainers.events import Evaluated, Finished, Logged


class Means(Protocol):
    """Two running means of a loss: `MovingMeans` and `WindowMeans` are such."""

    def add(self, loss: float) -> float | None:
        """Take one more loss; the short mean less the long one, or None as long as there is too little to tell."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...

    def reset(self) -> None: ...


class MovingMeans:
    """Exponential means, in which a new loss counts `short` and `long`; both begin at the first loss."""

    def __init__(self, short: float = 0.1, long: float = 0.01) -> None:
        for name, weight in (("short", short), ("long", long)):
            if not 0 < weight <= 1:
                raise ConfigError(f"the weight {name} of a moving mean is {weight}", fix="use more than 0, at most 1")
        self.weights = (short, long)
        self.reset()

    def reset(self) -> None:
        self.means: list[float] = []

    def add(self, loss: float) -> float | None:
        if not self.means:
            self.means = [loss, loss]
        self.means = [mean + weight * (loss - mean) for mean, weight in zip(self.means, self.weights, strict=True)]
        return self.means[0] - self.means[1]

    def state_dict(self) -> dict[str, Any]:
        return {"means": list(self.means)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.means = [float(mean) for mean in state["means"]]


class WindowMeans:
    """Means over the last `short` and the last `long` losses; there is nothing to tell before there are `long`."""

    def __init__(self, short: int = 10, long: int = 100) -> None:
        if not 0 < short < long:
            raise ConfigError(
                f"the windows of a loss are short {short} and long {long}",
                fix="use short: 10 and long: 100, or the like",
            )
        self.short = short
        self.losses: deque[float] = deque(maxlen=long)

    def reset(self) -> None:
        self.losses.clear()

    def add(self, loss: float) -> float | None:
        self.losses.append(loss)
        if len(self.losses) < (self.losses.maxlen or 0):
            return None
        newest = list(self.losses)[-self.short :]
        return sum(newest) / len(newest) - sum(self.losses) / len(self.losses)

    def state_dict(self) -> dict[str, Any]:
        return {"losses": list(self.losses)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.reset()
        self.losses.extend(float(loss) for loss in state["losses"])


class DivergenceStop:
    """A hook that ends the run when the short mean of a loss is `threshold` nats above the long, or it is no number.

    action: `stop` saves what there is and ends; `abort` ends at once, without a save. Either way the run ends with a
        TrainingError: to start the same command again is not what it needs.
    loss: `train`, the one of each log step, or `evaluation`.
    means: `MovingMeans` by default.

    A run that is continued in spite of it is judged anew, from its next loss on.
    """

    def __init__(
        self,
        *,
        threshold: float = 2.0,
        action: Literal["stop", "abort"] = "stop",
        loss: Literal["train", "evaluation"] = "train",
        means: Means | None = None,
    ) -> None:
        for name, value, known in (("action", action, ("stop", "abort")), ("loss", loss, ("train", "evaluation"))):
            if value not in known:
                raise ConfigError(f"the {name} of a divergence stop is {value!r}", fix=f"use {' or '.join(known)}")
        if not threshold > 0:
            raise ConfigError(f"the threshold of a divergence stop is {threshold}", fix="use some nats, such as 2.0")
        self.threshold = threshold
        self.action = action
        self.loss = loss
        self.means: Means = MovingMeans() if means is None else means
        self.gap = 0.0
        self.found: str | None = None  # what was seen when it diverged

    def on_logged(self, event: Logged) -> None:
        if self.loss == "train":
            self.judge(event.step, event.metrics["loss"])

    def on_evaluated(self, event: Evaluated) -> None:
        if self.loss == "evaluation":
            self.judge(event.step, event.metrics["loss"])

    def judge(self, step: int, loss: float) -> None:
        """Take the loss of a step, the same on every rank."""
        if not math.isfinite(loss):
            self.found = f"the {self.loss} loss of step {step} is {loss}"
            return
        gap = self.means.add(loss)
        self.gap = 0.0 if gap is None else gap
        if self.gap >= self.threshold:
            self.found = (
                f"at step {step} the short mean of the {self.loss} loss is {self.gap:.3f} nats above the long one"
                f" (threshold {self.threshold:g})"
            )

    def metrics(self) -> dict[str, float]:
        return {"gap": self.gap}

    def wants_stop(self) -> bool:
        return self.found is not None and self.action == "stop"

    def wants_abort(self) -> bool:
        return self.found is not None and self.action == "abort"

    def on_finish(self, event: Finished) -> None:
        if self.found is not None:
            raise TrainingError(
                f"the run has diverged and ended after step {event.step}: {self.found}",
                fix="go on from a checkpoint before it with a lower learning rate, a longer warm-up or clipping",
            )

    def state_dict(self) -> dict[str, Any]:
        if self.found is not None:
            self.means.reset()
        return self.means.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.means.load_state_dict(state)
