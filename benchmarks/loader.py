"""Can data keep up? Tokens/s of the loader against what training consumes here, its memory, and the time to resume.

    python benchmarks/loader.py                       # a made set of 1 GB, about a minute
    python benchmarks/loader.py --megabytes 20        # a quick look

The yardstick is a hand-written training step below (a plain decoder of 4M parameters, blocks of 512, fp32, AdamW),
timed in turns with the loader in the same process. Ends with 1 when a bar is missed.
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from interleaved import compare, machine_line
from torch import Tensor, nn

from forgather.data.loader import Loader
from forgather.data.order import Permutation
from forgather.data.packing import PackedBlocks
from forgather.data.shard_writer import SplitWriter
from forgather.data.shards import FORMAT, MANIFEST, ShardSet

BLOCK = 512
ROWS = 8
VOCABULARY = 4096
MIN_SPEED, MAX_GROWTH_MB, MAX_RESUME_RATIO = 50.0, 200.0, 1.25


class PlainDecoder(nn.Module):
    """Attention and a gated MLP, four times, at the shape of the 4M model."""

    def __init__(self, hidden: int = 256, heads: int = 2, layers: int = 4, intermediate: int = 1024) -> None:
        super().__init__()
        self.heads = heads
        self.embed = nn.Embedding(VOCABULARY, hidden)
        self.norms = nn.ModuleList(nn.RMSNorm(hidden) for _ in range(2 * layers))
        self.qkv = nn.ModuleList(nn.Linear(hidden, 3 * hidden, bias=False) for _ in range(layers))
        self.out = nn.ModuleList(nn.Linear(hidden, hidden, bias=False) for _ in range(layers))
        self.up = nn.ModuleList(nn.Linear(hidden, 2 * intermediate, bias=False) for _ in range(layers))
        self.down = nn.ModuleList(nn.Linear(intermediate, hidden, bias=False) for _ in range(layers))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer, (qkv, out, up, down) in enumerate(zip(self.qkv, self.out, self.up, self.down, strict=True)):
            parts = qkv(self.norms[2 * layer](x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            mixed = F.scaled_dot_product_attention(*parts, is_causal=True)
            x = x + out(mixed.transpose(1, 2).flatten(2))
            gate, value = up(self.norms[2 * layer + 1](x)).chunk(2, dim=-1)
            x = x + down(F.silu(gate) * value)
        return x @ self.embed.weight.T


def make_shards(folder: Path, megabytes: int) -> ShardSet:
    """Random tokens in documents of about 600."""
    random = np.random.default_rng(0)
    folder.mkdir()
    with SplitWriter(folder, "train", np.dtype("uint16"), 2**27) as writer:
        for start in range(0, megabytes, 50):
            tokens = min(50, megabytes - start) * 500_000
            ends = np.unique(random.integers(1, tokens, tokens // 600))
            writer.add_documents(np.diff(ends, prepend=0, append=tokens))
            writer.add_tokens(random.integers(0, VOCABULARY, tokens, np.uint16))
        entry = writer.close()
    tokenizer = {"digest": "made up", "vocab_size": VOCABULARY, "padding_id": 0}
    manifest = {"format": FORMAT, "dtype": "uint16", "tokenizer": tokenizer, "splits": {"train": entry}}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return ShardSet(folder)


def speed(shards: ShardSet, pairs: int, workers: int) -> float:
    """Tokens/s of the loader over tokens/s of training."""
    model = PlainDecoder()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    blocks = PackedBlocks(shards, BLOCK)
    order = Permutation(len(blocks), 0)
    loader = Loader(blocks, order, rows_per_step=ROWS, rows_per_forward=ROWS, workers=workers)
    (batch,) = loader.take()
    loads = 200  # per training step, so that the clock of both is long enough to read

    def train() -> None:
        logits = model(batch.input_ids)
        F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()

    def load() -> None:
        for _ in range(loads):
            loader.take()

    comparison = compare(load, train, pairs=pairs)
    loader.close()
    tokens = ROWS * BLOCK
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"training step ({parameters / 1e6:.1f}M parameters): {tokens / np.median(comparison.baseline_s):,.0f} tokens/s"
    )
    print(f"loader ({workers} workers): {loads * tokens / np.median(comparison.ours_s):,.0f} tokens/s")
    return comparison.ratio * loads


def growth_mb(shards: ShardSet, max_blocks: int | None) -> float:
    """How much resident memory grows, at its highest, while an epoch is read at random."""
    blocks = PackedBlocks(ShardSet(shards.folder), BLOCK)
    loader = Loader(blocks, Permutation(len(blocks), 1), rows_per_step=64, rows_per_forward=64)
    start = highest = _resident_mb()
    while loader.consumed < min(len(blocks), max_blocks or len(blocks)):
        loader.take()
        highest = max(highest, _resident_mb())
    print(
        f"read {loader.consumed:,} blocks of {len(blocks):,} in random order: {start:.0f} MB resident -> {highest:.0f}"
    )
    loader.close()
    return highest - start


def resume_ratio(shards: ShardSet, pairs: int) -> float:
    """Time to the first batch at the last million samples of a run of 10^9, over that at the first million."""
    blocks = PackedBlocks(shards, BLOCK)
    random = np.random.default_rng(2)

    def resume_at(lowest: int) -> None:
        for _ in range(20):  # each takes a millisecond or two
            loader = Loader(blocks, Permutation(len(blocks), 0), rows_per_step=ROWS, rows_per_forward=ROWS)
            loader.load_state_dict(loader.state_dict() | {"consumed": lowest + int(random.integers(10**6))})
            loader.take()
            loader.close()

    comparison = compare(lambda: resume_at(10**9 - 10**6), lambda: resume_at(0), pairs=pairs, warmup=2)
    print(comparison.line("20 resumes at the last million", "at the first"))
    return 1 / comparison.ratio


def _resident_mb() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("/proc/self/status has no VmRSS: this needs Linux")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1000, help="size of the made shard set")
    parser.add_argument("--pairs", type=int, default=7, help="interleaved pairs of each comparison")
    parser.add_argument("--workers", type=int, default=0, help="worker processes of the loader")
    parser.add_argument("--max-blocks", type=int, help="read no more than that for the memory figure (default: all)")
    options = parser.parse_args()

    folder = Path(tempfile.mkdtemp(prefix="forgather-loader-"))
    try:
        shards = make_shards(folder / "shards", options.megabytes)
        print(machine_line())
        print(f"{shards.num_tokens:,} tokens in {shards.num_documents:,} documents, {options.megabytes} MB")
        rows = [
            ("tokens/s over training's", speed(shards, options.pairs, options.workers), ">=", MIN_SPEED),
            ("resident growth, MB", growth_mb(shards, options.max_blocks), "<=", MAX_GROWTH_MB),
            ("resume, last over first", resume_ratio(shards, 3 * options.pairs), "<=", MAX_RESUME_RATIO),
        ]
    finally:
        shutil.rmtree(folder)
    missed = 0
    print(f"\n{'':<28}{'measured':>10}{'bar':>10}")
    for name, value, sign, bar in rows:
        met = value >= bar if sign == ">=" else value <= bar
        missed += not met
        print(f"{name:<28}{value:>10.2f}{f'{sign} {bar:g}':>10}{'' if met else '   MISSED'}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
