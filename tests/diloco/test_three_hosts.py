"""Three hosts at 1 Gbit train a 30M model: one process, FSDP of 2, a pipeline of 2; all as a user would start them.

After 20 rounds all have the server's values, bit for bit; and the same bits when server and one worker were killed in
between and started again.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from safetensors import safe_open

from forgather.checkpoint.storage import raw_bytes
from tests.lan import DECOY, Host, HostProcess, Lan, missing

pytestmark = [
    pytest.mark.soak,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(bool(missing()), reason=f"{missing()}"),
]

PROJECT = Path(__file__).parents[2] / "configs" / "tiny_llama"
ROUNDS, SYNC_EVERY, PORT = 20, 2, 8512
MODEL = ["model_project.config=30M.yaml"]
FORGATHER = [sys.executable, "-m", "forgather"]
MESHES = {"one": ["--nproc", "1"], "shards": ["--nproc", "2"], "stages": ["--nproc", "2", "mesh.pipeline=2"]}


class Training:
    """A server on the first of three hosts and a worker on each; everything of it is in `folder`."""

    def __init__(self, lan: Lan, folder: Path) -> None:
        self.hosts = lan.hosts
        self.folder = folder
        self.token_file = folder / "server" / "token"
        self._open = ExitStack()

    def start_server(self) -> HostProcess:
        command = [*FORGATHER, "-p", str(PROJECT), "diloco", "server", "-n", "3", "-o", str(self.folder / "server")]
        command += ["--host", self.hosts[0].address, "--port", str(PORT), "--lease", "600"]
        command += ["--sync-every", str(SYNC_EVERY), "--upload", "bf16", "--download", "bf16", *MODEL]
        command += ["--work-units", "0"]  # who asks first would decide who trains which rows
        server = self._start(self.hosts[0], "server", command)
        self._until(lambda: self.status() is not None, server)
        return server

    def start_worker(self, number: int) -> HostProcess:
        name = list(MESHES)[number]
        command = [*FORGATHER, "-p", str(PROJECT), "train", *MESHES[name], "--steps", str(ROUNDS * SYNC_EVERY)]
        command += ["--diloco-server", f"{self.hosts[0].address}:{PORT}", "--diloco-worker", name, "--run-name", name]
        command += ["--runs-dir", str(self.folder), "--seed", str(number), "--save-every", "5"]
        command += ["--no-diloco-leased"]
        command += ["--eval-every", "null", "--sample-every", "null", "--eval-rows", "8"]
        command += ["--rows-per-step", "4", "--block-length", "64", "--threads", "1", *MODEL]
        return self._start(self.hosts[number], name, command)

    def status(self) -> dict[str, Any] | None:
        """What the server says of itself, asked on its host; None while it does not answer."""
        token = self.token_file.read_text(encoding="utf-8").strip() if self.token_file.exists() else ""
        code = (
            "import sys, urllib.request as u; headers = {'Authorization': 'Bearer ' + sys.stdin.read()}; "
            "print(u.urlopen(u.Request(sys.argv[1], headers=headers), timeout=5).read().decode())"
        )
        url = f"http://{self.hosts[0].address}:{PORT}/v1/status"
        command = self.hosts[0].inside([sys.executable, "-c", code, url])
        asked = subprocess.run(command, input=token, capture_output=True, text=True, check=False)
        return json.loads(asked.stdout) if asked.returncode == 0 else None

    def wait_for_version(self, number: int, *processes: HostProcess) -> None:
        self._until(lambda: min((self.status() or {"versions": [0]})["versions"]) >= number, *processes)

    def end(self, workers: Mapping[str, HostProcess], server: HostProcess) -> set[str]:
        """The digests of the weights that all machines have in the end."""
        for name, process in workers.items():
            assert process.wait(900) == 0, self.said(name)
        status = self.status()
        assert status is not None
        assert status["versions"] == [ROUNDS]
        server.kill()
        return {self.digest(name) for name in [*workers, "server"]}

    def digest(self, name: str) -> str:
        """Of the weights in the newest checkpoint of a run."""
        target = self.folder / f"{name}-exported"
        command = [*FORGATHER, "export", str(self.folder / name), str(target)]
        subprocess.run(command, check=True, capture_output=True)
        digest = xxhash.xxh3_64()
        for file in sorted(target.glob("*.safetensors")):
            with safe_open(file, "pt") as tensors:
                for key in sorted(tensors.keys()):
                    tensor: torch.Tensor = tensors.get_tensor(key)
                    digest.update(key.encode())
                    digest.update(raw_bytes(tensor.contiguous()))
        return digest.hexdigest()

    def said(self, name: str) -> str:
        return (self.folder / f"{name}.out").read_text(encoding="utf-8")[-3000:]

    def _start(self, host: Host, name: str, command: list[str]) -> HostProcess:
        self.folder.mkdir(parents=True, exist_ok=True)
        out = self._open.enter_context((self.folder / f"{name}.out").open("ab"))
        environment = {"FORGATHER_DILOCO_TOKEN_FILE": str(self.token_file)}
        return self._open.enter_context(host.start(command, stdout=out, stderr=out, env=_environ(environment)))

    def _until(self, condition: Any, *processes: HostProcess) -> None:
        deadline = time.monotonic() + 600
        while not condition():
            assert time.monotonic() < deadline, "it takes too long"
            assert all(process.popen.poll() is None for process in processes), "a process has ended"
            time.sleep(0.2)

    def __enter__(self) -> "Training":
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.close()


def _environ(more: Mapping[str, str]) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", **more}


def test_three_unequal_workers_end_with_the_servers_bits_also_when_machines_are_killed(tmp_path):
    with Lan(3, rate="1gbit") as lan:
        with Training(lan, tmp_path / "undisturbed") as training:
            server = training.start_server()
            workers = {name: training.start_worker(number) for number, name in enumerate(MESHES)}
            undisturbed = training.end(workers, server)
            assert len(undisturbed) == 1
            # By the default route go questions for a name server that is not there, and nothing else.
            assert all(host.sent(DECOY) < 100_000 < 10_000_000 < host.sent() for host in lan.hosts)
        with Training(lan, tmp_path / "killed") as training:
            server = training.start_server()
            workers = {name: training.start_worker(number) for number, name in enumerate(MESHES)}
            training.wait_for_version(7, server, *workers.values())
            server.kill()
            workers["shards"].kill()
            server = training.start_server()
            workers["shards"] = training.start_worker(1)
            assert training.end(workers, server) == undisturbed
