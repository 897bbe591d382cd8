"""`forgather import`: a model package with weights from a Hugging Face folder."""

from pathlib import Path

from forgather.cli.options import Options
from forgather.cli.parser import CommandParser
from forgather.cli.weight_flags import add_weight_flags, chosen_dtype, num_bytes
from forgather.errors import EXIT_OK

SUMMARY = "Make a model package of a Hugging Face model"
NEEDS_CONFIG = False


def configure(parser: CommandParser) -> None:
    """What to import and where to."""
    parser.add_argument("source", metavar="HF_DIR", help="a Hugging Face folder: config.json, weights, tokenizer")
    parser.add_argument("destination", metavar="OUT", help="the package to write; it must not be there yet")
    add_weight_flags(parser)
    parser.add_argument("--dry-run", action="store_true", help="check all but the weights' values, and write nothing")


def run(options: Options) -> int:
    """Import, and say what was made, or would be."""
    from forgather.conversion.importing import import_model

    made = import_model(
        Path(options.source),
        Path(options.destination),
        max_shard_bytes=num_bytes(options.max_shard_size),
        dtype=chosen_dtype(options),
        dry_run=options.dry_run,
    )
    what = f"{made.model_type}, {made.num_parameters:,} parameters, {made.num_bytes / 1e6:,.1f} MB"
    if made.difference is None:
        print(f"{options.destination} would be {what}; nothing was written")
    else:
        print(f"{options.destination}: {what}; logits equal those of transformers within {made.difference:.1e}")
    return EXIT_OK
