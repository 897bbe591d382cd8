"""`forgather targets`: the names that can be shown, built and referred to."""

from forgather.cli.options import Options
from forgather.cli.parser import CommandParser
from forgather.errors import EXIT_OK

SUMMARY = "List what a config can build"
NEEDS_CONFIG = True


def configure(parser: CommandParser) -> None:
    """It has no flags of its own."""


def run(options: Options) -> int:
    """Print one target a line."""
    for target in options.project.targets():
        print(target)
    return EXIT_OK
