"""The server over its wire: what workers bring becomes what all of them get."""

from pathlib import Path

import torch

from tests.diloco.running_server import running_server
from tests.diloco.speaking import Speaker, whole


def one(value: float) -> dict[str, torch.Tensor]:
    return {"w": torch.full((3,), value)}


def test_the_mean_of_two_workers_becomes_the_values_of_both(tmp_path: Path) -> None:
    with running_server(tmp_path, one(0.0), num_workers=2) as server:
        workers = [Speaker(server, "a"), Speaker(server, "b")]
        for worker in workers:
            assert worker.register().status == 200
        for worker, moved in zip(workers, (1.0, 3.0), strict=True):
            reply = worker.contribute(0, one(moved))
            assert reply.status == 200 and reply.json == {"state": "held", "missing_parts": 0}
        for worker in workers:
            version, values = worker.taken(one(9.0), whole(one(0.0)), at_least=1)
            assert version.number == 1
            assert torch.equal(values["w"], torch.full((3,), -2.0))
        assert server.status()["versions"] == server.status()["durable"] == [1]
