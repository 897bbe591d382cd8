"""`forgather construct`: builds one target and prints what came out."""

from pprint import pformat

from forgather.cli.options import Options
from forgather.cli.parser import CommandParser
from forgather.errors import EXIT_OK

SUMMARY = "Build a target and print it"
NEEDS_CONFIG = True


def configure(parser: CommandParser) -> None:
    """The target."""
    parser.add_argument("target", nargs="?", metavar="TARGET", default="main", help="what to build (default: main)")


def run(options: Options) -> int:
    """Print the object: data as data, anything else as it describes itself."""
    built = options.project.build(options.target)
    print(built if isinstance(built, str) else pformat(built, sort_dicts=False, width=100))
    return EXIT_OK
