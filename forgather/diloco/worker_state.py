"""What a worker's checkpoint holds, and how it comes back on any mesh.

Each rank gives what it owns, as tensors that are sharded as the parameters are:

    anchor/<name>, residual/<name>          the values that progress is measured from, and what the codec has lost
    sent/<name>                             of an exchange under way: the parameters when it began
    parts/<fragment>.<round>.<part>         contributions that no durable version of the server has, as they were sent

A contribution is bytes that say themselves what they are, so on another mesh any rank can send a part.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

from forgather.diloco.flight import Flight
from forgather.diloco.local_fragment import LocalFragment, Numbers, Part
from forgather.diloco.messages import Contribution, Identity, Version
from forgather.diloco.payload import Payload
from forgather.diloco.slices import Holding
from forgather.distributed.collectives import rank, world_size


def sharded(holding: Holding, numbers: Numbers) -> Tensor:
    """These fp32 numbers of a slice as a part of a tensor that is laid out as its parameter is; their own memory."""
    local = numbers[holding.slice.name].view(holding.slice.sizes)
    parameter = holding.parameter
    if not isinstance(parameter, DTensor):
        return local
    meta = TensorMeta(parameter.shape, parameter.stride(), torch.float32)
    # Not by DTensor.from_local: it would move what is on the CPU to the mesh's device.
    spec = DTensorSpec(parameter.device_mesh, parameter.placements, tensor_meta=meta)
    laid_out: Tensor = DTensor(local, spec, requires_grad=False)  # type: ignore[no-untyped-call]
    return laid_out


def capture(fragments: Sequence[LocalFragment], flights: Mapping[int, Flight]) -> dict[str, Any]:
    """The state of this rank's fragments.

    Ranks may hear different things of an exchange at different times: it is saved for the round that they last agreed
    on, so that its parts are those of one contribution. Where that is closed by now, the server says so again.
    """
    encoded = {number: flight.exchange.encoded() for number, flight in flights.items()}
    anchor: dict[str, Tensor] = {}
    residual: dict[str, Tensor] = {}
    sent: dict[str, Tensor] = {}
    parts: dict[str, Any] = {}
    for fragment in fragments:
        flight = flights.get(fragment.number)
        for holding in fragment.owned:
            name = holding.slice.name
            anchor[name] = sharded(holding, fragment.anchor)
            if fragment.residual is not None:
                residual[name] = sharded(holding, fragment.residual)
            if flight is not None and flight.sent is not None:
                sent[name] = sharded(holding, flight.sent)
        for part in [*fragment.kept, *encoded.get(fragment.number, ())]:
            own = part.identity
            parts[f"{own.fragment}.{own.round}.{own.part}"] = {
                "worker": own.worker,
                "header": part.header.to_json(),
                "payload": part.payload.data,
                "landed": part.landed,
            }
    return {
        "fragments": {str(each.number): {"number": each.number_of_version, "since": each.since} for each in fragments},
        "versions": {
            str(each.number): each.version.to_json() for each in fragments if each.version is not None and each.owned
        },
        "flights": {
            str(number): {
                "round": flight.exchange.agreed_round,
                "begun": flight.begun,
                "tokens": flight.tokens,
                "steps": flight.steps,
                "consumed": dict(flight.consumed),
            }
            for number, flight in flights.items()
            if flight.sent is not None
        },
        "anchor": anchor,
        "residual": residual,
        "sent": sent,
        "parts": parts,
    }


class Restored:
    """Room for a saved state on this rank's fragments, and then what was read into it."""

    def __init__(self, saved: Mapping[str, Any], fragments: Sequence[LocalFragment]) -> None:
        self.fragments = fragments
        self.flights: Mapping[str, Mapping[str, Any]] = saved["flights"]
        self.sent = {int(number): fragments[int(number)].room() for number in self.flights}
        self.parts: dict[int, list[Part]] = {}
        self._saved = saved

    def targets(self, saved: Mapping[str, tuple[Sequence[int], torch.dtype]]) -> dict[str, Tensor]:
        """This rank's tensors, by the paths under which they were saved."""
        targets: dict[str, Tensor] = {}
        for fragment in self.fragments:
            rooms = {"anchor": fragment.anchor, "residual": fragment.residual, "sent": self.sent.get(fragment.number)}
            for kind, numbers in rooms.items():
                for holding in fragment.owned:
                    path = f"{kind}/{holding.slice.name}"
                    if numbers is not None and path in saved:
                        targets[path] = sharded(holding, numbers)
        for key in self._saved["parts"]:
            path = f"parts/{key}/payload"
            if path in saved and self._is_mine(key):
                targets[path] = torch.empty(tuple(saved[path][0]), dtype=torch.uint8)
        return targets

    def accept(self, state: Mapping[str, Any]) -> None:
        """Take up what was read into the targets."""
        for fragment in self.fragments:
            own = state["fragments"][str(fragment.number)]
            fragment.number_of_version, fragment.since = int(own["number"]), int(own["since"])
            fragment.version = Version.from_json(state["versions"][str(fragment.number)]) if fragment.owned else None
        for key, content in state["parts"].items():
            if "payload" not in content:
                continue  # another rank has it
            fragment_number, round, number = map(int, key.split("."))
            identity = Identity(content["worker"], round, fragment_number, number)
            header, payload = Contribution.from_json(content["header"]), Payload.whole(content["payload"])
            part = Part(identity, header, payload, content["landed"])
            flight = self.flights.get(str(fragment_number))
            if flight is not None and round == int(flight["round"]):
                self.parts.setdefault(fragment_number, []).append(part)
            else:
                self.fragments[fragment_number].keep(part)

    def is_of_this_mesh(self, number: int) -> bool:
        """Whether the contribution of fragment `number` that is under way has the parts that the ranks here make."""
        headers = {
            int(key.split(".")[2]): Contribution.from_json(content["header"])
            for key, content in self._saved["parts"].items()
            if key.startswith(f"{number}.{self.flights[str(number)]['round']}.")
        }
        fragment = self.fragments[number]
        owned = {part for part, owner in fragment.holdings.owners.items() if part.name in set(fragment.names)}
        sent = {part for header in headers.values() for part in header.slices}
        mine = headers.get(fragment.part) if fragment.part is not None else None
        return (
            len(headers) == fragment.num_parts
            and owned == sent
            and (fragment.part is None or (mine is not None and list(mine.slices) == fragment.slices))
        )

    def _is_mine(self, key: str) -> bool:
        """Whether this rank sends a saved part: its own as long as the mesh is the same, else each rank some."""
        number, _, part = map(int, key.split("."))
        fragment = self.fragments[number]
        header = Contribution.from_json(self._saved["parts"][key]["header"])
        if header.parts == fragment.num_parts:
            return fragment.part == part
        return part % world_size() == rank()
