"""What the command line writes for people: errors on stderr, coloured only where a person looks at them."""

import os
import sys
from typing import TextIO

from forgather.errors import ForgatherError

RED, YELLOW, DIM, BOLD = "31;1", "33", "2", "1"


def paint(text: str, style: str, stream: TextIO) -> str:
    """`text` in `style` (one of the constants above) when `stream` is a terminal and NO_COLOR is not set."""
    # https://no-color.org: any value but the empty one forbids colour.
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not stream.isatty()
    return text if plain else f"\033[{style}m{text}\033[0m"


def print_error(error: ForgatherError) -> None:
    """Write `error: message` and, where there is one, `  fix: ...` to stderr."""
    print(paint("error:", RED, sys.stderr), error.message, file=sys.stderr)
    if error.fix is not None:
        print(paint("  fix:", BOLD, sys.stderr), error.fix, file=sys.stderr)


def print_warning(message: str) -> None:
    """Write `warning: message` to stderr."""
    print(paint("warning:", YELLOW, sys.stderr), message, file=sys.stderr)
