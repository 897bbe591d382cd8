"""What the ranks of a worker tell one another while something is under way, in one small reduction."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from forgather.diloco.exchange import Exchange
from forgather.distributed.collectives import gather_objects, raise_together, world_size

_NONE = -(2**62)


@dataclass(frozen=True)
class Standing:
    """How things are on one rank, or on the one where they are worst."""

    away_ms: int = 0  # for how long the server has not been reached
    is_stopping: bool = False
    is_undelivered: bool = False  # something is not accepted by the server yet
    refused_ms: int = 0  # for how long the server has been there and did not take it
    sync_every: int = 0  # that the server wants of this worker; rank 0 knows it, others say 0
    round_ms: int = 0  # 1 and the milliseconds of rounds of fixed time, 1 for other rounds; as above
    versions: Sequence[int | None] = ()  # of each exchange, the number of the version whose values all ranks have

    @property
    def round_seconds(self) -> float | None:
        return (self.round_ms - 1) / 1000 if self.round_ms > 1 else None


def agree(standing: Standing, exchanges: Sequence[Exchange], failure: Exception | None = None) -> Standing:
    """The standing of all ranks together; their exchanges are brought to one round and one version. Collective.

    Raises on all ranks where one has failed.
    """
    failures = [failure, *(exchange.failure for exchange in exchanges)]
    mine = next((each for each in failures if each is not None), None)
    numbers = [
        int(mine is not None),
        standing.away_ms,
        int(standing.is_stopping),
        int(standing.is_undelivered),
        standing.refused_ms,
        standing.sync_every,
        standing.round_ms,
    ]
    for exchange in exchanges:
        round, number = exchange.round, exchange.number
        # Of a number and its opposite the largest: where they agree, all ranks that have values say the same.
        is_known = number is not None and bool(exchange.fragment.owned)
        known = [number, -number] if is_known and number is not None else [_NONE, _NONE]
        numbers += [int(number is None), round, -round, *known]
    box = torch.tensor(numbers)
    if world_size() > 1:
        dist.all_reduce(box, dist.ReduceOp.MAX)
    has_failed, away_ms, is_stopping, is_undelivered, refused_ms, sync_every, round_ms, *rest = box.tolist()
    if has_failed:
        raise_together(mine, gather_objects(None if mine is None else str(mine) or type(mine).__name__))
    versions: list[int | None] = []
    for exchange, at in zip(exchanges, range(0, len(rest), 5), strict=True):
        is_missing, round, opposite_round, number, opposite_number = rest[at : at + 5]
        is_ready = not is_missing and round == -opposite_round and number == -opposite_number
        versions.append(number if is_ready else None)
        exchange.agreed_round = round
        if not is_ready:
            exchange.move_to(round, max(0, number))
    return Standing(away_ms, bool(is_stopping), bool(is_undelivered), refused_ms, sync_every, round_ms, versions)
