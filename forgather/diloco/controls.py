"""What an operator may do to a running server: POST /v1/control/ACTION."""

from typing import TYPE_CHECKING, Any, cast

from forgather.diloco.frame import ProtocolError
from forgather.diloco.presence import Command
from forgather.errors import ConfigError

if TYPE_CHECKING:
    from forgather.diloco.coordinator import Coordinator

_OUTER = {"outer_lr": "lr", "outer_momentum": "momentum"}
_OF_SHARED_ROUNDS = ("min_workers", "round_timeout_s")
_NUMBERS = ("round_timeout_s", "min_workers", "num_workers")


class Controls:
    """The actions on one coordinator, on its event loop."""

    def __init__(self, coordinator: "Coordinator") -> None:
        self._there = coordinator

    async def save(self) -> int:
        """Save now; returns the step. Nothing is written where nothing is new."""
        return await self._there.publisher.save()

    def drain(self) -> None:
        """Take nobody in any more, tell all workers to send what they have, save and stop; end when they have left.

        What they have brought is still counted, as far as rounds can be closed with it.
        """
        self._there.draining = True
        self._there.rounds.nobody_else_comes()
        self._there.members.command(None, "drain")
        self._there.wake()

    def kick(self, worker: str) -> None:
        """Take a worker out at once, with what it has sent for open rounds; its process is told to stop."""
        there = self._there
        there.members.remove(worker, "kicked")
        there.rounds.removed(worker)
        for held in there.intake.drop_all_of(worker):
            if there.ledger is not None:
                there.ledger.refuse(worker, held.consumed)
        there.gone(worker, "was removed by the operator")

    def set(self, **values: float) -> dict[str, Any]:
        """Change `outer_lr`, `outer_momentum`, `round_timeout_s`, `min_workers` or `num_workers`, from the next round.

        ConfigError for anything else, and for what changes nothing on this server; nothing is changed then.
        """
        outer = {_OUTER[name]: value for name, value in values.items() if name in _OUTER}
        numbers = {name: value for name, value in values.items() if name in _NUMBERS}
        unknown = sorted(set(values) - set(_OUTER) - set(numbers))
        if not values or unknown:
            raise ConfigError(
                f"cannot set {', '.join(unknown) or 'nothing'}", fix=f"one or more of {', '.join((*_OUTER, *_NUMBERS))}"
            )
        there = self._there
        idle = [name for name in _OF_SHARED_ROUNDS if name in numbers]
        if idle and there.settings.mode == "async":
            raise ConfigError(
                f"{' and '.join(idle)} would change nothing: with --async each contribution is a round of its own",
                fix="leave it out; num_workers, outer_lr and outer_momentum can be set",
            )
        there.publisher.rates.require(**outer)
        there.rounds.change(**numbers)  # type: ignore[arg-type]  # it looks at the kinds itself
        there.publisher.set_outer(**outer)
        there.wake()
        return dict(values)

    def command(self, worker: str | None, command: str) -> list[str]:
        """Relay `save`, `stop` or `abort` with the next heartbeat of a worker, or of all; returns whom it reaches."""
        if command not in ("save", "stop", "abort"):
            raise ProtocolError(f"there is no command {command[:40]!r}", fix="save, stop or abort")
        return self._there.members.command(worker, cast(Command, command))
