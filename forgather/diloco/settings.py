"""What must be the same on all machines of a training."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Self

from forgather.diloco.frame import ProtocolError

PROTOCOL = 3

Mode = Literal["sync", "async"]


@dataclass(frozen=True)
class Settings:
    """What must be the same on all machines. The server's are in force, and workers follow them."""

    parameters: Mapping[str, Sequence[int]]  # name: shape, in the model's order
    fragments: Sequence[Sequence[str]]  # names, in the model's order
    mode: Mode = "sync"
    sync_every: int = 500  # inner steps between two exchanges of a fragment: H
    upload: str = "bf16"  # codec of what workers send
    download: str = "bf16"  # codec of what comes back
    delay: int = 0  # inner steps that a worker trains on while an exchange is under way
    alpha: float = 1.0  # which part of the progress made meanwhile is kept on top of the new values
    dylu: bool = False  # whether slower workers make fewer steps between exchanges
    round_seconds: float | None = None  # rounds of fixed time instead of fixed steps
    heartbeat_s: float = 5.0
    lease_s: float = 30.0  # a worker that is silent for so long is gone
    package: str | None = None  # digests; null for what nobody has said yet
    tokenizer: str | None = None
    data: str | None = None
    work_units: int = 0  # units that the order of samples is leased in; 0: each worker has its own order
    training: str = ""  # which training it is: the name that a server gives it in the beginning, for good
    protocol: int = PROTOCOL

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {
            "parameters": {name: list(shape) for name, shape in self.parameters.items()},
            "fragments": [list(names) for names in self.fragments],
        }

    @classmethod
    def from_json(cls, value: Any) -> Self:
        known = {each.name for each in fields(cls)}
        if not isinstance(value, dict) or value.get("protocol") != PROTOCOL:
            spoken = value.get("protocol") if isinstance(value, dict) else None
            raise ProtocolError(
                f"the server, or the checkpoint of a worker, speaks protocol {spoken}, and this version {PROTOCOL}",
                fix="install the same version of forgather on all machines, and begin the run with it",
            )
        try:
            return cls(**{name: each for name, each in value.items() if name in known})
        except TypeError as error:
            raise ProtocolError(f"these are no settings of a training: {error}") from None
