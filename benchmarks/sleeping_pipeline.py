"""The idle time of a pipeline schedule, on stages that sleep instead of computing.

A sleeping rank takes no core and no noise shows, so a pipeline of several ranks can be measured on a machine with one
core. Each layer of a tiny Llama sleeps in its forward, as long for the gradient of its input, and as long for that of
its weight, which schedules that split the backward do later.

What is around the sleeps takes time too, 70 to 90 ms of a step in a quiet hour and three times as much in a busy one,
under every schedule. So a step is timed with short sleeps and with long ones in turns: what does not depend on the
sleeps is in both, and their difference shows the schedule alone.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from forgather.data.batch import Batch
from forgather.distributed.environment import Environment
from forgather.distributed.mesh import Mesh
from forgather.distributed.pipeline import pipeline_of
from forgather.distributed.pipeline_plan import SCHEDULES, PipelinePlan
from forgather.models.parts.initializers import Normal, Ones
from forgather.optim.schedules import constant
from forgather.optim.sgd import SGD
from forgather.trainers.assemble import assemble
from forgather.trainers.strategy import build_loss, build_step
from forgather.trainers.update import Update

SHORT_S, LONG_S = 0.05, 0.25
RANKS, LAYERS, MICROBATCHES, LENGTH = 2, 4, 4, 8
STEPS = 3  # of each length


@dataclass
class Sleeps:
    """How long this rank's next sleep is, and how many it has slept."""

    seconds: float = SHORT_S
    count: int = 0


sleeps = Sleeps()


@dataclass(frozen=True)
class Bubble:
    """Idle time of a rank over its working time: p ranks, m microbatches, v stages a rank."""

    text: str
    ratio: Callable[[int, int, int], float]
    source: str


# Forward, gradient of inputs and gradient of weights take equally long here.
BUBBLES = {
    "gpipe": Bubble("(p-1)/m", lambda p, m, _: (p - 1) / m, "Huang et al. 2018"),
    "1f1b": Bubble("(p-1)/m", lambda p, m, _: (p - 1) / m, "Narayanan et al. 2021, 2.2"),
    "interleaved_1f1b": Bubble("(p-1)/(v m)", lambda p, m, v: (p - 1) / (v * m), "Narayanan et al. 2021, 2.2"),
    "looped_bfs": Bubble("(p-1)/(v m)", lambda p, m, v: (p - 1) / (v * m), "Lamy-Poirier 2022"),
    "interleaved_zero_bubble": Bubble("(p-1)/(3 v m)", lambda p, m, v: (p - 1) / (3 * v * m), "Qi et al. 2023"),
    "zbv": Bubble("(p-1)/(3 v m)", lambda p, m, v: (p - 1) / (3 * v * m), "Qi et al. 2023, 6: the start alone"),
}


def _sleep() -> None:
    sleeps.count += 1
    time.sleep(sleeps.seconds)


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, x: Tensor) -> Tensor:
        _sleep()
        return x.view_as(x)

    @staticmethod
    def backward(_ctx: Any, gradient: Tensor) -> Tensor:
        _sleep()
        return gradient


class _SleepForWeight(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, weight: Tensor) -> Tensor:
        return weight.view_as(weight)

    @staticmethod
    def backward(_ctx: Any, gradient: Tensor) -> Tensor:
        _sleep()
        return gradient


class SleepingLayer(LlamaDecoderLayer):
    """A layer whose time is its sleep; `pace` is the weight that it sleeps for."""

    def __init__(self, config: LlamaConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.pace = nn.Parameter(torch.ones(config.hidden_size))

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        hidden: Tensor = super().forward(hidden_states, **kwargs)
        return _Sleep.apply(hidden) * _SleepForWeight.apply(self.pace)


class SleepingLlama(LlamaForCausalLM):
    _no_split_modules: ClassVar = ["SleepingLayer"]

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.model.layers = nn.ModuleList(SleepingLayer(config, number) for number in range(config.num_hidden_layers))


class _Source:
    init_rules: ClassVar = {"norm|pace": Ones(), ".*": Normal(std=0.02)}

    def construct(self, device: str = "meta", **_: Any) -> LlamaForCausalLM:
        config = LlamaConfig(
            vocab_size=16,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=LAYERS,
            num_attention_heads=1,
            max_position_embeddings=LENGTH,
        )
        with torch.device(device):
            return SleepingLlama(config)


def measure_bubble(schedule: str) -> dict[str, float]:
    """The idle part of a step's working time, from the best steps of each length, and what the formula says."""
    mesh = Mesh(Environment(device="cpu"), shard=1, pipeline=RANKS)
    stages = SCHEDULES[schedule].default_stages
    per_stage = LAYERS // (RANKS * stages)
    plan = PipelinePlan(
        mesh,
        rows=MICROBATCHES,
        rows_per_forward=1,
        length=LENGTH,
        schedule=schedule,
        cuts=[per_stage * number for number in range(1, RANKS * stages)],
        microbatches=MICROBATCHES,
    )
    model = assemble(_Source(), mesh, pipeline=plan)
    assert pipeline_of(model) is not None
    update = Update(SGD([{"params": list(model.named_parameters())}], lr=0.0), constant(), mesh)
    step = build_step(model, build_loss(model, chunk_rows=None), update, mesh)
    tokens = torch.zeros((1, LENGTH), dtype=torch.int64)
    batches = [Batch(tokens, tokens, torch.arange(LENGTH)[None], LENGTH, (row,)) for row in range(MICROBATCHES)]
    # Work is what has to be done once: a schedule that did a part of it twice would show it as idle time.
    units = MICROBATCHES * (LAYERS // RANKS) * 3
    times: dict[float, list[float]] = {SHORT_S: [], LONG_S: []}
    for number in range(2 * STEPS):
        sleeps.seconds, sleeps.count = (SHORT_S, LONG_S)[number % 2], 0
        dist.barrier()
        start = time.perf_counter()
        step(number, batches)
        took = torch.tensor(time.perf_counter() - start)
        dist.all_reduce(took, dist.ReduceOp.MAX)
        assert sleeps.count >= units
        times[sleeps.seconds].append(took.item())
    bubble = (min(times[LONG_S]) - min(times[SHORT_S])) / (units * (LONG_S - SHORT_S)) - 1
    formula = BUBBLES[schedule].ratio(RANKS, MICROBATCHES, stages)
    return {"bubble": bubble, "formula": formula, "slept": sleeps.count}
