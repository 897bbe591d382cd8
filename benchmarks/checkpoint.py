"""What do saves and loads cost, against plain copies and plain files of the same bytes?

    python benchmarks/checkpoint.py                  # about 3 minutes on two cores; 1 GB of state, 2 ranks
    python benchmarks/checkpoint.py --dose           # seconds: all of it runs, the figures say little
    python benchmarks/checkpoint.py --dir /dev/shm   # without the disk

The state is a sharded model with AdamW's. Measured in turns, the median over the turns of a ratio within each:

- the stall of an asynchronous save, against `torch._foreach_copy_` of the same tensors into memory that was touched
- a step while the checkpoint is being written, against one while nothing is
- a save that is waited for, against writing the same bytes to a file and syncing it
- a resume (find the newest, verify every byte, load it), against reading the same bytes into the same memory and
  digesting them, which is as fast as one that verifies can be; and against reading them alone, which verifies nothing;
  warm, and after the cache has forgotten the files
- an export, against copying its files and syncing them; and the memory that it takes beside an idle process

One thread a rank. Ends with 1 when a bar is missed.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from interleaved import machine_line
from memory import figures_of, peak_mb, reset_peak, resident_mb
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from verdict import Bar, print_verdict

from forgather.checkpoint.keep import Keep
from forgather.checkpoint.part import blocks_of, write_all
from forgather.checkpoint.run_folder import RunFolder
from forgather.checkpoint.state import TrainState
from forgather.checkpoint.storage import BLOCK, local_part, raw_bytes, read_all
from forgather.checkpoint.store import CheckpointStore
from forgather.conversion.export import export
from forgather.distributed.collectives import barrier
from forgather.distributed.environment import leave_group
from forgather.durable import sync

RANKS = 2
MAX_STALL, ALLOWED_STALL_S, MAX_STEP, MIN_SAVE, MIN_EXPORT, MAX_SHARDS = 1.3, 0.02, 1.5, 0.7, 0.7, 1.5
# A warm read is a copy from memory to memory. A digest goes over memory once more, so what a resume can have of plain
# reads is the machine's to say: the bar is against reads with digests, and what that is of plain reads is printed.
MIN_LOAD, LOAD_OF_PLAIN_READS = 0.9, 0.7
WIDTH = 1024


class State:
    """A model of `layers` square matrices in shards, and AdamW's state of it: 12 MB a layer."""

    def __init__(self, layers: int) -> None:
        torch.manual_seed(0)
        mesh = init_device_mesh("cpu", (RANKS,), mesh_dim_names=("shard",))
        self.model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)))
        for layer in self.model:
            # The default would let the values shrink from layer to layer to denormal ones, with which some processors
            # are a hundred times slower.
            nn.init.normal_(layer.weight, std=WIDTH**-0.5)
            fully_shard(layer, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.rows = torch.randn(32, WIDTH)
        self.step()
        self.state = TrainState(self.model, self.optimizer, mesh={"shard": RANKS})

    def step(self) -> None:
        self.model(self.rows).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    @property
    def parts(self) -> list[torch.Tensor]:
        """This rank's memory of all that is saved and is not tiny."""
        tensors, _ = self.state.capture()
        with torch.no_grad():
            return [part for part in map(local_part, tensors.values()) if part.numel() > 1000]


def timed(call: Callable[[], object]) -> float:
    """Seconds until all ranks are through with `call`, which all begin together."""
    barrier()
    start = time.perf_counter()
    call()
    barrier()
    return time.perf_counter() - start


def measure(folder: Path, layers: int, turns: int) -> dict[str, Any]:
    """All figures of the ranks but the export's."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    run = State(layers)
    figures: dict[str, Any] = {"bytes": sum(part.nbytes for part in run.parts) * RANKS}
    with RunFolder(folder / "run") as opened:
        describe(opened)
        figures |= measure_background(opened, run, turns)
        figures |= measure_waiting(opened, run, turns, folder)
    leave_group()
    return figures


def describe(run: RunFolder) -> None:
    """Let the checkpoints be exported: what an export looks for is a package."""
    with tempfile.TemporaryDirectory() as package:
        (Path(package) / "config.json").write_text("{}")
        run.describe("package", Path(package))


def measure_background(opened: RunFolder, run: State, turns: int) -> dict[str, Any]:
    parts = run.parts
    aside = [torch.ones_like(part) for part in parts]  # touched
    stalls, copies, quiet, writing = [], [], [], []
    with CheckpointStore(opened) as store, torch.no_grad():
        for turn in range(turns + 1):
            copies.append(timed(lambda: torch._foreach_copy_(aside, parts)))
            with torch.enable_grad():
                quiet += [timed(run.step) for _ in range(3)]
            stalls.append(timed(lambda number=turn: store.save(run.state, 1 + number)))
            with torch.enable_grad():
                # Not to the end of the writing: at its low priority it waits for a processor that nobody wants.
                for _ in range(6):
                    if is_writing(store):
                        writing.append(timed(run.step))
            store.finish()
    return {"stalls": stalls[1:], "copies": copies[1:], "quiet": quiet[3:], "writing": writing, "first": stalls[0]}


def is_writing(store: CheckpointStore) -> bool:
    """Whether no rank has heard yet that it is whole; all must make the same steps."""
    whole = torch.tensor(int(store.committed() is not None))
    dist.all_reduce(whole, dist.ReduceOp.MAX)
    return not whole


def measure_waiting(opened: RunFolder, run: State, turns: int, folder: Path) -> dict[str, Any]:
    parts = run.parts
    plain = folder / "none yet"
    saves, writes = [], []
    loads: dict[str, list[float]] = {
        f"{cold}{kind}": [] for cold in ("", "cold_") for kind in ("loads", "digested_reads", "reads")
    }
    # None is removed meanwhile: the plain files are not, either.
    with CheckpointStore(opened, Keep(last=100), asynchronous=False) as store:
        for turn in range(turns + 1):
            for is_ours in (turn % 2 == 0, turn % 2 == 1):
                if is_ours:
                    saves.append(timed(lambda number=turn: store.save(run.state, 1000 + number)))
                else:
                    plain = folder / f"plain-{turn}-{dist.get_rank()}.bin"
                    writes.append(timed(lambda path=plain: write_plain(path, parts)))
        checkpoint = store.resume(run.state)
        assert checkpoint is not None
        files = [plain, checkpoint.path / f"rank-{dist.get_rank():05d}.bin"]
        ways: list[tuple[str, Callable[[], object]]] = [
            ("loads", lambda: store.resume(run.state)),
            ("digested_reads", lambda: read_digested(plain, parts)),
            ("reads", lambda: read_plain(plain, parts)),
        ]
        for cold in ("", "cold_"):
            for turn in range(turns + 1):
                for name, way in ways[turn % 3 :] + ways[: turn % 3]:
                    if cold:
                        forget(files)
                    loads[cold + name].append(timed(way))
    figures = {"saves": saves, "writes": writes, **loads}
    return {name: values[1:] for name, values in figures.items()}


def write_plain(path: Path, parts: list[torch.Tensor]) -> None:
    with path.open("wb", buffering=0) as file:
        for part in parts:
            write_all(file.fileno(), raw_bytes(part))
        os.fsync(file.fileno())
    sync(path.parent)


def read_plain(path: Path, parts: list[torch.Tensor]) -> None:
    at = 0
    with path.open("rb", buffering=0) as file:
        for part in parts:
            at += read_all(file.fileno(), raw_bytes(part), at)


def read_digested(path: Path, parts: list[torch.Tensor]) -> None:
    """The least that a load which verifies does: these reads, and a digest of each tensor, in the blocks of ours."""
    at = 0
    with path.open("rb", buffering=0) as file:
        for part in parts:
            digest = xxhash.xxh3_64()
            for block in blocks_of(raw_bytes(part), BLOCK):
                at += read_all(file.fileno(), block, at)
                digest.update(block)
            digest.digest()


def forget(files: list[Path]) -> None:
    """Let the system's cache forget these, which are on the disk."""
    for file in files:
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure_export(folder: Path, turns: int) -> dict[str, Any]:
    """Seconds of exports and of copies of what they wrote; and megabytes beyond idle, with the size of a shard."""
    source, out, copy = folder / "run", folder / "exported", folder / "copied"
    shard_mb = 256
    exports: list[float] = []
    copies: list[float] = []
    peaks: list[float] = []
    before = resident_mb()
    reset_peak()
    for turn in range(turns + 1):
        for is_ours in (turn % 2 == 0, turn % 2 == 1):
            shutil.rmtree(out if is_ours else copy, ignore_errors=True)
            os.sync()  # what the disk still has to write is nobody's
            with clock(exports if is_ours else copies):
                if is_ours:
                    export(source, out, max_shard_bytes=shard_mb << 20)
                else:
                    copy_synced(out, copy)
            if is_ours:
                peaks.append(peak_mb() - before)
    return {"exports": exports[1:], "export_copies": copies[1:], "shards": peaks[0] / shard_mb}


def copy_synced(folder: Path, copy: Path) -> None:
    shutil.copytree(folder, copy)
    for path in copy.iterdir():
        sync(path)


@contextmanager
def clock(times: list[float]) -> Iterator[None]:
    start = time.perf_counter()
    yield
    times.append(time.perf_counter() - start)


def start_ranks(folder: Path, layers: int, turns: int) -> dict[str, Any]:
    """Run `measure` on the ranks; rank 0's figures."""
    words = [sys.executable, __file__, "--ranks-in", str(folder), "--layers", str(layers), "--turns", str(turns)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1"}
    environment["MASTER_PORT"] = str(29000 + os.getpid() % 10_000)
    ranks = [
        subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment | {"RANK": str(rank)})
        for rank in range(RANKS)
    ]
    outputs = [rank.communicate()[0] for rank in ranks]
    if any(rank.returncode for rank in ranks):
        sys.exit("a rank failed")
    figures: dict[str, Any] = json.loads(outputs[0].splitlines()[-1])
    return figures


def speed(figures: dict[str, Any], ours: str, theirs: str) -> float:
    """Of ours, 1 where it is that of theirs: the median over the turns."""
    return statistics.median(b / a for a, b in zip(figures[ours], figures[theirs], strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--dose", action="store_true", help="little of everything: does it run?")
    parser.add_argument("--dir", type=Path, help="where to write (default: the system's folder for temporary files)")
    parser.add_argument("--layers", type=int, default=84)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--ranks-in", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--export-in", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.ranks_in is not None:
        print(json.dumps(measure(arguments.ranks_in, arguments.layers, arguments.turns)))
        return 0
    if arguments.export_in is not None:
        print(json.dumps(measure_export(arguments.export_in, arguments.turns)))
        return 0
    layers, turns = (6, 2) if arguments.dose else (arguments.layers, arguments.turns)
    with tempfile.TemporaryDirectory(dir=arguments.dir) as name:
        folder = Path(name)
        figures = start_ranks(folder, layers, turns)
        figures |= figures_of([__file__, "--export-in", folder, "--turns", str(turns)])
    return report(figures)


def report(figures: dict[str, Any]) -> int:
    gigabytes = figures["bytes"] / 1e9
    copy, stall = statistics.median(figures["copies"]), statistics.median(figures["stalls"])
    quiet, writing = statistics.median(figures["quiet"]), statistics.median(figures["writing"] or [0])
    print(machine_line())
    print(f"{gigabytes:.2f} GB of state on {RANKS} ranks")
    print(
        f"asynchronous save: {stall * 1e3:.0f} ms, a copy {copy * 1e3:.0f} ms; the first save {figures['first']:.2f} s"
    )
    print(f"a step: {quiet * 1e3:.0f} ms, while writing {writing * 1e3:.0f} ms ({len(figures['writing'])} steps)")
    for ours, theirs, what in (
        ("saves", "writes", "save, and plain write"),
        ("loads", "digested_reads", "resume, and read with digests"),
        ("loads", "reads", "resume, and plain read"),
        ("cold_loads", "cold_digested_reads", "resume, and read with digests, cold"),
        ("cold_loads", "cold_reads", "resume, and plain read, cold"),
        ("exports", "export_copies", "export, and plain copy"),
    ):
        print(f"{what}: {statistics.median(figures[ours]):.2f} s, {statistics.median(figures[theirs]):.2f} s")
    for cold, title in (("", "warm"), ("cold_", "cold")):
        least = speed(figures, f"{cold}digested_reads", f"{cold}reads")
        reached = speed(figures, f"{cold}loads", f"{cold}reads")
        wanted = f"{LOAD_OF_PLAIN_READS} is {'reached' if reached >= LOAD_OF_PLAIN_READS else 'NOT reached'}"
        print(
            f"of the speed of plain reads, {title}: a resume {reached:.2f} ({wanted}), reads with digests {least:.2f}"
        )
    return print_verdict(
        [
            Bar("stall of a save, less 20 ms / copy", max(0.0, stall - ALLOWED_STALL_S) / copy, "<=", MAX_STALL),
            Bar("step while writing / step", writing / quiet, "<=", MAX_STEP),
            Bar("blocking save, speed of plain write", speed(figures, "saves", "writes"), ">=", MIN_SAVE),
            Bar("resume, speed of reads with digests, warm", speed(figures, "loads", "digested_reads"), ">=", MIN_LOAD),
            Bar(
                "resume, speed of reads with digests, cold",
                speed(figures, "cold_loads", "cold_digested_reads"),
                ">=",
                MIN_LOAD,
            ),
            Bar("export, speed of copy", speed(figures, "exports", "export_copies"), ">=", MIN_EXPORT),
            Bar("memory of an export, in shards", figures["shards"], "<=", MAX_SHARDS),
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
