"""What a worker keeps of the contributions that it has sent, and for how long."""

import torch
from torch import nn

from forgather.diloco.local_fragment import LocalFragment, Part
from forgather.diloco.messages import Contribution, Identity, Version
from forgather.diloco.payload import Payload
from forgather.diloco.slices import Holdings


def fragment() -> LocalFragment:
    model = nn.Linear(2, 2)
    holdings = Holdings(model, torch.optim.SGD(model.parameters(), lr=0.1))
    return LocalFragment(0, ["weight", "bias"], holdings, upload="fp32")


def part(round: int) -> Part:
    header = Contribution(Version(round, ""), "differences", "fp32", [])
    return Part(Identity("a", round, 0), header, Payload.whole(torch.zeros(0, dtype=torch.uint8)))


def test_a_contribution_is_kept_until_a_version_that_has_it_is_durable_whichever_number_its_round_had() -> None:
    """On an asynchronous server others' came before it: that to round 7 is in version 9."""
    there = fragment()
    there.keep(part(7).moved_to(7, landed=9))
    there.keep(part(9))  # nothing is known of it
    for durable in (7, 8):
        there.forget(durable)
        assert [each.identity.round for each in there.kept] == [7, 9]
    there.forget(9)
    assert [each.identity.round for each in there.kept] == [9]
    there.keep(part(9).moved_to(9, landed=10))
    there.forget(10)
    assert there.kept == []
