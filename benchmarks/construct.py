"""What does it take to make a model? Memory and time from a package to its first weights.

    python benchmarks/construct.py                 # about a minute on two cores
    python benchmarks/construct.py --shape 4M      # a quick look: the figures of memory are of small things then

Three questions. How much memory and time does a Llama of 70B take on the meta device, imports apart? How much memory
does each of two processes take, at its highest, to hold its half of a model of 1B that FSDP2 cuts and `initialize`
draws: no more than the half itself and 1.2 of the largest parameter, above what the imports take. How fast is
`initialize` against torch's own `normal_`, in place, of the same tensors? Figures of memory come from fresh processes.
Ends with 1 when a bar is missed.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from interleaved import compare, machine_line
from memory import figures_of, peak_mb, reset_peak, resident_mb
from verdict import Bar, print_verdict

MAX_META_MB, MAX_META_S = 600.0, 1.0
MAX_OF_LARGEST = 1.2
MIN_INIT_SPEED = 0.7


def on_meta(package: Path) -> dict[str, float]:
    """In a fresh process: the model on meta, and what that took."""
    from forgather.models.construct import construct

    start = time.perf_counter()
    model = construct(package)
    seconds = time.perf_counter() - start
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"seconds": seconds, "peak_mb": peak_mb(), "parameters": parameters}


def materialised(package: Path) -> dict[str, float]:
    """On each of some processes: its shard of the model, drawn, and what that took; the highest of all ranks."""
    import torch
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor

    from forgather.distributed.environment import Environment
    from forgather.distributed.mesh import Mesh
    from forgather.models.construct import construct, load_classes
    from forgather.trainers.assemble import assemble

    class Written:
        """A package that is on the disk: what `assemble` asks of its source."""

        init_rules = load_classes(package).model.init_rules(load_classes(package).config)

        def construct(self, device: str = "meta", *, dtype: torch.dtype | None = None) -> torch.nn.Module:
            return construct(package, device, dtype=dtype)

    environment = Environment(device="cpu", threads=1)
    mesh = Mesh(environment)
    reset_peak()
    before = resident_mb()
    model = assemble(Written(), mesh)
    above = peak_mb() - before
    shard = sum(p.to_local().nbytes if isinstance(p, DTensor) else p.nbytes for p in model.parameters()) / 1e6
    largest = max(p.numel() * p.element_size() for p in model.parameters()) / 1e6
    figures = {
        "above_mb": above,
        "shard_mb": shard,
        "largest_mb": largest,
        "of_largest": (above - shard) / largest,
        "imports_mb": before,
    }
    everybody: list[dict[str, float]] = [{} for _ in range(environment.world_size)]
    dist.all_gather_object(everybody, figures)
    environment.close()
    return max(everybody, key=lambda figures: figures["of_largest"])


def init_speed(package: Path, pairs: int) -> list[Bar]:
    """`initialize` against torch in place, like with like: same tensors, type and distribution."""
    import torch
    from torch.nn.init import trunc_normal_

    from forgather.models.construct import construct
    from forgather.models.initialize import initialize
    from forgather.models.parts.initializers import Normal, TruncatedNormal

    torch.set_num_threads(1)  # as a rank of a run has

    def normal(tensor: torch.Tensor) -> None:
        tensor.normal_(std=0.02)

    def truncated(tensor: torch.Tensor) -> None:
        trunc_normal_(tensor, std=0.02, a=-0.06, b=0.06)

    bars = []
    distributions: list[tuple[str, torch.dtype, Normal | TruncatedNormal, Callable[[torch.Tensor], None]]] = [
        ("normal, fp32", torch.float32, Normal(std=0.02), normal),
        ("normal, bf16", torch.bfloat16, Normal(std=0.02), normal),
        ("truncated normal, fp32", torch.float32, TruncatedNormal(std=0.02), truncated),
    ]
    for name, dtype, initializer, draw in distributions:
        model = construct(package, "cpu", dtype=dtype, seed=None)

        def ours(model: torch.nn.Module = model, rule: Normal | TruncatedNormal = initializer) -> None:
            initialize(model, {".": rule}, seed=0)

        @torch.no_grad()
        def torchs(model: torch.nn.Module = model, draw: Callable[[torch.Tensor], None] = draw) -> None:
            for parameter in model.parameters():
                draw(parameter)

        comparison = compare(ours, torchs, pairs=pairs)
        print(comparison.line(f"initialize ({name})", "torch in place"))
        bars.append(Bar(f"initialisation, {name}, of torch's speed", comparison.ratio, ">=", MIN_INIT_SPEED))
    return bars


FIGURES = {"on_meta": on_meta, "materialised": materialised}


def measure(options: argparse.Namespace, folder: Path) -> list[Bar]:
    from llama_package import llama_package

    large, cut, drawn = (options.shape or shape for shape in ("70B", "1B", "117M"))
    start = [__file__, f"--folder={folder}"]
    llama_package(folder / large, large)
    meta = figures_of([*start, "--figures=on_meta", f"--shape={large}"])
    print(
        f"{large} ({meta['parameters'] / 1e9:.2f}B parameters) on meta: {meta['seconds']:.2f} s after imports,"
        f" the process at most {meta['peak_mb']:.0f} MB"
    )
    llama_package(folder / cut, cut)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    ranks = figures_of([*torchrun, *start, "--figures=materialised", f"--shape={cut}"], {"OMP_NUM_THREADS": "1"})
    print(
        f"{cut} on 2 processes: at most {ranks['above_mb']:.0f} MB above the {ranks['imports_mb']:.0f} of the imports;"
        f" the shard is {ranks['shard_mb']:.0f}, the largest parameter {ranks['largest_mb']:.0f}"
    )
    bars = [
        Bar(f"{large} on meta, MB of the process", meta["peak_mb"], "<=", MAX_META_MB),
        Bar(f"{large} on meta, seconds", meta["seconds"], "<=", MAX_META_S),
        Bar(f"{cut} on 2 processes, of the largest parameter", ranks["of_largest"], "<=", MAX_OF_LARGEST),
    ]
    llama_package(folder / drawn, drawn)
    return bars + init_speed(folder / drawn, options.pairs)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=7, help="timed pairs (default: 7)")
    parser.add_argument("--shape", help="one shape for all questions: 4M, 117M, 1B, 70B")
    parser.add_argument("--figures", choices=FIGURES, help=argparse.SUPPRESS)  # what a process it starts has to do
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.figures is not None:
        figures = FIGURES[options.figures](options.folder / options.shape)
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps(figures))
        return 0
    print(machine_line())
    with tempfile.TemporaryDirectory() as folder:
        return print_verdict(measure(options, Path(folder)))


if __name__ == "__main__":
    sys.exit(main())
