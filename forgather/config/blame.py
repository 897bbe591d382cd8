"""Tells a value that a constructor refuses, which the user can mend, from a defect of ours.

What is raised while an object of the config is built is the user's to mend when the object was called wrongly, when a
library raised it, when the constructor that the config names refused a value, or when the code is the user's own. What
is raised deeper in Forgather, or by ranks that lost one another, is not.
"""

import os
import sysconfig
import traceback
from pathlib import Path
from types import CodeType

from forgather.config import build
from forgather.config.build import building_note
from forgather.errors import ConfigError

TRACEBACK_VARIABLE = "FORGATHER_TRACEBACK"

_PACKAGE = Path(build.__file__).resolve().parent.parent
_LIBRARIES = tuple(Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib"))


def user_error(error: Exception) -> ConfigError | None:
    """What to tell of an exception of a constructor, with the chain of keys that led there; None for a defect of ours.

    The traceback is part of the message for code of the user's own, and whenever `FORGATHER_TRACEBACK` is set.
    """
    note = building_note(error)
    if note is None:
        return None
    called = _called(error)
    if any("distributed" in Path(code.co_filename).parts for code in called):
        return None  # a peer that failed, say: its own message is the one that counts
    raising = called[-1] if called else None
    refuses = len(called) == 1 and isinstance(error, TypeError | ValueError)  # the named constructor itself
    if raising is not None and _is_ours(raising) and not refuses:
        return None
    message = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    message = f"{message}\n  {note}"
    fix = f"change what is given there; with {TRACEBACK_VARIABLE}=1 the traceback is shown"
    if os.environ.get(TRACEBACK_VARIABLE) or (raising is not None and _is_users(raising)):
        message += "\n" + "".join(traceback.format_exception(error)).rstrip()
        fix = "change what is given there, or the code that raised it"
    return ConfigError(message, fix=fix)


def _called(error: BaseException) -> list[CodeType]:
    """What ran below the innermost constructor call of the config, the raising code last; none if the call failed."""
    called: list[CodeType] = []
    for frame, _ in traceback.walk_tb(error.__traceback__):
        code = frame.f_code
        if code.co_filename == build.__file__:
            called = []
        elif code.co_filename != "<string>":  # the __init__ that a dataclass was given
            called.append(code)
    return called


def _is_ours(code: CodeType) -> bool:
    return Path(code.co_filename).resolve().is_relative_to(_PACKAGE)


def _is_users(code: CodeType) -> bool:
    file = Path(code.co_filename)
    is_library = code.co_filename.startswith("<") or any(file.resolve().is_relative_to(each) for each in _LIBRARIES)
    return not is_library and not _is_ours(code)
