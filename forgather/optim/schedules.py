"""Learning-rate schedules: a factor of the peak rate for each step, along the steps made or the tokens trained on.

    schedule: !singleton:forgather.optim.schedules:warmup_stable_decay
      length: null                                  # null: decays when told to, by `forgather control decay RUN`
      warmup: 1000000
      decay: 50000000
      tokens_per_step: ${data.tokens_per_step}      # lengths are in tokens; without this key in steps

Most of a schedule is a pure function (`optim.shapes`), so a changed one holds from the first step after a resume. What
a run has to remember is in its state: how many tokens it has trained on, which today's batch size does not tell, and
where a decay was begun by a command.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from forgather.errors import ConfigError
from forgather.optim.shapes import Curve, Shape, cosine, curve_named, fall, rise


@dataclass(frozen=True)
class Decay:
    """The last part of a schedule: from what the rate is at `start` down to `final`, over `length`."""

    length: int
    final: float
    curve: Curve
    start: int | None = None  # None: only a command starts it


class Schedule:
    """`schedule(step)` is the factor of the peak rate for step number `step`, counted from 0.

    `shape` is followed until `decay` begins: where it says, or earlier by a command. Lengths are in steps, or in tokens
    where `tokens_per_step` says how many a step of today has. Any function of the step may stand in its place.
    """

    def __init__(
        self, shape: Shape, description: str, *, decay: Decay | None = None, tokens_per_step: int | None = None
    ) -> None:
        self.shape = shape
        self.description = description
        self.decay = decay
        self.tokens_per_step = tokens_per_step
        self.next_step = 0
        self._known = (0, 0)  # a step, and what was done before it
        self._commanded: int | None = None  # what was done when a command began the decay

    def __call__(self, step: int) -> float:
        self.next_step = step + 1
        return self.factor(self.done_before(step + 1))

    def factor(self, done: int) -> float:
        """The factor where `done` steps or tokens are done."""
        if self.decay is None or self.decay_start is None or done <= self.decay_start:
            return self.shape(done)
        first = self.shape(self.decay_start)
        return fall(done, self.decay_start, self.decay.length, first, self.decay.final, self.decay.curve)

    def done_before(self, step: int) -> int:
        """How much is done when step number `step` begins, in the unit of the lengths."""
        known_step, known = self._known
        return known + (step - known_step) * (self.tokens_per_step or 1)

    def on_command(self, command: str) -> str | None:
        """Obey `decay`: the rate falls from the next step on. Returns what is to be said of it.

        None for a command that is not for a schedule. Every rank calls it between the same two steps.
        """
        if command != "decay":
            return None
        refusal = self.refusal("decay")
        if refusal is None and self.decay is not None:
            self._commanded = self.done_before(self.next_step)
            return f"the learning rate decays over the next {self.decay.length:,} {self.unit}"
        return refusal

    def refusal(self, command: str) -> str | None:
        """Why `command` would change nothing now; None where it would, or is not for a schedule."""
        if command != "decay":
            return None
        if self.decay is None:
            return f"the schedule ({self.description}) has no decay to begin; warmup_stable_decay and infinite have one"
        start = self.decay_start
        if start is not None and start <= self.done_before(self.next_step):
            return f"the learning rate decays already, since {start:,} {self.unit}"
        return None

    @property
    def decay_start(self) -> int | None:
        """Where the decay begins or has begun; None while that is not known."""
        by_itself = None if self.decay is None else self.decay.start
        return min((start for start in (self._commanded, by_itself) if start is not None), default=None)

    @property
    def end(self) -> int | None:
        """The number of steps after which a commanded decay is over, and with it the run; None without a command.

        Steps of this schedule: those that a run has left out are not among them.
        """
        if self.decay is None or self._commanded is None:
            return None
        step, done = self._known
        return step - (done - self._commanded - self.decay.length) // (self.tokens_per_step or 1)

    @property
    def unit(self) -> str:
        return "steps" if self.tokens_per_step is None else "tokens"

    def state_dict(self) -> dict[str, Any]:
        """Where the run stands, and where a command began the decay, in steps and in tokens where these are counted."""
        return {"step": self.next_step, **self._in_units("done", self.done_before(self.next_step))} | (
            {} if self._commanded is None else {"decay": self._in_units("start", self._commanded)}
        )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state. One that counted no tokens is taken to have had today's number in each of its steps."""
        self.next_step = state["step"]
        self._known = (self.next_step, self._from_units("done", state))
        decay = state.get("decay")
        # A schedule that has no decay today was given by today's configuration, which wins.
        self._commanded = None if decay is None or self.decay is None else self._from_units("start", decay)

    def describe(self) -> str:
        """One line: the shape, its lengths and their unit."""
        return f"{self.description}, in {self.unit}"

    def _in_units(self, key: str, done: int) -> dict[str, int]:
        if self.tokens_per_step is not None:
            known_step, known = self._known
            return {f"{key}_steps": known_step + (done - known) // self.tokens_per_step, f"{key}_tokens": done}
        return {f"{key}_steps": done}

    def _from_units(self, key: str, state: Mapping[str, Any]) -> int:
        if self.tokens_per_step is None:
            return int(state[f"{key}_steps"])
        return int(state.get(f"{key}_tokens", state[f"{key}_steps"] * self.tokens_per_step))


def constant(*, warmup: int = 0, tokens_per_step: int | None = None) -> Schedule:
    """A linear rise over `warmup`, then 1."""
    _check(warmup=warmup)
    return Schedule(partial(rise, warmup=warmup), f"constant after warm-up {warmup:,}", tokens_per_step=tokens_per_step)


def warmup_cosine(*, length: int, warmup: int = 0, final: float = 0.1, tokens_per_step: int | None = None) -> Schedule:
    """A linear rise over `warmup`, then half a cosine down to `final` at `length` and ever after."""
    _check(length, warmup=warmup)

    def shape(done: int) -> float:
        if done <= warmup or length == warmup:
            return rise(done, warmup)
        return fall(done, warmup, length - warmup, 1.0, final, cosine)

    return Schedule(shape, f"warm-up {warmup:,}, cosine to {final:g} at {length:,}", tokens_per_step=tokens_per_step)


def warmup_stable_decay(
    *,
    length: int | None,
    decay: int,
    warmup: int = 0,
    final: float = 0.0,
    curve: str = "linear",
    tokens_per_step: int | None = None,
) -> Schedule:
    """A linear rise over `warmup`, 1 until `decay` before `length`, then along `curve` down to `final`.

    The stable part can be prolonged at will: only the decay depends on the length (Hu et al., MiniCPM, 2024, section
    4). With `length` null it lasts until a command ends it. `curve` is a name in `optim.shapes.CURVES`.
    """
    _check(length, warmup=warmup, decay=decay)
    start = None if length is None else length - decay
    when = "on command" if start is None else f"at {start:,}"
    return Schedule(
        partial(rise, warmup=warmup),
        f"warm-up {warmup:,}, stable, {curve} decay over {decay:,} to {final:g} {when}",
        decay=Decay(_above_zero("decay", decay), final, curve_named(curve, final), start),
        tokens_per_step=tokens_per_step,
    )


def infinite(
    *,
    warmup: int,
    cooldown: int,
    decay: int,
    level: float = 0.5,
    final: float = 0.01,
    decay_from: int | None = None,
    curve: str = "exponential",
    tokens_per_step: int | None = None,
) -> Schedule:
    """A rise over `warmup`, a cosine over `cooldown` down to `level`, and that until a decay over `decay` to `final`.

    It knows no length: a run at the constant rate can go on with new data for ever, and be brought to an end from any
    point, at `decay_from` or by a command (Ibrahim et al., Simple and scalable strategies to continually pre-train
    large language models, 2024, section 7). Without a cooldown the level is the peak.
    """
    _check(warmup=warmup, cooldown=cooldown, decay=decay)
    if decay_from is not None and decay_from < warmup + cooldown:
        raise ConfigError(
            f"the decay begins at {decay_from:,}, but warm-up and cooldown end at {warmup + cooldown:,}",
            fix=f"let decay_from be {warmup + cooldown} or more, or null for a command",
        )
    level = level if cooldown > 0 else 1.0

    def shape(done: int) -> float:
        if done <= warmup or cooldown == 0:
            return rise(done, warmup)
        return fall(done, warmup, cooldown, 1.0, level, cosine)

    when = "on command" if decay_from is None else f"at {decay_from:,}"
    return Schedule(
        shape,
        f"warm-up {warmup:,}, cooldown {cooldown:,} to {level:g}, {curve} decay over {decay:,} to {final:g} {when}",
        decay=Decay(_above_zero("decay", decay), final, curve_named(curve, final), decay_from),
        tokens_per_step=tokens_per_step,
    )


def _check(length: int | None = None, **parts: int) -> None:
    for name, count in parts.items():
        if count < 0:
            raise ConfigError(f"the schedule's {name} is {count}", fix="use a number from 0")
    if length is not None and sum(parts.values()) > length:
        asked = " + ".join(f"{name} {count:,}" for name, count in parts.items())
        raise ConfigError(
            f"the schedule has {asked}, but its length is {length:,}",
            fix=f"lower {' or '.join(parts)}, or raise the length (of the run: steps)",
        )


def _above_zero(name: str, count: int) -> int:
    if count < 1:
        raise ConfigError(
            f"the schedule's {name} is {count}", fix="use a number from 1; a schedule without is `constant`"
        )
    return count
