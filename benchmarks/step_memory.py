"""What do the options that save memory save? Peak memory and time of a step with each, against the plain step.

    python benchmarks/step_memory.py       # two minutes on two cores

Each figure is from a process of its own. The peak is what a step takes at its highest beyond what is resident before
it, when optimizer state and parameters are there. Two models: one whose activations weigh most, one whose gradients do.
Losses are compared first: they have to be the same bits. Memory that is freed goes back to the system at once
(MALLOC_*), or a peak would be that of an earlier moment.
"""

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from memory import figures_of, peak_mb, reset_peak, resident_mb
from transformers import LlamaConfig, LlamaForCausalLM
from verdict import Bar, print_verdict

from forgather.data.batch import Batch
from forgather.distributed.environment import Environment
from forgather.distributed.fsdp import apply_fsdp
from forgather.distributed.mesh import Mesh
from forgather.distributed.recompute import apply_recompute
from forgather.optim.schedules import constant
from forgather.trainers.loss import CausalLoss
from forgather.trainers.step import LocalStep
from forgather.trainers.update import Update

SIZES: dict[str, dict[str, int]] = {
    "activations": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 8, "rows": 2, "length": 512},
    "gradients": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "rows": 1, "length": 64},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "every 2nd block recomputed": {"recompute": 2},
    "selectively recomputed": {"recompute": "selective"},
    "recomputed": {"recompute": "full"},
    "optimizer in the backward": {"fused": True},
    "bf16": {"precision": "bf16"},
}
PAIRS = [(size, option) for size in SIZES for option in OPTIONS if size == "activations" or "recomputed" not in option]
AT_MOST = {  # of the plain step's memory
    ("activations", "every 2nd block recomputed"): 0.75,
    ("activations", "selectively recomputed"): 0.8,
    ("activations", "recomputed"): 0.45,
    ("gradients", "optimizer in the backward"): 0.5,
}


def measure(size: str, option: str) -> dict[str, Any]:
    """Losses, and peak and time of a step, in this process."""
    torch.set_num_threads(1)
    shape, chosen = dict(SIZES[size]), OPTIONS[option]
    rows, length = shape.pop("rows"), shape.pop("length")
    mesh = Mesh(Environment(device="cpu"))
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 512}
    model = LlamaForCausalLM(LlamaConfig(**heads, max_position_embeddings=length, **shape)).train()
    apply_recompute(model, chosen.get("recompute", "none"))
    apply_fsdp(model, mesh, chosen.get("precision", "fp32"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    fused = chosen.get("fused", False)
    update = Update(optimizer, constant(), mesh, max_grad_norm=None, fuse_optimizer_with_backward=fused)
    step = LocalStep(model, CausalLoss(model), update, mesh)
    tokens = torch.randint(0, 512, (rows, length + 1))
    batch = Batch(
        tokens[:, :-1], tokens[:, 1:], torch.arange(length).expand(rows, -1), rows * length, tuple(range(rows))
    )
    losses, peaks, times = [], [], []
    for number in range(3):
        reset_peak()
        before, start = resident_mb(), time.perf_counter()
        losses.append(step(number, [batch]).loss_sum.item())
        peaks.append(peak_mb() - before)
        times.append(time.perf_counter() - start)
    return {"losses": losses, "peak_mb": statistics.median(peaks[1:]), "step_s": min(times[1:])}


def main() -> int:
    if len(sys.argv) > 1:
        print(json.dumps(measure(*sys.argv[1:])))
        return 0
    environment = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    figures = {pair: figures_of([Path(__file__), *pair], environment) for pair in PAIRS}
    print(f"{'model':<14}{'option':<30}{'peak MB':>10}{'of plain':>10}{'time':>8}")
    bars = []
    for (size, option), found in figures.items():
        plain = figures[size, "plain"]
        if option != "bf16":
            assert found["losses"] == plain["losses"], f"{size}, {option}: {found['losses']}, {plain['losses']}"
        share = found["peak_mb"] / plain["peak_mb"]
        time_share = found["step_s"] / plain["step_s"]
        print(f"{size:<14}{option:<30}{found['peak_mb']:>10.1f}{share:>10.2f}{time_share:>8.2f}")
        if (size, option) in AT_MOST:
            bars.append(Bar(f"{size}, {option}: memory", share, "<=", AT_MOST[size, option]))
    return print_verdict(bars)


if __name__ == "__main__":
    sys.exit(main())
