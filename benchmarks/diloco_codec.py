"""How fast do DiLoCo's codecs encode and decode, against a bare copy of the same fp32 values?

    python benchmarks/diloco_codec.py          # half a minute; 268 MB of values, one core
    python benchmarks/diloco_codec.py --dose   # seconds: all of it runs, the figures say little

Encoding keeps a residual (error feedback), as all senders do. Speeds are bytes of fp32 values a second, the median over
pairs of the codec and `Tensor.copy_` in turns. There are bars in GB/s, as a network of 10 Gbit/s brings 1.25 GB/s and a
codec must not be what is waited for, and bars in parts of a copy's speed, which a slow or busy machine does not change.
Ends with 1 when one is missed.
"""

import argparse
import statistics
import sys
from collections.abc import Callable

import torch
from interleaved import Comparison, compare, machine_line
from verdict import Bar, print_verdict

from forgather.diloco.codec import CODEC_NAMES, codec

# GB/s on one core. fp32 and bf16, which have no integers to make, reach what int8 has to.
ENCODE = {"fp32": 2.0, "bf16": 2.0, "int8": 2.0, "int4": 1.2}
DECODE = {"fp32": 4.0, "bf16": 4.0, "int8": 4.0, "int4": 4.0}
# Of a copy's speed. A copy reads and writes each value once; an encoder with a residual reads two and writes one more.
ENCODE_SHARE = {"fp32": 0.3, "bf16": 0.3, "int8": 0.25, "int4": 0.2}
DECODE_SHARE = {"fp32": 0.8, "bf16": 0.8, "int8": 0.7, "int4": 0.5}


def measure(name: str, numel: int, pairs: int) -> dict[str, Comparison]:
    """Encoding, decoding, and decoding of as many values from the middle of a block, each against a copy."""
    of = codec(name)
    values = torch.randn(numel, generator=torch.Generator().manual_seed(0)) * 1e-3
    residual, copied, decoded = torch.zeros(numel), torch.ones(numel), torch.ones(numel)
    encoded = torch.ones(of.encoded_bytes(numel), dtype=torch.uint8)
    part = decoded[: numel - 100]

    def against_copy(ours: Callable[[], object]) -> Comparison:
        return compare(ours, lambda: copied.copy_(values), pairs=pairs, warmup=2)

    return {
        "encode": against_copy(lambda: of.encode(values, encoded, residual)),
        "decode": against_copy(lambda: of.decode(encoded, numel, decoded)),
        "decode from within a block": against_copy(lambda: of.decode(encoded, numel, part, start=70)),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--dose", action="store_true", help="little of everything: does it run?")
    arguments = parser.parse_args()
    numel, pairs = (1 << 20, 2) if arguments.dose else (1 << 26, 9)
    torch.set_num_threads(1)
    print(machine_line())
    gigabytes = numel * 4 / 1e9
    print(f"{gigabytes:.3f} GB of fp32 values")
    speeds, shares = [], []
    for name in CODEC_NAMES:
        for what, comparison in measure(name, numel, pairs).items():
            speed = gigabytes / statistics.median(comparison.ours_s)
            copy = gigabytes / statistics.median(comparison.baseline_s)
            print(f"{name} {what}: {speed:.2f} GB/s, a copy {copy:.2f} GB/s; {comparison.line('codec', 'copy')}")
            is_encoding = what == "encode"
            least, share = (ENCODE[name], ENCODE_SHARE[name]) if is_encoding else (DECODE[name], DECODE_SHARE[name])
            speeds.append(Bar(f"{name} {what}, GB/s", speed, ">=", least))
            shares.append(Bar(f"{name} {what}, of a copy's speed", comparison.ratio, ">=", share))
    return print_verdict([*speeds, *shares])


if __name__ == "__main__":
    sys.exit(main())
