"""A DiLoCo server's process from when everything is known to be sound until it ends: values, signals, what it says."""

import asyncio
import math
import os
import signal
import socket
import ssl
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from forgather.checkpoint.run_folder import RunFolder
from forgather.cli.diloco_model import ServedModel, passed_over
from forgather.cli.options import Options
from forgather.diloco.address import naming
from forgather.diloco.application import serving
from forgather.diloco.certificates import is_for
from forgather.diloco.combine import Guard
from forgather.diloco.coordinator import Coordinator
from forgather.diloco.outer import Outer
from forgather.diloco.package_service import PackageArchive
from forgather.diloco.record import RoundRecord, Sink
from forgather.diloco.settings import Settings
from forgather.diloco.views import views
from forgather.distributed.network import interfaces
from forgather.errors import EXIT_OK, EXIT_RESUMABLE, CheckpointError
from forgather.metrics.sinks import JsonLines, TensorBoard


@dataclass
class Serving:
    """One server from its start to its end."""

    options: Options
    model: ServedModel
    goes_on: bool  # with the model and the values that are in the folder
    settings: Settings
    outer: Outer
    run: RunFolder
    tls: ssl.SSLContext | None
    token: str | None = field(repr=False)
    token_file: Path | None
    received: signal.Signals | None = None

    async def serve(self) -> int:
        """Serve until told to end; the exit code."""
        options, run = self.options, self.run
        values, buffers = self.model.first_values(options.seed or 0)
        if "OMP_NUM_THREADS" not in os.environ:
            # What it computes goes piece by piece through a core's cache, beside threads that send and receive: divided
            # among more threads each piece would wait for the slowest. It takes twice as long then.
            torch.set_num_threads(1)
        coordinator = Coordinator(
            values,
            self.settings,
            self.outer,
            run,
            num_workers=options.num_workers,
            min_workers=options.min_workers,
            round_timeout_s=options.round_timeout or None,
            save_every=options.save_every,
            guard=Guard(options.norm_guard),
            constants=buffers,
            package=self.model.folder.dir,
        )
        del values, buffers
        self._catch_signals(coordinator)
        package = PackageArchive(self.model.folder.dir)
        sinks: list[Sink] = [JsonLines(run.logs / "metrics.jsonl"), TensorBoard(run.logs / "tensorboard")]
        host, port = options.host, options.port
        async with serving(coordinator, self.token, host, port, tls=self.tls, extra=views(package)) as (_, bound):
            for line in self._greeting(bound):
                run.say(line)
            record = asyncio.create_task(RoundRecord(coordinator, sinks).follow())
            await coordinator.stopped.wait()
            await record
        if coordinator.trouble is not None:
            raise CheckpointError(
                f"the server ends, and its last state is not saved: {coordinator.trouble}",
                fix="mend that, and start the same command: workers still have what is missing, and send it again",
            )
        run.say(f"saved at step {coordinator.publisher.step}; the same command goes on")
        return EXIT_OK if self.received is None else EXIT_RESUMABLE

    def _catch_signals(self, coordinator: Coordinator) -> None:
        loop = asyncio.get_running_loop()

        def stop(number: signal.Signals) -> None:
            again = " (Ctrl-C again ends it at once)" if number == signal.SIGINT else ""
            self.run.say(f"{number.name}: the server saves and ends{again}")
            self.received = self.received or number
            loop.remove_signal_handler(signal.SIGINT)
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            coordinator.shutdown()

        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                loop.add_signal_handler(number, stop, number)

    def _greeting(self, port: int) -> Iterator[str]:
        settings, model = self.settings, self.model
        count = sum(math.prod(shape) for shape in model.shapes.values())
        if self.goes_on:
            yield f"the model in {self.run.dir}, made before: {count:,} parameters"
            if given := passed_over(self.options):
                yield f"without effect: {' and '.join(given)}, as model and values are there; -o ANOTHER begins anew"
        else:
            origin = f"weights drawn with seed {self.options.seed or 0}" if model.is_drawn else "with its weights"
            yield f"model {model.path}: {count:,} parameters, {origin}"
        fragments = len(settings.fragments)
        how = f"every {settings.sync_every} steps" + (f" in {fragments} fragments" if fragments > 1 else "")
        if settings.round_seconds is not None:
            how = f"every {settings.round_seconds:g} s"
        yield f"exchanges {how}, {settings.upload} up, {settings.download} down; outer {self.outer.describe()}"
        scheme = "http" if self.tls is None else "https"
        for address, interface in addresses(self.options.host):
            shown = f"[{address}]" if ":" in address else address
            where = f" ({interface})" if interface else ""
            yield f"listening at {scheme}://{shown}:{port}{where}; workers: --diloco-server {shown}:{port}"
            yield from self._foreign_name(address)
        if self.token_file is not None:
            yield f"token in {self.token_file}; workers need a copy of it: {naming('token_file', 'COPY')}"
        else:
            yield "no token is asked for: whoever is on this machine may change the model"

    def _foreign_name(self, address: str) -> Iterator[str]:
        if self.tls is not None and not is_for(Path(self.options.tls_cert), address):
            yield f"warning: {self.options.tls_cert} is not for {address}, so that workers refuse it there"


def addresses(host: str) -> list[tuple[str, str]]:
    """By which addresses workers reach a server that listens on `host`, and the interfaces that have them."""
    if host not in ("0.0.0.0", "::", ""):
        return [(host, next((each.name for each in interfaces() if str(each.address) == host), ""))]
    found = [each for each in interfaces() if host != "0.0.0.0" or each.address.version == 4]
    outside = [each for each in found if not each.address.is_loopback]
    return [(str(each.address), each.name) for each in outside or found] or [(socket.gethostname(), "")]
