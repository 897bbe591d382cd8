"""What does our Llama cost to train? Its tokens/s against transformers' Llama, and the loss against plain logits.

    python benchmarks/model_speed.py            # about ten minutes on two cores
    python benchmarks/model_speed.py --only loss
    python benchmarks/model_speed.py --dose     # half a minute: all of it runs, the figures say little

First the model: a package of ours and `LlamaForCausalLM` of the same shape, type, weights and attention (sdpa) make
training steps in turns; their losses are compared before. Then linear cross-entropy at a vocabulary of 131,072 against
what one writes by hand: logits by a linear layer, in fp32 for the softmax, and `F.cross_entropy`; forward and backward,
peak memory of each in a process of its own. In bf16 the loss has to be that of a softmax in fp32 besides. Ends with 1
when a bar is missed.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from interleaved import compare, machine_line
from llama_package import llama_config, llama_package
from memory import figures_of, peak_mb, reset_peak, resident_mb
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel
from verdict import Bar, print_verdict

from forgather.models.construct import construct
from forgather.trainers.linear_cross_entropy import linear_cross_entropy

MIN_SPEED, NOISE = 1.0, 0.05
MAX_MEMORY, MIN_LOSS_SPEED, MAX_LOSS_ERROR = 0.25, 0.9, 1e-5
ROWS, WIDTH, VOCABULARY, CHUNK = 2048, 512, 131_072, 512
TRAINED = (("4M", "fp32"), ("30M", "fp32"), ("30M", "bf16"))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Training:
    """A model with its optimizer; calling it makes `steps` steps on one batch."""

    def __init__(self, model: PreTrainedModel, batch: Tensor, steps: int) -> None:
        self.model = model.train()
        self.batch = batch
        self.steps = steps
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def __call__(self) -> list[float]:
        losses = []
        for _ in range(self.steps):
            loss = self.model(input_ids=self.batch, labels=self.batch, use_cache=False).loss
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            losses.append(loss.item())
        return losses


def model_speed(folder: Path, shape: str, dtype: str, options: argparse.Namespace) -> Bar:
    """Our tokens/s over transformers', after both have shown the same losses."""
    package = llama_package(folder / f"{shape}-{dtype}", shape)
    ours = construct(package.dir, "cpu", dtype=DTYPES[dtype])
    theirs = LlamaForCausalLM._from_config(llama_config(package), dtype=DTYPES[dtype], attn_implementation="sdpa")
    theirs.load_state_dict(ours.state_dict())
    assert ours.config._attn_implementation == theirs.config._attn_implementation == "sdpa"
    rows, length = options.rows, options.length
    batch = torch.randint(package.hf_config["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(0))
    contenders = [Training(model, batch, options.steps) for model in (ours, theirs)]
    found, expected = (torch.tensor(contender()) for contender in contenders)
    torch.testing.assert_close(found, expected, rtol=1e-5 if dtype == "fp32" else 1e-2, atol=0.0)
    comparison = compare(*contenders, pairs=options.pairs)
    parameters = sum(parameter.numel() for parameter in ours.parameters())
    print(f"{shape} ({parameters / 1e6:.1f}M parameters), {dtype}, {rows} x {length} tokens: equal losses;", end=" ")
    print(comparison.line("our Llama", "LlamaForCausalLM"))
    return Bar(f"our Llama {shape}, {dtype}, of transformers' speed", comparison.ratio, ">=", MIN_SPEED - NOISE)


def loss_inputs(dtype: str, rows: int, vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn((rows, WIDTH), generator=generator).to(DTYPES[dtype]).requires_grad_()
    weight = torch.randn((vocabulary, WIDTH), generator=generator).mul_(WIDTH**-0.5).to(DTYPES[dtype]).requires_grad_()
    return hidden, weight, torch.randint(vocabulary, (rows,), generator=generator)


def chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return linear_cross_entropy(hidden, weight, targets, CHUNK)


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Logits in the type of the inputs, the softmax in fp32: what transformers does."""
    return F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")


LOSSES = {"chunked": chunked, "plain": plain}


def forward_backward(loss: Callable[..., Tensor], inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    loss(*inputs).backward()
    for tensor in inputs[:2]:
        tensor.grad = None


def loss_memory(name: str, dtype: str, rows: int, vocabulary: int) -> dict[str, float]:
    """In a fresh process: how much a forward and a backward add, at most, to what holds the inputs."""
    inputs = loss_inputs(dtype, rows, vocabulary)
    torch.mm(inputs[0][:2], inputs[0][:2].T)  # what the library takes once
    reset_peak()
    before = resident_mb()
    LOSSES[name](*inputs).backward()
    return {"mb": peak_mb() - before}


def loss_bars(dtype: str, options: argparse.Namespace) -> list[Bar]:
    rows, vocabulary = options.loss_rows, options.vocabulary
    words = [__file__, f"--dtype={dtype}", f"--loss-rows={rows}", f"--vocabulary={vocabulary}"]
    memory = {name: figures_of([*words, f"--figures={name}"])["mb"] for name in LOSSES}
    inputs = loss_inputs(dtype, rows, vocabulary)
    comparison = compare(
        lambda: forward_backward(chunked, inputs), lambda: forward_backward(plain, inputs), pairs=options.pairs
    )
    with torch.no_grad():
        exact = F.cross_entropy(F.linear(inputs[0].float(), inputs[1].float()), inputs[2], reduction="sum")
    error = abs(chunked(*inputs).item() / exact.item() - 1)
    shape = f"{rows} rows of {WIDTH}, vocabulary {vocabulary:,}, {CHUNK} rows a chunk"
    print(f"loss in {dtype} ({shape}): {memory['chunked']:.0f} MB against {memory['plain']:.0f};", end=" ")
    print(comparison.line("linear cross-entropy", "plain logits"))
    return [
        Bar(
            f"linear cross-entropy, {dtype}, of the memory of logits",
            memory["chunked"] / memory["plain"],
            "<=",
            MAX_MEMORY,
        ),
        Bar(f"linear cross-entropy, {dtype}, of their speed", comparison.ratio, ">=", MIN_LOSS_SPEED),
        Bar(f"linear cross-entropy, {dtype}, relative error of the loss", error, "<=", MAX_LOSS_ERROR),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=7, help="timed pairs (default: 7)")
    parser.add_argument("--only", choices=("model", "loss"), help="one of the two questions (default: both)")
    parser.add_argument("--dose", action="store_true", help="small shapes and one pair, judging losses only")
    parser.add_argument("--figures", choices=LOSSES, help=argparse.SUPPRESS)  # what a process it starts has to do
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help=argparse.SUPPRESS)
    parser.add_argument("--loss-rows", type=int, default=ROWS, help=argparse.SUPPRESS)
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.figures is not None:
        print(json.dumps(loss_memory(options.figures, options.dtype, options.loss_rows, options.vocabulary)))
        return 0
    options.rows, options.length, options.steps = 4, 512, 2
    if options.dose:
        options.pairs, options.length, options.loss_rows, options.vocabulary = 1, 64, 128, 8192
    print(machine_line())
    bars = []
    with tempfile.TemporaryDirectory() as folder:
        for shape, dtype in TRAINED if options.only != "loss" else ():
            bars.append(model_speed(Path(folder), shape, dtype, options))
    for dtype in DTYPES if options.only != "model" else ():
        bars += loss_bars(dtype, options)
    code = print_verdict(bars)
    return 0 if options.dose else code


if __name__ == "__main__":
    sys.exit(main())
