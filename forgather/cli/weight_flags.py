"""How written weights are cut and in which numbers: flags of every command that writes a Hugging Face folder."""

import re
from typing import TYPE_CHECKING

from forgather.cli.options import Options
from forgather.cli.parser import CommandParser, UsageError

if TYPE_CHECKING:
    import torch

_DTYPES = {
    "float32": "float32",
    "fp32": "float32",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float16": "float16",
    "fp16": "float16",
}
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def add_weight_flags(parser: CommandParser) -> None:
    """`--max-shard-size` and `--dtype`."""
    add_shard_flag(parser)
    parser.add_argument("--dtype", choices=_DTYPES, help="convert the weights (default: as they are)")


def add_shard_flag(parser: CommandParser) -> None:
    """`--max-shard-size`, alone."""
    parser.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="largest weight file, such as 500MB (default: 5GB)"
    )


def chosen_dtype(options: Options) -> "torch.dtype | None":
    """What `--dtype` says."""
    import torch

    return getattr(torch, _DTYPES[options.dtype]) if options.dtype else None


def num_bytes(text: str) -> int:
    """The number of bytes that `500MB`, `2 GiB` or `1000000` says."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in _UNITS or float(match[1]) <= 0:
        raise UsageError(f"--max-shard-size {text!r} is no size", fix="write a number and a unit: 500MB, 5GB, 2GiB")
    return max(1, int(float(match[1]) * _UNITS[match[2].upper()]))
