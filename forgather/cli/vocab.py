"""`forgather vocab`: more tokens for a model and its tokenizer."""

from pathlib import Path
from typing import TYPE_CHECKING

from forgather.cli.options import Options
from forgather.cli.parser import CommandParser, UsageError
from forgather.cli.weight_flags import add_shard_flag, num_bytes
from forgather.errors import EXIT_OK

if TYPE_CHECKING:
    from forgather.conversion.token_additions import Wish
    from forgather.conversion.vocabulary import Extended

SUMMARY = "Add tokens to a model and its tokenizer"
NEEDS_CONFIG = False

_ROLES = {"bos": "begins a text", "eos": "ends a text", "pad": "fills rows", "unk": "stands for what is unknown"}


def configure(parser: CommandParser) -> None:
    """Which model, which tokens, and where to write."""
    parser.add_argument("source", metavar="MODEL", help="a Hugging Face folder, or a model package with weights")
    parser.add_argument("destination", metavar="OUT", nargs="?", help="the folder to write; it must not be there yet")
    parser.add_argument("--in-place", action="store_true", help="change MODEL itself; nothing else in it is touched")
    parser.add_argument(
        "--add-tokens",
        metavar="YAML",
        help="file with bos_token, eos_token, pad_token, unk_token, special_tokens: [...], regular_tokens: [...]",
    )
    parser.add_argument("--special-token", action="append", metavar="TOKEN", help="add a special token (repeatable)")
    parser.add_argument("--token", action="append", metavar="TOKEN", help="add a regular token (repeatable)")
    for role, meaning in _ROLES.items():
        parser.add_argument(f"--{role}-token", metavar="TOKEN", help=f"the token that {meaning}; added if missing")
    parser.add_argument(
        "--init",
        metavar="INIT",
        help="first row of the tokens of these flags: mean, zero, copy:TOKEN or copy:ID (default: like the token that "
        "had the role before, else zero for padding and mean for others)",
    )
    parser.add_argument("--size", type=int, metavar="ROWS", help="rows of the embedding; never fewer than there are")
    parser.add_argument("--pad-to-multiple-of", type=int, default=1, metavar="N", help="round the rows up (default: 1)")
    parser.add_argument(
        "--skip-default-tokens",
        action="store_true",
        help="do not add [PAD] to a tokenizer without padding, which is done when nothing else is asked for",
    )
    add_shard_flag(parser)
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and write nothing")


def run(options: Options) -> int:
    """Extend, and say by what."""
    if (options.destination is None) != options.in_place and not options.dry_run:
        raise UsageError(
            "forgather vocab writes either a new folder or MODEL itself", fix="name OUT, or give --in-place"
        )
    if options.pad_to_multiple_of < 1:
        raise UsageError("--pad-to-multiple-of is less than 1", fix="--pad-to-multiple-of 64")

    from forgather.conversion.vocabulary import extend_vocabulary

    extended = extend_vocabulary(
        Path(options.source),
        None if options.in_place or options.destination is None else Path(options.destination),
        _wishes(options),
        num_rows=options.size,
        multiple_of=options.pad_to_multiple_of,
        max_shard_bytes=num_bytes(options.max_shard_size),
        dry_run=options.dry_run,
    )
    for line in _said(extended):
        print(line)
    if options.dry_run:
        print("nothing was written")
    elif options.destination is not None or extended.changes:
        print(f"written: {options.source if options.in_place else options.destination}")
    return EXIT_OK


def _wishes(options: Options) -> "list[Wish]":
    from forgather.conversion.token_additions import PADDING, Wish, read_wishes

    asked = read_wishes(Path(options.add_tokens)) if options.add_tokens is not None else []
    for role in _ROLES:
        if (token := getattr(options, f"{role}_token")) is not None:
            asked.append(Wish(token, role=f"{role}_token", init=options.init))
    asked += [Wish(token, init=options.init) for token in options.special_token or []]
    asked += [Wish(token, special=False, init=options.init) for token in options.token or []]
    resized = options.size is not None or options.pad_to_multiple_of > 1
    if not asked and not resized and not options.skip_default_tokens:
        return [PADDING]
    return asked


def _said(extended: "Extended") -> list[str]:
    additions = extended.additions
    roles = {new: role for role, (_, new) in additions.roles.items()}
    lines = []
    for token, number in additions.tokens.items():
        init = additions.inits[number]
        row = f"row like that of id {init}" if isinstance(init, int) else f"row {init}"
        role = f", {roles[number]}" if number in roles else ""
        lines.append(f"added {token!r}: id {number}, {row}{role}")
    for role, (old, new) in additions.roles.items():
        if new not in additions.tokens.values():
            lines.append(f"{role}: id {new}" + (f" instead of {old}" if old is not None else ""))
    for what, (before, after) in (("tokens", extended.num_tokens), ("rows", extended.num_rows)):
        lines.append(f"{what}: {before:,}" + (f" -> {after:,}" if before != after else ", as before"))
    return lines
