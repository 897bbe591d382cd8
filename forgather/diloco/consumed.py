"""What a contribution may say of the rows that it was trained on: {first row of the run: how many}."""

from collections.abc import Mapping

from forgather.diloco.frame import ProtocolError

MOST_RANGES = 1 << 16  # in one part; a worker's rows of a round are a few ranges, where units were taken back some more


def require_leased(consumed: Mapping[str, int], stop: int) -> None:
    """ProtocolError (422) unless these are rows before `stop`, the first that nobody was ever leased.

    They need not be leased to this worker now: what it was evicted from, or has left when it began again from an older
    checkpoint, counts too. But rows that nobody had would end the run's order, as if they were trained already.
    """
    if len(consumed) > MOST_RANGES:
        raise ProtocolError(
            f"`consumed` of a contribution has {len(consumed):,} ranges, and the most is {MOST_RANGES:,}", status=422
        )
    for first, length in consumed.items():
        if not (first.isascii() and first.isdigit() and len(first) < 20 and 1 <= length < 2**62):
            raise ProtocolError("`consumed` of a contribution is not {first row: number of rows}", status=422)
        if int(first) + length > stop:
            raise ProtocolError(
                f"a contribution has {length:,} rows from {first} on, and only those below {stop:,} were leased",
                status=422,
                fix="train on the rows that the server leases: start the worker again, with --diloco-leased",
            )
