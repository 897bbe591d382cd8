"""What can be asked of a run from outside, and what its ranks have agreed to do at the end of a step."""

from dataclasses import dataclass
from enum import Enum


class Command(Enum):
    """A wish that any process of the run can receive; all ranks obey it at the end of one and the same step."""

    SAVE = "save"  # write a checkpoint and go on
    STOP = "stop"  # end after the step, with the usual final save
    SAVE_STOP = "save-stop"  # the same, and whoever asked is answered when the checkpoint is on the disk
    ABORT = "abort"  # end after the step, and save nothing
    DECAY = "decay"  # let the learning rate's schedule begin its decay


@dataclass(frozen=True)
class Orders:
    """What is done at the end of this step, the same on every rank."""

    save: bool = False
    stop: bool = False
    abort: bool = False
    decay: bool = False

    @classmethod
    def of(cls, commands: "frozenset[Command] | set[Command]") -> "Orders":
        """What these commands come to together."""
        return cls(
            save=not commands.isdisjoint({Command.SAVE, Command.SAVE_STOP}),
            stop=not commands.isdisjoint({Command.STOP, Command.SAVE_STOP}),
            abort=Command.ABORT in commands,
            decay=Command.DECAY in commands,
        )
