"""What a worker tells its server with each heartbeat, and what it hears: how fast it trains, and what it is to do."""

import time

from forgather.diloco.presence import STRENGTH, Beat, Command, Heartbeat


class Pace:
    """How fast steps are made while the worker trains: from `step_ended` to `step_begins` it may wait for others.

    A worker that waits for slower ones would else seem to be as slow as they are. Its first step is not measured: there
    things are compiled.
    """

    def __init__(self) -> None:
        self._begun_at: float | None = None
        self._made = (0, 0.0)  # steps, and the seconds of training that they took; one object, as threads look at it
        self._asked = self._made  # when this was asked last
        self._steps_per_s: float | None = None

    def step_begins(self) -> None:
        self._begun_at = time.monotonic()

    def step_ended(self) -> None:
        if self._begun_at is not None:
            steps, seconds = self._made
            self._made = steps + 1, seconds + time.monotonic() - self._begun_at

    def steps_per_s(self) -> float | None:
        """Of the steps since this was asked last; where there were none, what it was then."""
        (steps, seconds), (steps_before, seconds_before) = self._made, self._asked
        if steps > steps_before:
            self._steps_per_s = (steps - steps_before) / max(1e-9, seconds - seconds_before)
            self._asked = steps, seconds
        return self._steps_per_s


class Pulse:
    """Heartbeats as the worker sees them: the training thread writes what they tell, their thread what was heard."""

    def __init__(self, tokens_per_step: int) -> None:
        self.pace = Pace()
        self.steps = 0
        self.loss: float | None = None
        self.command: Command | None = None  # the strongest that was heard
        self._heard = 0  # its number
        self._tokens_per_step = tokens_per_step

    def tell(self) -> Heartbeat:
        steps_per_s = self.pace.steps_per_s()
        tokens_per_s = None if steps_per_s is None else steps_per_s * self._tokens_per_step
        return Heartbeat(self.steps, steps_per_s, tokens_per_s, self.loss, self._heard)

    def hear(self, beat: Beat) -> bool:
        """Note what the server wants, which it says until it is told that this was heard; whether that is new."""
        if beat.command is None or beat.number == self._heard:
            return False
        self._heard = beat.number
        self.command = max(self.command, beat.command, key=STRENGTH.index)
        return True

    @property
    def is_called_off(self) -> bool:
        """Whether the server wants it to end now: what it waits for may never come."""
        return self.command in ("stop", "abort")

    def take_save(self) -> bool:
        """Whether the server has asked for a save since this was asked last."""
        is_wanted = self.command == "save"
        if is_wanted:
            self.command = None
        return is_wanted
