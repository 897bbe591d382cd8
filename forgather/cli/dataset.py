"""`forgather dataset`: makes the shards of a dataset config, or shows what they hold."""

from typing import Any

from forgather.cli.options import Options
from forgather.cli.parser import CommandParser
from forgather.errors import EXIT_OK, DataError

SUMMARY = "Prepare or inspect a dataset"
NEEDS_CONFIG = True
TARGETS = ("prepared", "train", "validation")


def configure(parser: CommandParser) -> None:
    """Two verbs, `prepare` and `inspect`."""
    parser.add_verb("prepare", "Tokenize the sources and split them into shards, unless that is done")
    inspect = parser.add_verb("inspect", "Show counts, shares of the sources and decoded documents")
    inspect.add_argument("--verify", action="store_true", help="read all shards and compare their checksums")
    inspect.add_argument("--documents", type=int, default=1, metavar="N", help="documents of each split to show")
    inspect.add_argument("--characters", type=int, default=300, metavar="N", help="characters of each to show")


def run(options: Options) -> int:
    """Print the folder of the shards, or what is in it."""
    dataset = options.project.build("prepared")
    if options.verb == "prepare":
        print(dataset.prepare())
        return EXIT_OK
    if options.documents < 0 or options.characters < 1:
        raise DataError("--documents and --characters count what to show", fix="--documents 1 --characters 300")
    _inspect(dataset, options)
    return EXIT_OK


def _inspect(dataset: Any, options: Options) -> None:
    manifest = dataset.manifest()
    print(f"{manifest['name']}: {dataset.folder}")
    tokenizer = manifest["tokenizer"]
    print(f"tokenizer {tokenizer['digest']}, {tokenizer['vocab_size']:,} tokens, stored as {manifest['dtype']}")
    for warning in manifest["warnings"]:
        print(f"warning: {warning}")
    _print_sources(manifest)
    for name in manifest["splits"]:
        shards = dataset.split(name)
        print(f"\n{name}: {_lengths(shards)}")
        if options.verify:
            shards.verify()
            print(f"{name}: all checksums match")
        # Spread over the split: its beginning is one folder of one source.
        count = min(options.documents, shards.num_documents)
        for number in (i * shards.num_documents // count for i in range(count)):
            tokens = shards.document(number)
            text = dataset.tokenizer.decode(tokens)
            cut = "" if len(text) <= options.characters else f" ... ({len(text):,} characters)"
            print(f"\n--- {name}, document {number:,}, {len(tokens):,} tokens\n{text[: options.characters]}{cut}")


def _lengths(shards: Any) -> str:
    lengths = sorted(shards.document_lengths().tolist())
    return f"a document has {lengths[0]:,} to {lengths[-1]:,} tokens, median {lengths[len(lengths) // 2]:,}"


def _print_sources(manifest: dict[str, Any]) -> None:
    splits = manifest["splits"]
    rows = [["source", "documents", "tokens", *(head for name in splits for head in (name, "share"))]]
    for source in manifest["sources"]:
        row = [source["name"], f"{source['documents']:,}", f"{source['tokens']:,}"]
        for name, split in splits.items():
            row += [f"{source[name]['tokens']:,}", f"{source[name]['tokens'] / split['num_tokens']:.2%}"]
        rows.append(row)
    rows.append(
        [
            "all",
            f"{sum(source['documents'] for source in manifest['sources']):,}",
            f"{sum(source['tokens'] for source in manifest['sources']):,}",
            *(cell for split in splits.values() for cell in (f"{split['num_tokens']:,}", "")),
        ]
    )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print(
            "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        )
