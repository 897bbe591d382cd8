"""`forgather code`: Python that builds what the config says, in the same order and with the same results."""

from forgather.cli.options import Options
from forgather.cli.parser import CommandParser
from forgather.errors import EXIT_OK

SUMMARY = "Print the Python source that builds a target"
NEEDS_CONFIG = True


def configure(parser: CommandParser) -> None:
    """A target, and what is handed to its code from outside."""
    parser.add_argument("target", nargs="?", metavar="TARGET", default="main", help="what to build (default: main)")
    parser.add_argument(
        "--inputs",
        metavar="TARGET[,TARGET]",
        action="append",
        default=[],
        help="targets that become parameters of the code instead of being built by it; may be given several times",
    )
    parser.add_argument(
        "--freeze",
        metavar="NAME[,NAME]",
        action="append",
        default=[],
        help="parameters whose value is written into code that has inputs; may be given several times",
    )


def run(options: Options) -> int:
    """Print the source."""
    freeze = _names(options.freeze) or None
    source = options.project.code(options.target, inputs=_names(options.inputs), freeze=freeze)
    print(source.rstrip("\n"))
    return EXIT_OK


def _names(values: list[str]) -> list[str]:
    return [name.strip() for value in values for name in value.split(",") if name.strip()]
