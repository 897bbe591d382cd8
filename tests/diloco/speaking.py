"""Speaks to a server as a worker does, request by request, so that a test can also say what no worker would."""

import http.client
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import xxhash
from torch import Tensor

from forgather.checkpoint.storage import raw_bytes
from forgather.diloco.codec import codec
from forgather.diloco.encoding import BLOCK
from forgather.diloco.frame import pack_header
from forgather.diloco.messages import Contribution, Slice, Values, Version, WantValues
from forgather.diloco.pieces import box_of
from forgather.diloco.slices import covering_ranges
from tests.diloco.running_server import RunningServer

NO_VERSION = Version(0, "")


@dataclass
class Reply:
    status: int
    body: bytes
    headers: Mapping[str, str]

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def ask(
    server: RunningServer, method: str, path: str, body: bytes | Any = None, *, key: str = "", timeout_s: float = 20.0
) -> Reply:
    """One request on a connection of its own; a body that is no bytes is sent as JSON."""
    connection = http.client.HTTPConnection(server.host, server.port, timeout=timeout_s)
    try:
        headers = {} if server.token is None else {"Authorization": f"Bearer {server.token}"}
        if key:
            headers["X-Worker-Key"] = key
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        connection.request(method, path, data, headers)
        response = connection.getresponse()
        return Reply(response.status, response.read(), dict(response.headers))
    finally:
        connection.close()


def whole(values: Mapping[str, Tensor]) -> list[Slice]:
    """A slice for each parameter, all of it."""
    return [Slice(name, (0,) * value.dim(), tuple(value.shape)) for name, value in values.items()]


def body_of(header: Contribution, payload: bytes) -> bytes:
    """A part of a contribution as it is sent."""
    return pack_header(header.to_json()) + payload + xxhash.xxh3_64(payload).digest()


@dataclass
class Speaker:
    """A worker by name. `base` is the version that it says its contributions began with, by fragment."""

    server: RunningServer
    name: str
    key: str = ""

    def __post_init__(self) -> None:
        self.key = self.key or f"key-of-{self.name}-0123456789"

    def register(self, **others: Any) -> Reply:
        request = {"worker": self.name, "key": self.key, "host": "here", "mesh": ""} | others
        request = {"package": None, "tokenizer": None, "data": None} | request
        return ask(self.server, "POST", "/v1/workers", request)

    def beat(self, steps: int = 0, **others: Any) -> Reply:
        return ask(self.server, "POST", f"/v1/workers/{self.name}/heartbeat", {"steps": steps} | others, key=self.key)

    def leave(self) -> Reply:
        return ask(self.server, "DELETE", f"/v1/workers/{self.name}", key=self.key)

    def contribute(
        self,
        round: int,
        tensors: Mapping[str, Tensor],
        *,
        fragment: int = 0,
        part: int = 0,
        slices: Sequence[Slice] | None = None,
        content: str = "differences",
        upload: str = "fp32",
        base: Version | None = None,
        **others: Any,
    ) -> Reply:
        """Send a part of a contribution: the `slices` of `tensors`, or all of them."""
        header, payload = self.message(
            tensors, slices=slices, content=content, upload=upload, base=base or Version(round, ""), **others
        )
        path = f"/v1/contributions/{self.name}/{round}/{fragment}/{part}"
        return ask(self.server, "PUT", path, body_of(header, payload), key=self.key)

    def message(
        self,
        tensors: Mapping[str, Tensor],
        *,
        slices: Sequence[Slice] | None = None,
        content: Any = "differences",
        upload: str = "fp32",
        base: Version = NO_VERSION,
        **others: Any,
    ) -> tuple[Contribution, bytes]:
        """The header and the payload of a part."""
        slices = whole(tensors) if slices is None else slices
        encoder, payload = codec(upload), b""
        for each in slices:
            values = box_of(tensors[each.name], each).contiguous().view(-1).float()
            out = torch.empty(encoder.encoded_bytes(values.numel()), dtype=torch.uint8)
            encoder.encode(values, out, None)
            payload += bytes(raw_bytes(out))
        header = Contribution(base, content, upload, slices)
        return replace(header, **others), payload

    def values(
        self,
        slices: Sequence[Slice],
        *,
        at_least: int = 0,
        have: Version | None = None,
        fragment: int = 0,
        wait_s: float = 10.0,
    ) -> tuple[Values, bytes, list[bytes]] | Reply:
        """The header, payload and digests of an answer, or a reply that is none."""
        want = WantValues(slices, at_least, have, wait_s)
        reply = ask(self.server, "POST", f"/v1/values/{fragment}", want.to_json(), key=self.key)
        if reply.status != 200:
            return reply
        length = int.from_bytes(reply.body[:4], "big")
        last = len(reply.body) - 8 * len(slices)
        digests = [reply.body[at : at + 8] for at in range(last, len(reply.body), 8)]
        return Values.from_json(json.loads(reply.body[4 : 4 + length])), reply.body[4 + length : last], digests

    def taken(
        self,
        held: Mapping[str, Tensor],
        slices: Sequence[Slice],
        *,
        at_least: int = 0,
        have: Version | None = None,
        fragment: int = 0,
    ) -> tuple[Version, dict[str, Tensor]]:
        """Whole parameters in which the slices are as the server says: what a worker that holds `held` makes of it."""
        answer = self.values(slices, at_least=at_least, have=have, fragment=fragment)
        assert not isinstance(answer, Reply), answer
        header, payload, digests = answer
        result = {name: value.clone() for name, value in held.items()}
        at = 0
        for each, digest in zip(slices, digests, strict=True):
            value = result[each.name]
            if header.content == "change":
                decoder, whole_change = codec(header.codec), torch.zeros_like(value)
                for start, stop in covering_ranges(tuple(value.shape), each, BLOCK):
                    length = decoder.encoded_bytes(stop - start)
                    encoded = torch.frombuffer(bytearray(payload[at : at + length]), dtype=torch.uint8)
                    decoder.decode(encoded, stop - start, whole_change.view(-1)[start:stop])
                    at += length
                box_of(value, each).add_(box_of(whole_change, each))
            else:
                box = box_of(value, each)
                raw = bytearray(payload[at : at + 4 * each.numel])
                box.copy_(torch.frombuffer(raw, dtype=torch.float32).view(box.shape))
                at += 4 * each.numel
            mine = xxhash.xxh3_64(raw_bytes(box_of(value, each).contiguous())).digest()
            assert mine == digest, f"{each.name} has other values than the server"
        assert at == len(payload), "an answer has what was asked for, and no more"
        return header.version, result
