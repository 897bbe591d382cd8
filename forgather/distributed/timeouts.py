"""How long the parts of a run wait for one another, and which of these times must be longer than others.

keep-alive   a host that has not been heard of for so long is lost
collective   a rank that waits for its peers in a collective for so long ends with an error
join         a host that waits for the others to meet, at a start or a restart, gives up after so long
"""

from collections.abc import Mapping

from forgather.errors import DistributedError

_LEAST_KEEP_ALIVE_S = 3
_SETTLING_S = 30  # to end ranks, and to begin again


def check_timeouts(meeting: Mapping[str, int], collective_s: float) -> None:
    """Raise DistributedError unless the hosts of a run can find one another again after one of them is lost.

    `meeting` are the values of torchrun's --rdzv-conf, in seconds; `collective_s` is 0 where it is not known.
    """
    keep_alive = meeting["keep_alive_interval"] * meeting["keep_alive_max_attempt"]
    join, last_call = meeting["join_timeout"], meeting["last_call_timeout"]
    if keep_alive < _LEAST_KEEP_ALIVE_S:
        raise DistributedError(
            f"a host counts as lost after {keep_alive} s (keep_alive_interval x keep_alive_max_attempt), and a busy "
            "one is silent for as long",
            fix="--rdzv-conf keep_alive_interval=2,keep_alive_max_attempt=3",
        )
    if join <= keep_alive + last_call:
        raise DistributedError(
            f"hosts wait {join} s for one another (join_timeout), but it takes {keep_alive} s to notice that one is "
            f"lost (keep-alive) and {last_call} s more to begin without it (last_call_timeout)",
            fix=f"--rdzv-conf join_timeout={max(600, keep_alive + last_call + _SETTLING_S)}",
        )
    if join <= collective_s + _SETTLING_S:
        raise DistributedError(
            f"hosts wait {join} s for one another (join_timeout), but ranks that have lost a peer may wait "
            f"{collective_s:g} s in a collective (collective_timeout_s) before their host comes to the meeting",
            fix=f"collective_timeout_s below {max(1, join - _SETTLING_S)}, or --rdzv-conf "
            f"join_timeout={round(collective_s) + 2 * _SETTLING_S}",
        )


def check_collective_timeout(timeout_s: float, settle_s: float) -> None:
    """Raise DistributedError for a collective timeout that ends a run which is merely slow to start a step."""
    if timeout_s <= settle_s:
        raise DistributedError(
            f"collective_timeout_s is {timeout_s:g}, and to find out which rank is missing takes up to {settle_s:g} s",
            fix=f"collective_timeout_s: 600, or anything above {settle_s:g}",
        )
