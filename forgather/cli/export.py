"""`forgather export`: a Hugging Face folder from a run or a checkpoint."""

import re
from pathlib import Path

from forgather.cli.options import Options
from forgather.cli.parser import CommandParser, UsageError
from forgather.errors import EXIT_OK

SUMMARY = "Write a Hugging Face folder from a run or a checkpoint"
NEEDS_CONFIG = False

_DTYPES = {
    "float32": "float32",
    "fp32": "float32",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float16": "float16",
    "fp16": "float16",
}
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def configure(parser: CommandParser) -> None:
    """What to export, where to, and how to cut it."""
    parser.add_argument(
        "source", metavar="RUN_OR_CHECKPOINT", help="a run folder (its newest whole checkpoint), or a checkpoint"
    )
    parser.add_argument("destination", metavar="DIR", help="the folder to write; it must not be there yet")
    parser.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="largest weight file, such as 500MB (default: 5GB)"
    )
    parser.add_argument("--dtype", choices=_DTYPES, help="convert the weights (default: as they were trained)")


def run(options: Options) -> int:
    """Export, and say what was written."""
    import torch

    from forgather.conversion.export import export

    size = num_bytes(options.max_shard_size)
    dtype = getattr(torch, _DTYPES[options.dtype]) if options.dtype else None
    folder = export(Path(options.source), Path(options.destination), max_shard_bytes=size, dtype=dtype)
    files = sorted(folder.glob("*.safetensors"))
    written = sum(file.stat().st_size for file in files)
    print(f"{folder}: {written / 1e6:,.1f} MB of weights in {len(files)} file{'s' if len(files) > 1 else ''}")
    return EXIT_OK


def num_bytes(text: str) -> int:
    """The number of bytes that `500MB`, `2 GiB` or `1000000` says."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in _UNITS or float(match[1]) <= 0:
        raise UsageError(f"--max-shard-size {text!r} is no size", fix="write a number and a unit: 500MB, 5GB, 2GiB")
    return max(1, int(float(match[1]) * _UNITS[match[2].upper()]))
