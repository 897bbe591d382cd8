"""One fragment on one rank: the values it began with, what a codec has lost, and how new values enter the parameters.

All numbers that are exchanged are fp32 and on the CPU, in one run of memory a fragment; parameters may be on a device
or in bf16. Only slices that this rank owns are kept; who else holds them is given the result.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from forgather.diloco.codec import codec
from forgather.diloco.messages import Content, Contribution, Identity, Slice, Version
from forgather.diloco.payload import Payload
from forgather.diloco.slices import Holding, Holdings
from forgather.errors import TrainingError


@dataclass
class Part:
    """One part of a contribution as it is sent, and sent again as long as it could be needed."""

    identity: Identity
    header: Contribution
    payload: Payload
    landed: int | None = None  # the number of a version that has it; None as long as none is known

    def moved_to(self, round: int, landed: int | None = None) -> "Part":
        """The same for another round, or one that has `landed`."""
        own = self.identity
        return Part(Identity(own.worker, round, own.fragment, own.part), self.header, self.payload, landed)


class Numbers:
    """Flat fp32 memory with a view for each slice, by name."""

    def __init__(self, holdings: Sequence[Holding], *, is_pinned: bool = False) -> None:
        sizes = [holding.slice.numel for holding in holdings]
        self.flat = torch.zeros(sum(sizes), pin_memory=is_pinned)
        self.views = {
            holding.slice.name: view for holding, view in zip(holdings, torch.split(self.flat, sizes), strict=True)
        }

    def __getitem__(self, name: str) -> Tensor:
        return self.views[name]


class LocalFragment:
    """What this rank has of fragment `number`, whose parameters are called `names`."""

    def __init__(self, number: int, names: Sequence[str], holdings: Holdings, *, upload: str) -> None:
        self.number = number
        self.names = tuple(names)
        self.upload = upload
        self.holdings = holdings
        self.held = holdings.of(names)
        self.owned = [holding for holding in self.held if holding.is_owned]
        self.part, self.num_parts = holdings.part_of(names)
        self._spare: list[Numbers] = []
        self._spare_payload: Tensor | None = None
        self.anchor = self.room()
        # What the codec lost; fp32 loses nothing.
        self.residual = None if upload == "fp32" else Numbers(self.owned)
        self.version: Version | None = None  # of the anchor; ranks that own nothing of it do not know it
        self.number_of_version = 0  # which all ranks know
        self.since = 0  # the step after which it was sent last
        self.kept: list[Part] = []  # sent, and not in a durable version as far as is known

    @property
    def slices(self) -> list[Slice]:
        """What this rank sends and asks for."""
        return [holding.slice for holding in self.owned]

    def room(self) -> Numbers:
        """Memory for a value of each number that this rank owns, with whatever is in it.

        The first touch of fresh memory costs several times what a copy does, so what one exchange is done with serves
        the next.
        """
        if self._spare:
            return self._spare.pop()
        is_on_device = any(holding.local.device.type == "cuda" for holding in self.owned)
        return Numbers(self.owned, is_pinned=is_on_device)

    def give_back(self, numbers: Numbers) -> None:
        """Nobody needs these any more. An exchange takes two: what is sent, and what comes."""
        if len(self._spare) < 2:
            self._spare.append(numbers)

    @torch.no_grad()
    def snapshot(self) -> Numbers:
        """The parameters as they are now."""
        taken = self.room()
        for holding in self.owned:
            taken[holding.slice.name].copy_(holding.local.reshape(-1), non_blocking=True)
        self._wait_for_copies()
        return taken

    def _wait_for_copies(self) -> None:
        for device in {holding.local.device for holding in self.owned if holding.local.device.type != "cpu"}:
            torch.get_device_module(device).synchronize(device)

    @torch.no_grad()
    def require_finite(self, local: Numbers) -> None:
        """TrainingError, naming the parameter, unless all numbers are finite."""
        # Both are NaN where one number is: a tenth of the time of looking at each, and no memory beside.
        if not local.flat.numel() or all(bool(each.isfinite()) for each in local.flat.aminmax()):
            return
        for name, view in local.views.items():
            if not bool(torch.isfinite(view).all()):
                raise TrainingError(
                    f"{name} has numbers that are not finite, and they are not sent to the server",
                    fix="see which step made them: lower the learning rate, or clip gradients; the run's newest "
                    "checkpoint is from before it was stopped",
                )

    def part_of(
        self, identity: Identity, content: Content, *, tokens: int, steps: int, consumed: Mapping[str, int], origin: str
    ) -> Part:
        """This rank's part of a contribution, whose payload is still to be written."""
        assert self.version is not None, "differences are from a version"
        header = Contribution(
            base=self.version,
            content=content,
            codec=self.upload,
            slices=self.slices,
            parts=self.num_parts,
            tokens=tokens,
            steps=steps,
            consumed=consumed,
            origin=origin,
        )
        num_bytes = sum(self._lengths())
        spare, self._spare_payload = self._spare_payload, None
        if spare is None or spare.nbytes != num_bytes:
            spare = torch.empty(num_bytes, dtype=torch.uint8)
        return Part(identity, header, Payload(spare))

    @torch.no_grad()
    def write(self, part: Part, local: Numbers) -> None:
        """Write its payload: how far `local` is from the anchor; the residual takes what the codec loses.

        What counts as the beginning is the anchor as the parameters have it: of bf16 ones its rounding would otherwise
        be sent as if it had been learned.
        """
        encoder, payload = codec(self.upload), part.payload
        with payload.written():
            for holding, out in zip(self.owned, torch.split(payload.data, self._lengths()), strict=True):
                name = holding.slice.name
                residual = None if self.residual is None else self.residual[name]
                if part.header.content == "differences":
                    steps = encoder.encoding(self._begun_with(holding), out, residual, minus=local[name])
                elif holding.local.dtype == torch.float32:
                    steps = encoder.encoding(local[name], out)  # a difference and back is not exact
                else:
                    steps = encoder.encoding(self.anchor[name], out, minus=self._begun_with(holding) - local[name])
                for num_bytes in steps:
                    payload.grow(num_bytes)

    def _lengths(self) -> list[int]:
        """How long the encoding of each slice is."""
        return [codec(self.upload).encoded_bytes(holding.slice.numel) for holding in self.owned]

    def _begun_with(self, holding: Holding) -> Tensor:
        anchor = self.anchor[holding.slice.name]
        dtype = holding.local.dtype
        return anchor if dtype == torch.float32 else anchor.to(dtype).float()

    @torch.no_grad()
    def take(self, new: Numbers, sent: Numbers | None, alpha: float) -> None:
        """Let `new` be the anchor, and enter the parameters. Collective over the ranks that share parameters.

        With `sent`, what the parameters were when they were sent, `alpha` of the progress since then is kept on top;
        without, they become the new values exactly.
        """
        results: dict[str, Tensor] = {}
        for holding in self.owned:
            name = holding.slice.name
            values = new[name]
            if sent is not None:
                # Of fp32 parameters this is their own memory, which costs a third of taking more.
                progress = holding.local.reshape(-1).float().sub_(sent[name].to(holding.local.device))
                values = torch.add(values.to(holding.local.device), progress, alpha=alpha, out=progress)
            if len(holding.holders) > 1:
                results[name] = values.cpu()
            if values.data_ptr() != holding.local.data_ptr():
                holding.local.copy_(values.view(holding.slice.sizes), non_blocking=True)
        others = [holding for holding in self.held if not holding.is_owned]
        results |= {holding.slice.name: torch.empty(holding.slice.numel) for holding in others}
        self.holdings.share(self.held, results)
        for holding in others:
            holding.local.copy_(results[holding.slice.name].view(holding.slice.sizes))
        self._wait_for_copies()
        self.give_back(self.anchor)
        self.anchor = new

    def keep(self, part: Part) -> None:
        """Have `part` ready to be sent again; one for the same round and part number is replaced."""
        others = [each for each in self.kept if each.identity != part.identity]
        self.kept = sorted([*others, part], key=lambda each: (each.identity.round, each.identity.part))

    def forget(self, durable: int) -> None:
        """The server has versions up to `durable` on its disk: what made them is not needed again.

        Which version has a contribution is not told by its round: on an asynchronous server others come before it.
        """
        done = [part for part in self.kept if part.landed is not None and part.landed <= durable]
        self.kept = [part for part in self.kept if part.landed is None or part.landed > durable]
        if done:
            self._spare_payload = done[-1].payload.data
