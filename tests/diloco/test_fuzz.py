"""Whatever comes, the server answers with a refusal or not at all, stays up, and its values stay what they were."""

import http.client
import json
import random
import socket
from pathlib import Path

import torch

from forgather.diloco.frame import pack_header
from tests.diloco.running_server import RunningServer, running_server, settings_of
from tests.diloco.speaking import Speaker, ask, body_of
from tests.diloco.test_server import HELD, come, put_head, values

NUM_MESSAGES = 300


def mutated(generator: random.Random, data: bytes) -> bytes:
    """`data` with bytes changed, taken out, put in, or cut off."""
    changed = bytearray(data)
    for _ in range(generator.randint(1, 4)):
        at = generator.randrange(len(changed) + 1)
        match generator.randrange(4):
            case 0 if at < len(changed):
                changed[at] ^= 1 << generator.randrange(8)
            case 1:
                del changed[at : at + generator.randint(1, 20)]
            case 2:
                changed[at:at] = generator.randbytes(generator.randint(1, 20))
            case _:
                del changed[at:]
    return bytes(changed)


def strange(generator: random.Random, value: object) -> object:
    """JSON like `value`, in which something is of another kind or another number."""
    if isinstance(value, dict) and value and generator.random() < 0.8:
        key = generator.choice(sorted(value))
        return {name: strange(generator, each) if name == key else each for name, each in value.items()}
    if isinstance(value, list) and value and generator.random() < 0.8:
        at = generator.randrange(len(value))
        return [strange(generator, each) if number == at else each for number, each in enumerate(value)]
    others = [None, -1, 2**40, 2**70, 1.5, "", "x" * 1000, [], {}, [[]] * 50, True, [value], {"a": value}]
    return generator.choice(others)


def put(server: RunningServer, worker: Speaker, body: bytes) -> int:
    """The status of an answer to a contribution with this body; 0 where the connection was closed instead."""
    try:
        return ask(server, "PUT", "/v1/contributions/a/0/0/0", body, key=worker.key).status
    except (OSError, http.client.HTTPException):
        return 0


def require_unharmed(server: RunningServer) -> None:
    status = server.status()
    assert status["versions"] == [0]
    assert status["spool"] == {"memory_bytes": 0, "disk_bytes": 0}
    for name, value in values(0).items():
        assert torch.equal(server.published(name), value)


def test_contributions_that_are_none(tmp_path: Path) -> None:
    generator = random.Random(0)
    with running_server(tmp_path, values(0), num_workers=2, serve={"idle_s": 0.5}) as server:
        worker = come(server, "a")[0]
        header, payload = worker.message(values(1), parts=2)
        said = header.to_json()
        good = body_of(header, payload)
        seen = set()
        for number in range(NUM_MESSAGES):
            other = strange(generator, said)
            body = mutated(generator, good) if number % 2 else pack_header(other) + payload  # type: ignore[arg-type]
            status = put(server, worker, body)
            assert status in (0, 200, 400, 408, 409, 413, 422), body[:300]
            seen.add(status)
        assert {400, 422} <= seen
        server.call(lambda: server.coordinator.controls.kick("a"))  # with what was held of it
        require_unharmed(server)
        b, c = come(server, "b", "c")
        b.contribute(0, values(1))
        assert c.contribute(0, values(1)).json == HELD


def test_rows_that_nobody_has_had(tmp_path: Path) -> None:
    """They would end the order of the rows, or keep the ledger busy for ever."""
    generator = random.Random(3)
    with running_server(tmp_path, values(0), settings_of(values(0), work_units=5), num_workers=2) as server:
        worker = come(server, "a")[0]
        question = {"worker": "a", "sequence": 0, "rows": 10, "order": "o", "at_least": 2, "held": []}
        assert ask(server, "POST", "/v1/units", question, key=worker.key).json["leases"] == [[0, 2]]
        before = server.status()["ledger"]
        for _ in range(50):
            first, length = generator.choice([0, 1, 2, 2**40, 2**61]), generator.choice([3, 10**6, 2**61])
            assert worker.contribute(0, values(1), consumed={str(first): length}).status == 422
        assert worker.contribute(0, values(1), consumed={str(row): 1 for row in range(70_000)}).status == 422
        assert server.status()["ledger"] == before
        require_unharmed(server)
        assert worker.contribute(0, values(1), consumed={"0": 2}).json == HELD


def test_requests_that_are_none(tmp_path: Path) -> None:
    generator = random.Random(1)
    with running_server(tmp_path, values(0), num_workers=2) as server:
        worker = come(server, "a")[0]
        want = {"slices": [["a.bias", [0], [48]]], "at_least": 0, "have": [0, ""], "wait_s": 0.0}
        bodies = {
            "/v1/values/0": want,
            "/v1/workers": {"worker": "b", "key": "k" * 16, "host": "", "mesh": ""}
            | dict.fromkeys(("package", "tokenizer", "data")),
            "/v1/workers/a/heartbeat": {"steps": 1, "loss": 2.0, "steps_per_s": 1.0, "tokens_per_s": 1.0},
            "/v1/units": {"worker": "a", "sequence": 0, "rows": 1, "order": ""},
            "/v1/control/command": {"command": "save", "worker": "a"},
            "/v1/control/kick": {"worker": "nobody"},
            "/v1/control/set": {"outer_lr": -1.0, "colour": 0},
        }
        for number in range(NUM_MESSAGES):
            path = generator.choice(sorted(bodies))
            body = json.dumps(strange(generator, bodies[path]))
            data = mutated(generator, body.encode()) if number % 2 else body.encode()
            reply = ask(server, "POST", path, data, key=worker.key)
            assert reply.status in (200, 204, 400, 403, 404, 409, 413, 422), (path, body[:300], reply)
            if reply.status >= 400:
                assert reply.json["error"]
        require_unharmed(server)
        assert worker.beat().status == 200


def test_bytes_that_are_no_http(tmp_path: Path) -> None:
    generator = random.Random(2)
    with running_server(tmp_path, values(0), num_workers=2, serve={"idle_s": 0.5}) as server:
        worker = come(server, "a")[0]
        for _ in range(60):
            head = mutated(generator, put_head(worker, 1000))
            with socket.create_connection((server.host, server.port), timeout=10) as connection:
                connection.sendall(head + generator.randbytes(generator.randrange(200)))
        require_unharmed(server)
        assert worker.beat().status == 200
