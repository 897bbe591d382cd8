"""What does a mesh cost? Tokens/s, bytes and idle time of each against loops written by hand over the same primitives.

    python benchmarks/parallel.py                  # about 8 minutes on two cores
    python benchmarks/parallel.py --all            # meshes of 4 processes too
    python benchmarks/parallel.py --dose           # all of it runs, the figures say little

Both train the same stock Llama from the same weights on the same batches, one thread a process; first their losses and
gradient steps are compared, then pairs of segments are timed in turns, then the bytes that one step sends are counted.
Bubbles are measured on stages that sleep instead of computing, so that neither cores nor noise show: the part of a step
in which the slowest rank is idle, against the formula of the schedule. Ends with 1 when a bar is missed.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from hand_loop import LR, MAX_NORM, WEIGHT_DECAY
from hand_parallel import HandParallel
from interleaved import compare, machine_line
from sleeping_pipeline import BUBBLES, measure_bubble
from transformers import LlamaConfig, LlamaForCausalLM
from verdict import Bar, print_verdict

from forgather.data.batch import NO_TARGET, Batch
from forgather.distributed.environment import Environment, leave_group
from forgather.distributed.fsdp import ONE_GROUP_BELOW
from forgather.distributed.mesh import Mesh
from forgather.distributed.pipeline_plan import SCHEDULES, PipelinePlan
from forgather.metrics.traffic import Traffic
from forgather.models.initialize import initialize
from forgather.models.parts.initializers import Normal, Ones
from forgather.optim.adamw import AdamW
from forgather.optim.groups import build_optimizer
from forgather.optim.schedules import constant
from forgather.trainers.assemble import assemble
from forgather.trainers.strategy import build_loss, build_step
from forgather.trainers.update import Update

MIN_SPEED, MAX_BYTES = 0.95, 1.01
MIN_SPEED_REPLICATE = 0.98
VOCABULARY, LENGTH, ROWS = 2048, 128, 8
MESHES: dict[str, dict[str, int]] = {
    "replicate 2": {"replicate": 2},
    "shard 2": {"shard": 2},
    "tensor 2": {"tensor": 2},
    "pipeline 2, gpipe": {"pipeline": 2},
    "pipeline 2, 1f1b": {"pipeline": 2},
    "pipeline 2, interleaved_1f1b": {"pipeline": 2},
    "pipeline 2, zbv": {"pipeline": 2},
}
LARGER: dict[str, dict[str, int]] = {
    "replicate 2 x shard 2": {"replicate": 2, "shard": 2},
    "tensor 2 x shard 2": {"tensor": 2, "shard": 2},
    "pipeline 2 x shard 2, 1f1b": {"pipeline": 2, "shard": 2},
}


class Llama:
    """Where models come from, as `assemble` wants it: 7M parameters."""

    init_rules: ClassVar = {"norm": Ones(), ".*": Normal(std=0.05)}
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=320,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=LENGTH,
        attn_implementation="sdpa",
    )

    def construct(self, device: str = "meta", **_: Any) -> LlamaForCausalLM:
        with torch.device(device):
            return LlamaForCausalLM(self.config)


class Ours:
    """The step of a run, composed as `configs/lib/train/causal_lm.yaml` composes it."""

    def __init__(self, batches: list[list[Batch]], sizes: Mapping[str, int], schedule: str, rows: int) -> None:
        mesh = Mesh(Environment(device="cpu"), **{"shard": 1, **sizes})
        plan = PipelinePlan(mesh, rows=ROWS // mesh.data_ranks, rows_per_forward=rows, length=LENGTH, schedule=schedule)
        model = assemble(Llama(), mesh, pipeline=plan)
        optimizer = build_optimizer(
            model, lambda groups: AdamW(groups, lr=LR, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY), {}
        )
        update = Update(optimizer, constant(), mesh, max_grad_norm=MAX_NORM)
        self.step = build_step(model, build_loss(model, chunk_rows=None), update, mesh)
        self.batches = iter(batches)
        self.made = 0

    def segment(self, steps: int) -> list[float]:
        results = []
        for _ in range(steps):
            result = self.step(self.made, next(self.batches))
            results.append(result.loss_sum)
            self.made += 1
        return [float(loss) for loss in results]


def make_batches(steps: int, rank: int, ranks: int, rows: int) -> list[list[Batch]]:
    """This rank's microbatches of `rows` rows for so many steps: packed documents, uneven targets."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(steps):
        tokens = torch.randint(0, VOCABULARY, (ROWS, LENGTH + 1), generator=generator)
        position_ids = torch.arange(LENGTH).repeat(ROWS, 1)
        targets = tokens[:, 1:].clone()
        for row in range(ROWS):
            cut = 10 + 11 * row
            position_ids[row, cut:] -= cut
            targets[row, cut - 1] = NO_TARGET
            targets[row, : 3 * row] = NO_TARGET
        mine = range(rank * ROWS // ranks, (rank + 1) * ROWS // ranks)
        made.append(
            [
                Batch(
                    tokens[start : start + rows, :-1].contiguous(),
                    targets[start : start + rows],
                    position_ids[start : start + rows],
                    int((targets[start : start + rows] != NO_TARGET).sum()),
                    tuple(range(start, start + rows)),
                )
                for start in mine[::rows]
            ]
        )
    return made


def measure(name: str, pairs: int, steps: int) -> dict[str, float]:
    """The figures of one mesh; all of its ranks call this."""
    sizes = (MESHES | LARGER)[name]
    schedule = name.partition(", ")[2] or "1f1b"
    data_ranks = sizes.get("replicate", 1) * sizes.get("shard", 1)
    inner = sizes.get("shard", 1) * sizes.get("tensor", 1) * sizes.get("replicate", 1)
    # (pipeline, replicate, shard, tensor): the data ranks lie between the stages and the parts of a matrix.
    data_rank = dist.get_rank() % inner // sizes.get("tensor", 1)
    is_pipelined = sizes.get("pipeline", 1) > 1
    rows = 1 if is_pipelined else ROWS // data_ranks
    count = (pairs + 2) * steps + 4
    batches = make_batches(count, data_rank, data_ranks, rows)
    ours = Ours(batches, sizes, schedule, rows)
    model = Llama().construct("cpu")
    initialize(model, Llama.init_rules, 0)
    model.train()
    small = sum(parameter.numel() for parameter in model.parameters()) < ONE_GROUP_BELOW
    plan = SCHEDULES[schedule]
    microbatches = ROWS // data_ranks
    by_hand = (plan.make, 1 if plan.takes_one_stage else plan.default_stages, plan.is_v, microbatches)
    hand = HandParallel(model, batches, sizes, by_hand if is_pipelined else None, one_group=small)

    losses = [torch.tensor(segment(2), dtype=torch.float64) for segment in (ours.segment, hand.segment)]
    dist.all_reduce(losses[0])
    if is_pipelined:
        # Theirs stays on the rank with the last stage.
        dist.all_reduce(losses[1])
        losses[1] /= data_ranks if data_ranks > 1 else 1
    torch.testing.assert_close(losses[0], losses[1], rtol=2e-5, atol=0, msg=lambda text: f"{name}: {text}")

    sent = []
    for segment in (ours.segment, hand.segment):
        with Traffic() as traffic:
            segment(1)
        total = torch.tensor(float(traffic.bytes_sent))
        dist.all_reduce(total)
        sent.append(total.item())
    comparison = compare(
        lambda: ours.segment(steps), lambda: hand.segment(steps), pairs=pairs, warmup=1, prepare=dist.barrier
    )
    return {
        "ratio": comparison.ratio,
        "ms": 1e3 * sorted(comparison.ours_s)[len(comparison.ours_s) // 2] / steps,
        "sent": sent[0],
        "sent_by_hand": sent[1],
    }


def run_ranks(processes: int, *words: str) -> dict[str, Any]:
    """Start this file on so many ranks; what rank 0 printed as its last line."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", __file__]
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        subprocess.run([*start, *words, f"--to={file.name}"], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        figures: dict[str, Any] = json.loads(Path(file.name).read_text())
        return figures


def report(name: str, figures: Mapping[str, float]) -> list[Bar]:
    tokens = ROWS * LENGTH
    print(
        f"{name:30} {tokens / figures['ms'] * 1e3:8,.0f} tokens/s, {figures['ratio']:.3f} of the loop by hand,"
        f" {figures['sent'] / 1e6:.2f} MB a step against {figures['sent_by_hand'] / 1e6:.2f}",
        flush=True,
    )
    least = MIN_SPEED_REPLICATE if name == "replicate 2" else MIN_SPEED
    return [
        Bar(f"{name}: speed", figures["ratio"], ">=", least),
        Bar(f"{name}: bytes", figures["sent"] / figures["sent_by_hand"], "<=", MAX_BYTES),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=9, help="timed pairs (default: 9)")
    parser.add_argument("--steps", type=int, default=4, help="steps of a segment (default: 4)")
    parser.add_argument("--only", default="", help="meshes whose names begin so, or `bubbles`")
    parser.add_argument("--all", action="store_true", help="meshes of 4 processes too")
    parser.add_argument("--dose", action="store_true", help="one pair of one step, judging losses and bytes only")
    parser.add_argument("--mesh", help=argparse.SUPPRESS)  # these are given to the processes that it starts
    parser.add_argument("--bubble", help=argparse.SUPPRESS)
    parser.add_argument("--to", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.dose:
        options.pairs, options.steps = 1, 1
    torch.set_num_threads(1)
    if options.to is not None:
        dist.init_process_group("gloo")
        if options.mesh is not None:
            figures = measure(options.mesh, options.pairs, options.steps)
        else:
            figures = measure_bubble(options.bubble)
        if dist.get_rank() == 0:
            options.to.write_text(json.dumps(figures))
        leave_group()
        return 0
    print(machine_line())
    bars = []
    for name, sizes in (MESHES | LARGER if options.all else MESHES).items():
        if name.startswith(options.only):
            processes = torch.tensor(list(sizes.values())).prod().item()
            words = [f"--mesh={name}", f"--pairs={options.pairs}", f"--steps={options.steps}"]
            bars += report(name, run_ranks(int(processes), *words))
    for schedule, formula in BUBBLES.items():
        if "bubbles".startswith(options.only):
            figures = run_ranks(2, f"--bubble={schedule}")
            print(
                f"{schedule:30} idle {figures['bubble']:.3f} of the step, formula {formula.text} ="
                f" {figures['formula']:.3f}",
                flush=True,
            )
            bars.append(Bar(f"{schedule}: idle", figures["bubble"], "<=", figures["formula"] + 0.03))
    if options.dose:
        bars = [bar for bar in bars if bar.name.endswith("bytes")]
    return print_verdict(bars)


if __name__ == "__main__":
    sys.exit(main())
