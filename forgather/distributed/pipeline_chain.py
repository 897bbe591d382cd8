"""Forward through all stages, without gradients: evaluation and samples, whatever schedule the training has.

Batches go through the stages one behind the other, so that ranks work at the same time. Each rank computes its first
stage for all of them, then its second; hidden states are sent as soon as they are there. The two ranks of any pair meet
each of their sends and receives in one order, as NCCL needs it: where both send, each has a group of its own for it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from forgather.distributed.fsdp import reshard
from forgather.distributed.pipeline import Pipeline, Stage


@dataclass(frozen=True)
class Rows:
    """What the stages are asked about, [B, L] each: the same on every rank of the pipeline."""

    input_ids: Tensor
    position_ids: Tensor | None = None
    targets: Tensor | None = None  # with them the last stage gives the loss, else logits
    logits_to_keep: int = 0


@torch.no_grad()
def run_chain(pipeline: Pipeline, batches: Sequence[Rows]) -> list[Tensor]:
    """What the last stage gives for each of `batches`; nothing on the ranks that do not have it.

    All ranks of the pipeline call it with the same rows.
    """
    pipeline.ties.copy_values()
    outputs: list[Tensor] = []
    handed: dict[int, Tensor] = {}  # from a stage to the next on the same rank, by batch
    sent: list[tuple[dist.Work, Tensor]] = []  # a tensor must live until it has been taken
    for stage in pipeline.stages:
        for number, rows in enumerate(batches):
            inputs = (
                rows.input_ids if stage.part.is_first else _receive(pipeline, stage, rows, handed.pop(number, None))
            )
            output = stage.model(
                inputs, position_ids=rows.position_ids, targets=rows.targets, logits_to_keep=rows.logits_to_keep
            )
            if stage.part.is_last:
                outputs.append(output)
            elif pipeline.plan.rank_of(stage.index + 1) == pipeline.rank:
                handed[number] = output
            else:
                sent.append((_send(pipeline, stage, output), output))
    for work, _ in sent:
        work.wait()
    for stage in pipeline.stages:
        reshard(stage.model)
    return outputs


def _receive(pipeline: Pipeline, stage: Stage, rows: Rows, handed: Tensor | None) -> Tensor:
    if handed is not None:
        return handed
    hidden = pipeline.room_for_hidden(*rows.input_ids.shape)
    source = pipeline.plan.rank_of(stage.index - 1)
    dist.recv(hidden, group=_group(pipeline, source, pipeline.rank), group_src=source)
    return hidden


def _send(pipeline: Pipeline, stage: Stage, hidden: Tensor) -> dist.Work:
    target = pipeline.plan.rank_of(stage.index + 1)
    work = dist.isend(hidden, group=_group(pipeline, pipeline.rank, target), group_dst=target)
    assert work is not None
    return work


def _group(pipeline: Pipeline, source: int, target: int) -> dist.ProcessGroup | None:
    return pipeline.group if source < target else pipeline.backward_group


class ChainForward:
    """`forward(input_ids=...)` gives the logits of the whole model, fp32, on every rank of the pipeline.

    In place of the union's own forward. There is no cache: stages would each keep a part of it, and what samples a
    model now and then reads a short text anew.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline

    def __call__(
        self, input_ids: Tensor, position_ids: Tensor | None = None, logits_to_keep: int = 0, **_unused: Any
    ) -> CausalLMOutputWithPast:
        outputs = run_chain(self.pipeline, [Rows(input_ids, position_ids, None, logits_to_keep)])
        rows, length = input_ids.shape
        vocabulary = len(self.pipeline.whole.get_output_embeddings().weight)
        shape = (rows, min(logits_to_keep, length) if logits_to_keep else length, vocabulary)
        logits = outputs[0].float().contiguous() if outputs else torch.empty(shape, device=self.pipeline.device)
        dist.broadcast(logits, group=self.pipeline.group, group_src=self.pipeline.plan.last_rank)
        return CausalLMOutputWithPast(logits=logits)
