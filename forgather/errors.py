"""One family of errors: each has a message, a next action, and an exit code.

`cli.main` is the one place that turns them into text and a process exit. Anything else that escapes is our own
defect and leaves with a traceback and `EXIT_INTERNAL`.
"""

EXIT_OK = 0
EXIT_INTERNAL = 1
EXIT_USER = 2
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE, as shells report it: whoever read the output (`| head`) has gone
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it: a person ended it, and nothing was saved
EXIT_UNAVAILABLE = 69  # EX_UNAVAILABLE of sysexits.h: what it needs is not there now, and may be there later
EXIT_RESUMABLE = 75  # EX_TEMPFAIL of sysexits.h: the run was interrupted, and the same command continues it


class ForgatherError(Exception):
    """Something the user can mend. `fix` says how: the key to change and a value that works."""

    exit_code = EXIT_USER

    def __init__(self, message: str, *, fix: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.fix = fix

    def __str__(self) -> str:
        return self.message if self.fix is None else f"{self.message}\n  fix: {self.fix}"

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions pickle by their args; `fix` is keyword-only, so it travels in the state.
        return (_rebuild, (type(self), self.message, self.fix))


def _rebuild(cls: type[ForgatherError], message: str, fix: str | None) -> ForgatherError:
    error = cls.__new__(cls)
    ForgatherError.__init__(error, message, fix=fix)
    return error


class ConfigError(ForgatherError):
    """A configuration cannot be read, merged, checked or built."""


class ModelError(ForgatherError):
    """A model cannot be constructed, initialised or packaged as asked."""


class DataError(ForgatherError):
    """A corpus, tokenizer or shard set is missing, damaged or does not fit."""


class CheckpointError(ForgatherError):
    """A checkpoint is missing, damaged, of another run, or cannot be written."""


class DistributedError(ForgatherError):
    """Mesh, batch or ranks do not fit together."""


class UnavailableError(DistributedError):
    """Another machine that is needed cannot be reached now. Nothing is to be mended here: it may be there later."""

    exit_code = EXIT_UNAVAILABLE


class StoppedError(ForgatherError):
    """A run was told to stop before it had begun, so there is nothing to save. The same command begins it."""

    exit_code = EXIT_RESUMABLE


class TrainingError(ForgatherError):
    """A run cannot go on as configured."""
