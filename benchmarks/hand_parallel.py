"""Parallel training as a person writes it by hand over torch's primitives: what `parallel.py` measures ours against.

    replicate   DistributedDataParallel
    shard       fully_shard of each block and of the model, or of the model alone where it is small
    tensor      parallelize_module: columns, then rows; the loss from a head that stays split by the vocabulary
    pipeline    PipelineStage over slices of the layers, and a schedule of torch.distributed.pipelining

A stock Llama, its weights drawn as ours draws them. Nothing of Forgather's trainer is used here. Shapes: B rows, L
tokens, D hidden, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from hand_loop import LR, MAX_NORM, WEIGHT_DECAY
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    loss_parallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaForCausalLM
from transformers.masking_utils import create_causal_mask

from forgather.data.batch import Batch

AXES = ("pipeline", "replicate", "shard", "tensor")


class HandParallel:
    """`segment(n)` makes n steps on `batches`, this rank's microbatches, and gives their losses."""

    def __init__(
        self,
        model: LlamaForCausalLM,
        batches: Sequence[list[Batch]],
        sizes: Mapping[str, int],
        schedule: Any = None,
        *,
        one_group: bool,
    ) -> None:
        self.batches = iter(batches)
        self.sizes = {axis: sizes.get(axis, 1) for axis in AXES}
        axes = [axis for axis in AXES if self.sizes[axis] > 1]
        if self.sizes["replicate"] > 1 and self.sizes["pipeline"] * self.sizes["tensor"] > 1:
            raise NotImplementedError("replicas are written by hand for the data axes alone")
        self.mesh = init_device_mesh("cpu", tuple(self.sizes[axis] for axis in axes), mesh_dim_names=tuple(axes))
        self.data = self._part("replicate", "shard")
        self.num_data_ranks = self.sizes["replicate"] * self.sizes["shard"]
        if self.sizes["tensor"] > 1:
            split_by_hand(model, self.mesh["tensor"], loss_is_parallel=self.sizes["pipeline"] == 1)
        self.schedule: Any = None
        modules: list[nn.Module] = [model]
        if self.sizes["pipeline"] > 1:
            modules = self._stages(model, schedule)
        if self.sizes["shard"] > 1:
            for module in modules:
                shard_by_hand(module, self.data, one_group)
        self.model: nn.Module = modules[0]
        if self.sizes["replicate"] > 1 and self.sizes["shard"] == 1:
            self.model = DistributedDataParallel(model, gradient_as_bucket_view=True)
        self.parameters = [parameter for module in modules for parameter in module.parameters()]
        plain = [parameter for parameter in self.parameters if not isinstance(parameter, DTensor)]
        split = [parameter for parameter in self.parameters if isinstance(parameter, DTensor)]
        groups = [{"params": group} for group in (plain, split) if group]
        self.optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY, fused=True)
        self.all_sharded = self.sizes["pipeline"] * self.sizes["tensor"] == 1

    def segment(self, steps: int) -> list[float]:
        return [self.step(next(self.batches)).item() for _ in range(steps)]

    def step(self, microbatches: list[Batch]) -> Tensor:
        num_targets = torch.tensor(sum(batch.num_targets for batch in microbatches))
        if self.data is not None:
            for axis in self.data.mesh_dim_names or ():
                dist.all_reduce(num_targets, group=self.data.get_group(axis))
        loss = self._pipelined(microbatches, num_targets) if self.schedule else self._local(microbatches, num_targets)
        self._clip()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.data is not None:
            for axis in self.data.mesh_dim_names or ():
                dist.all_reduce(loss, group=self.data.get_group(axis))
        return loss

    def _local(self, microbatches: list[Batch], num_targets: Tensor) -> Tensor:
        total = torch.zeros(())
        for number, batch in enumerate(microbatches):
            is_last = number == len(microbatches) - 1
            if self.sizes["shard"] > 1:
                self.model.set_requires_gradient_sync(is_last)
            elif self.num_data_ranks > 1:
                self.model.require_backward_grad_sync = is_last
            logits = self.model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
            with loss_parallel():
                loss = cross_entropy(logits, batch.targets) / num_targets
                (loss * self.num_data_ranks).backward()  # the wrappers take the mean over the ranks
            total += (loss.full_tensor() if isinstance(loss, DTensor) else loss).detach()
        return total

    def _pipelined(self, microbatches: list[Batch], num_targets: Tensor) -> Tensor:
        self.num_targets = num_targets
        losses: list[Tensor] = []
        positions = torch.cat([batch.position_ids for batch in microbatches])
        targets = torch.cat([batch.targets for batch in microbatches])
        inputs = torch.cat([batch.input_ids for batch in microbatches])
        self.schedule.step(inputs, position_ids=positions, target=targets, losses=losses, return_outputs=False)
        return torch.stack(losses).sum().detach() / self.num_data_ranks if losses else torch.zeros(())

    def _stages(self, model: LlamaForCausalLM, schedule: Any) -> list[nn.Module]:
        ranks, rank = self.sizes["pipeline"], self.mesh.get_local_rank("pipeline")
        make, per_rank, is_v, microbatches = schedule
        count = ranks * per_rank
        number = len(model.model.layers) // count
        places = [lap * ranks + (ranks - 1 - rank if is_v and lap % 2 else rank) for lap in range(per_rank)]
        slices = [HandStage(model, place * number, (place + 1) * number) for place in places]
        stages = [
            PipelineStage(module, place, count, torch.device("cpu"), group=self.mesh.get_group("pipeline"))
            for module, place in zip(slices, places, strict=True)
        ]
        self.schedule = make(
            stages if per_rank > 1 else stages[0],
            n_microbatches=microbatches,
            loss_fn=lambda logits, targets: cross_entropy(logits, targets) * self.num_data_ranks / self.num_targets,
            scale_grads=False,
        )
        return list(slices)

    def _clip(self) -> None:
        if self.all_sharded:
            torch.nn.utils.clip_grad_norm_(self.parameters, MAX_NORM)
            return
        # torch's own function takes no gradients of several kinds; whole ones count on one rank of the tensor axis.
        first = self.sizes["tensor"] == 1 or self.mesh.get_local_rank("tensor") == 0
        squares, local = torch.zeros(()), []
        for parameter in self.parameters:
            gradient = parameter.grad
            assert gradient is not None
            part = gradient.to_local() if isinstance(gradient, DTensor) else gradient
            local.append(part)
            if first or _is_split(gradient):
                squares += part.square().sum()
        dist.all_reduce(squares)
        torch._foreach_mul_(local, (MAX_NORM / (squares.sqrt() + 1e-6)).clamp(max=1.0))

    def _part(self, *axes: str) -> DeviceMesh | None:
        present = tuple(axis for axis in axes if self.sizes[axis] > 1)
        return self.mesh[present] if present else None


def shard_by_hand(model: nn.Module, mesh: DeviceMesh | None, one_group: bool) -> None:
    layers = model.layers if isinstance(model, HandStage) else model.model.layers
    for layer in () if one_group else layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def split_by_hand(model: LlamaForCausalLM, mesh: DeviceMesh, *, loss_is_parallel: bool) -> None:
    """Columns, then rows, in attention and feed-forward network; embedding by rows, head by columns."""
    columns, rows = ColwiseParallel(), RowwiseParallel()
    plan: dict[str, Any] = {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate()),
        "lm_head": ColwiseParallel(
            output_layouts=Shard(-1) if loss_is_parallel else Replicate(), use_local_output=not loss_is_parallel
        ),
    }
    for number in range(len(model.model.layers)):
        prefix = f"model.layers.{number}"
        plan |= {f"{prefix}.self_attn.{name}_proj": columns for name in "qkv"}
        plan |= {f"{prefix}.mlp.{name}_proj": columns for name in ("gate", "up")}
        plan |= {f"{prefix}.self_attn.o_proj": rows, f"{prefix}.mlp.down_proj": rows}
    parallelize_module(model, mesh, plan)


class HandStage(nn.Module):
    """Layers `first` to `end` of a Llama, with the embedding before the first and the head behind the last."""

    def __init__(self, model: LlamaForCausalLM, first: int, end: int) -> None:
        super().__init__()
        self.config = model.config
        self.embed_tokens = model.model.embed_tokens if first == 0 else None
        self.layers = nn.ModuleList(model.model.layers[first:end])
        self.rotary_emb = model.model.rotary_emb
        is_last = end == len(model.model.layers)
        self.norm = model.model.norm if is_last else None
        self.lm_head = model.lm_head if is_last else None

    def forward(self, inputs: Tensor, position_ids: Tensor) -> Tensor:
        x_BLD = inputs if self.embed_tokens is None else self.embed_tokens(inputs)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=x_BLD,
            attention_mask=None,
            past_key_values=None,
            position_ids=position_ids,
        )
        rotary = self.rotary_emb(x_BLD, position_ids=position_ids)
        for layer in self.layers:
            x_BLD = layer(x_BLD, attention_mask=mask, position_embeddings=rotary, position_ids=position_ids)
        return x_BLD if self.lm_head is None or self.norm is None else self.lm_head(self.norm(x_BLD))


def cross_entropy(logits_BLV: Tensor, targets_BL: Tensor) -> Tensor:
    """The sum over target tokens."""
    return F.cross_entropy(logits_BLV.flatten(0, 1), targets_BL.flatten(), reduction="sum")


def _is_split(gradient: Tensor) -> bool:
    """Whether the ranks of the tensor axis have different parts."""
    if not isinstance(gradient, DTensor):
        return False
    names = gradient.device_mesh.mesh_dim_names or ()
    return "tensor" in names and gradient.placements[names.index("tensor")].is_shard()
