"""`forgather show`: a config as it stands after inheritance, overrides and expressions."""

from forgather.cli.options import Options
from forgather.cli.parser import CommandParser
from forgather.errors import EXIT_OK

SUMMARY = "Show what a config says once all is merged and resolved"
NEEDS_CONFIG = True


def configure(parser: CommandParser) -> None:
    """One target or all of them, with or without where each value was written."""
    parser.add_argument("target", nargs="?", metavar="TARGET", help="show this target only")
    parser.add_argument("--origin", action="store_true", help="say beside each value in which file and line it stands")


def run(options: Options) -> int:
    """Print YAML for reading and `diff`."""
    print(options.project.show(options.target, origin=options.origin).rstrip("\n"))
    return EXIT_OK
