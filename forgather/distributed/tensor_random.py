"""Random numbers where ranks share a layer: the same where they compute the same, others where each has its part.

All ranks of a tensor group draw from one stream, so what they compute alike (a dropout after the embedding) stays
alike. Within a part that is split, each draws from a stream of its own, or every rank's heads would drop the same; the
common stream goes on behind it as if one number had been drawn.
"""

import hashlib

import torch
from torch import nn


class OwnStream:
    """A stream of this rank's own, between `enter` and `leave`. Recomputed activations draw the same again."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self._common: list[torch.Tensor] | None = None

    def enter(self, device: torch.device) -> None:
        """Go over to the own stream; nothing where it is in use."""
        if self._common is not None:
            return
        number = int(torch.randint(2**62, (), device="cpu"))
        generators = _generators(device)
        self._common = [generator.get_state() for generator in generators]
        digest = hashlib.blake2b(f"tensor {number} {self.rank}".encode(), digest_size=7).digest()
        for generator in generators:
            generator.manual_seed(int.from_bytes(digest, "big"))
        self._device = device

    def leave(self) -> None:
        """Go back to the common stream; nothing where it is in use."""
        if self._common is None:
            return
        for generator, state in zip(_generators(self._device), self._common, strict=True):
            generator.set_state(state)
        self._common = None


def drops_out(module: nn.Module) -> bool:
    """Whether something in `module` draws in training: a Dropout, or an attention with a probability of its own."""
    return any(
        isinstance(value, float) and value > 0
        for part in module.modules()
        for name, value in part.__dict__.items()
        if "dropout" in name or (name == "p" and isinstance(part, nn.modules.dropout._DropoutNd))
    )


def _generators(device: torch.device) -> list[torch.Generator]:
    own = [torch.default_generator]
    if device.type == "cuda":
        own.append(torch.cuda.default_generators[device.index or 0])
    return own
