"""What happens in a run, and the hooks that are told.

A hook is any object that has some of these; it inherits nothing:

    on_start(event: Started)           the run begins or goes on
    on_step_end(event: StepEnded)      a step was made
    on_logged(event: Logged)           the metrics of the steps since the last log were reported
    on_evaluated(event: Evaluated)     the validation data were evaluated
    on_saved(event: Saved)             a checkpoint is whole and on the disk
    on_ending(event: Ending)           the run ends with this step, which is not saved yet
    on_finish(event: Finished)         the last step of this process was made and saved
    metrics() -> {name: number}        asked at a log step; logged as `<hook>/<name>`
    wants_save() -> bool               asked after each step; the run saves when any rank's answer is true
    wants_stop() -> bool               asked after each step; the run saves and ends when any rank's answer is true
    wants_abort() -> bool              asked after each step; the run ends without a save when any rank's answer is true
    state_dict(), load_state_dict()    saved with the run, under the hook's name
    __enter__(), __exit__()            around the whole run, also one that fails

What every run needs (logging, evaluation, checkpoints) is in the loop itself and no hook. Hooks are called on every
rank, in the order of the config. An event method that is misspelt is refused: it would never be called.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from difflib import get_close_matches
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from forgather.distributed.collectives import max_ranks
from forgather.errors import ConfigError
from forgather.metrics.step_result import StepResult


class Outcome(Enum):
    """How a run ended."""

    FINISHED = "finished"
    STOPPED = "stopped"  # a hook, a signal or a command asked for it; the same command continues the run
    ABORTED = "aborted"  # a hook or a command asked for it; nothing was saved
    NOTHING_TO_DO = "nothing to do"


@dataclass(frozen=True)
class Started:
    """`step` steps are behind the run: 0, or those of the checkpoint that it goes on from; it is to have `steps`."""

    step: int
    steps: int


@dataclass(frozen=True)
class StepEnded:
    """`step` steps have been made; `result` is this rank's account of the last one, on the device.

    `is_stopping`: a signal or a command ends the run with this step, and there may be seconds left for the save.
    """

    step: int
    result: StepResult
    is_stopping: bool = False


@dataclass(frozen=True)
class Logged:
    """A row of training metrics was reported; they are the same on every rank, if the hooks' are."""

    step: int
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Evaluated:
    step: int
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Saved:
    step: int
    path: Path


@dataclass(frozen=True)
class Ending:
    """The run ends with this step, in order; whatever changes its state now is in the checkpoint.

    `is_finished`: all its steps are made; then this comes before the last log and evaluation. Else the run goes on some
    day. `is_stopping`: a signal or a command ends it, and there may be seconds left for the save.
    """

    step: int
    is_finished: bool
    is_stopping: bool = False


@dataclass(frozen=True)
class Finished:
    step: int
    outcome: Outcome


Event = Started | StepEnded | Logged | Evaluated | Saved | Ending | Finished

_METHODS: dict[type[Event], str] = {
    Started: "on_start",
    StepEnded: "on_step_end",
    Logged: "on_logged",
    Evaluated: "on_evaluated",
    Saved: "on_saved",
    Ending: "on_ending",
    Finished: "on_finish",
}


_WISHES: tuple[Outcome | Literal["save"] | None, ...] = (
    None,
    "save",
    Outcome.STOPPED,
    Outcome.ABORTED,
)  # the later one is in force; whoever stops saves too


class Hooks:
    """The hooks of a run by name; a name with None is a hook that a config has taken out."""

    def __init__(self, hooks: Mapping[str, Any | None]) -> None:
        self.hooks = {name: hook for name, hook in hooks.items() if hook is not None}
        for name, hook in self.hooks.items():
            _refuse_unknown_events(name, hook)
        self._listeners: dict[type[Event], list[Callable[[Any], None]]] = {
            kind: [getattr(hook, method) for hook in self.hooks.values() if hasattr(hook, method)]
            for kind, method in _METHODS.items()
        }
        self._metrics = {name: hook.metrics for name, hook in self.hooks.items() if hasattr(hook, "metrics")}
        asked = (("wants_abort", Outcome.ABORTED), ("wants_stop", Outcome.STOPPED), ("wants_save", "save"))
        self._wishes = [
            (getattr(hook, method), wish)
            for method, wish in asked
            for hook in self.hooks.values()
            if hasattr(hook, method)
        ]
        self._open = ExitStack()

    def tell(self, event: Event) -> None:
        """Call the hooks that have a method for this event. That the run has ended each hears, though one raises."""
        failure: Exception | None = None
        for listener in self._listeners[type(event)]:
            try:
                listener(event)
            except Exception as error:
                if not isinstance(event, Finished):
                    raise
                failure = failure or error
        if failure is not None:
            raise failure

    def metrics(self) -> dict[str, float]:
        """What the hooks measure, each name behind its hook's."""
        return {f"{hook}/{name}": value for hook, ask in self._metrics.items() for name, value in ask().items()}

    def wish(self) -> Outcome | Literal["save"] | None:
        """What a hook on any rank wants, the same on all ranks: an abort before a stop before a save alone.

        Costs a collective only where a hook can want something.
        """
        if not self._wishes:
            return None
        mine = next((wish for ask, wish in self._wishes if ask()), None)
        return _WISHES[max_ranks(_WISHES.index(mine))]

    def with_state(self) -> dict[str, Any]:
        """The hooks that are saved with the run."""
        return {name: hook for name, hook in self.hooks.items() if hasattr(hook, "state_dict")}

    def __enter__(self) -> Self:
        # What has been entered is left again when a later one cannot be: nobody calls __exit__ then.
        with ExitStack() as entered:
            for hook in self.hooks.values():
                if hasattr(hook, "__enter__"):
                    entered.enter_context(hook)
            self._open = entered.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self._open.__exit__(kind, value, tb)


def _refuse_unknown_events(name: str, hook: object) -> None:
    known = list(_METHODS.values())
    for attribute in dir(hook):
        if attribute.startswith("on_") and attribute not in known and callable(getattr(hook, attribute)):
            near = get_close_matches(attribute, known, n=1)
            raise ConfigError(
                f"hook {name!r}: there is no event for {type(hook).__name__}.{attribute}",
                fix=f"did you mean {near[0]}?" if near else f"events are {', '.join(known)}",
            )
