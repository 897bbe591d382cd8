"""The frame of a body with tensors, and the JSON in it.

A body with tensors is

    4 bytes     length of the header, big-endian
    header      JSON in UTF-8
    payload     the slices that the header lists, one after the other, each as its codec encodes it
    digests     8 bytes each: of the payload, to the server; of the values that each slice leads to, to a worker

Digests come last, so that a payload can be sent while it is made.
"""

import json
import struct
from collections.abc import Mapping
from typing import Any

from forgather.errors import ForgatherError

MAX_HEADER_BYTES = 16 << 20  # the slices of 100,000 parameters fit in
_LENGTH = struct.Struct(">I")


class ProtocolError(ForgatherError):
    """A message that does not say what it must; `status` is the HTTP status that answers it."""

    def __init__(self, message: str, *, status: int = 400, fix: str | None = None) -> None:
        super().__init__(message, fix=fix)
        self.status = status


def pack_header(header: Mapping[str, Any]) -> bytes:
    """The frame's beginning, up to where the payload starts."""
    data = json.dumps(header, separators=(",", ":"), allow_nan=False).encode()
    return _LENGTH.pack(len(data)) + data


def header_length(data: bytes) -> int:
    """How long the header is, from the first 4 bytes of a body."""
    (length,) = _LENGTH.unpack(data)
    if not 2 <= length <= MAX_HEADER_BYTES:
        raise ProtocolError(f"a header of {length:,} bytes; the most is {MAX_HEADER_BYTES:,}", status=413)
    return int(length)


def parse_json(data: bytes) -> Any:
    """JSON as a message has it: without NaN and without a traceback for what is none."""
    try:
        return json.loads(data, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"this is no JSON: {error}") from None


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def shown(value: Any) -> str:
    """A value that somebody has sent, short enough for a message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
