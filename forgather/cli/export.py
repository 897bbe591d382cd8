"""`forgather export`: a Hugging Face folder from a run, a checkpoint, or a package with weights."""

from pathlib import Path

from forgather.cli.options import Options
from forgather.cli.parser import CommandParser
from forgather.cli.weight_flags import add_weight_flags, chosen_dtype, num_bytes
from forgather.errors import EXIT_OK

SUMMARY = "Write a Hugging Face folder from a run, a checkpoint or a package"
NEEDS_CONFIG = False


def configure(parser: CommandParser) -> None:
    """What to export, where to, in which form, and how to cut it."""
    parser.add_argument(
        "source",
        metavar="SRC",
        help="a run folder (its newest whole checkpoint), a checkpoint, or a package folder with weights",
    )
    parser.add_argument("destination", metavar="DIR", help="the folder to write; it must not be there yet")
    parser.add_argument(
        "--as",
        dest="form",
        choices=["package", "native"],
        default="package",
        help="package: with the model's own code. native: one of transformers' models, without (default: package)",
    )
    add_weight_flags(parser)


def run(options: Options) -> int:
    """Export, and say what was written."""
    from forgather.conversion.export import export

    folder = export(
        Path(options.source),
        Path(options.destination),
        native=options.form == "native",
        max_shard_bytes=num_bytes(options.max_shard_size),
        dtype=chosen_dtype(options),
    )
    files = sorted(folder.glob("*.safetensors"))
    written = sum(file.stat().st_size for file in files)
    print(f"{folder}: {written / 1e6:,.1f} MB of weights in {len(files)} file{'s' if len(files) > 1 else ''}")
    return EXIT_OK
