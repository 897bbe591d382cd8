"""How values become bytes: fp32, bf16, and int8 and int4 in blocks that share a scale, with what is lost given back.

    int4 = codec("int4")
    encoded = torch.empty(int4.encoded_bytes(difference.numel()), dtype=torch.uint8)
    int4.encode(difference, encoded, residual)  # sends difference + residual; residual becomes what that lost
    int4.decode(encoded, difference.numel(), out)

An encoded run of n elements is [scales of its blocks, fp32][elements], filled up with zeros to a multiple of 8 bytes;
numbers are little-endian. Every block stands alone, so whole blocks can be cut out of a run, and are the encoding of
that part. In int4 the first half of a block lies in the low nibbles, the second in the high ones, each as value + 8.

**Decoding gives the same bits on every processor**: an integer times a scale, rounded once. A scale is a normal number,
so processors that flush subnormal numbers agree too. Who adds what was decoded to something adds it in an operation of
its own.

**Nothing is lost**: what decodes and the residual together are `values + residual`, exactly (their difference is a
number of fp32: Sterbenz's lemma). Sent round after round, errors do not add up.

Values that are no numbers stay so, with the block that they are in (fp32 and bf16: the element), and what they leave in
the residual is zero: whoever receives them can refuse them, and the sender's later rounds are sound.
"""

from difflib import get_close_matches

import torch

from forgather.diloco.block_codec import BlockCodec, NibbleCodec
from forgather.diloco.encoding import Codec
from forgather.diloco.number_codec import NumberCodec
from forgather.errors import ConfigError

_CODECS: dict[str, Codec] = {
    "fp32": NumberCodec("fp32", torch.float32),
    "bf16": NumberCodec("bf16", torch.bfloat16),
    "int8": BlockCodec("int8", 8),
    "int4": NibbleCodec("int4", 4),
}
CODEC_NAMES = tuple(_CODECS)  # from the finest to the smallest


def codec(name: str) -> Codec:
    """The codec of that name; ConfigError, with the nearest name, for another."""
    if name in _CODECS:
        return _CODECS[name]
    near = get_close_matches(name, CODEC_NAMES, n=1, cutoff=0.4)
    raise ConfigError(
        f"there is no codec {name!r}; there are {', '.join(CODEC_NAMES)}", fix=near[0] if near else "bf16"
    )
