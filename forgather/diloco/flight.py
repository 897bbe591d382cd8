"""An exchange that is under way, as the training thread sees it: from when it began to when its values are taken in."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from forgather.diloco.exchange import Exchange
from forgather.diloco.learned import Learned
from forgather.diloco.local_fragment import LocalFragment, Numbers, Part
from forgather.diloco.membership import Membership
from forgather.diloco.settings import Settings


@dataclass
class Flight:
    """`sent` is what the parameters were when the exchange began, after step `begun`; None where nothing is sent."""

    fragment: LocalFragment
    exchange: Exchange
    begun: int
    sent: Numbers | None = None
    tokens: int = 1
    steps: int = 0
    consumed: Mapping[str, int] = field(default_factory=dict)
    is_overdue: bool = False  # nobody waits for it any more; it is taken in whenever it comes

    def is_due(self, step: int, delay: int) -> bool:
        """Whether its values are to be taken in after `step`."""
        return self.sent is None or step >= self.begun + delay

    def land(self, step: int, number: int, alpha: float) -> None:
        """Take in the values of version `number`, after `step`. Collective, when all ranks have them."""
        fragment, exchange = self.fragment, self.exchange
        has_trained = self.sent is not None and step > self.begun
        fragment.take(exchange.values, self.sent if has_trained else None, alpha)
        if self.sent is not None:
            fragment.give_back(self.sent)
        fragment.number_of_version = number
        fragment.version = exchange.version
        for part in exchange.parts:
            fragment.keep(part.moved_to(exchange.round, landed=number))
        fragment.forget(exchange.durable)
        exchange.close()


def take_off(
    fragment: LocalFragment,
    membership: Membership,
    settings: Settings,
    *,
    begun: int,
    sent: Numbers,
    tokens: int,
    steps: int,
    consumed: Mapping[str, int],
    round: int | None = None,
    parts: Sequence[Part] = (),
    is_encoded_elsewhere: bool = False,
) -> Flight:
    """Begin to exchange `sent`, the parameters after step `begun`, for the round of the fragment's version.

    `round` and `parts` go on with one that had begun before a restart; where its parts were made on another mesh, no
    rank makes another.
    """
    learned = Learned(fragment, membership.request.worker, membership.origin, sent, tokens, steps, consumed)
    exchange = Exchange(
        fragment,
        membership,
        fragment.number_of_version if round is None else round,
        parts=parts,
        learned=None if is_encoded_elsewhere else learned,
        is_async=settings.mode == "async",
    )
    return Flight(fragment, exchange, begun, sent, tokens, steps, consumed)
