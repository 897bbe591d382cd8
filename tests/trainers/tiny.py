"""A stock Llama of a few thousand parameters, hand-made batches, and LocalStep run over them on any number of ranks."""

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from forgather.data.batch import Batch
from forgather.distributed import fsdp
from forgather.distributed.environment import Environment
from forgather.distributed.mesh import Mesh
from forgather.optim.schedules import constant
from forgather.trainers.loss import CausalLoss
from forgather.trainers.step import LocalStep
from forgather.trainers.update import Update

VOCABULARY = 131  # odd, so that no shard divides evenly
LENGTH = 16
ROWS = 8


def tiny_llama(tied: bool = False, dropout: float = 0.0) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=LENGTH,
            tie_word_embeddings=tied,
            attention_dropout=dropout,
            initializer_range=0.2,
        )
    )


def rows_of_step(step: int, rows: int = ROWS) -> list[Batch]:
    """The rows of one global batch, each as a batch of its own: two documents a row, uneven numbers of targets."""
    generator = torch.Generator().manual_seed(1000 + step)
    batches = []
    for row in range(rows):
        tokens = torch.randint(0, VOCABULARY, (LENGTH + 1,), generator=generator)
        split = 3 + (step + 2 * row) % (LENGTH - 4)
        position_ids = torch.cat([torch.arange(split), torch.arange(LENGTH - split)])
        targets = tokens[1:].clone()
        targets[split - 1] = -100
        targets[: row * 2] = -100  # the first row has 15 targets, the last 1
        batches.append(
            Batch(
                tokens[:-1].unsqueeze(0),
                targets.unsqueeze(0),
                position_ids.unsqueeze(0),
                int((targets != -100).sum()),
                (step * rows + row,),
            )
        )
    return batches


def join(batches: list[Batch]) -> Batch:
    return Batch(
        torch.cat([b.input_ids for b in batches]),
        torch.cat([b.targets for b in batches]),
        torch.cat([b.position_ids for b in batches]),
        sum(b.num_targets for b in batches),
        sum((b.samples for b in batches), ()),
    )


def microbatches(step: int, rank: int, ranks: int, accumulate: int, rows: int = ROWS) -> list[Batch]:
    """This rank's share of the global batch of `step`, cut into `accumulate` microbatches."""
    share = rows_of_step(step, rows)[rank * rows // ranks : (rank + 1) * rows // ranks]
    size = len(share) // accumulate
    return [join(share[start : start + size]) for start in range(0, len(share), size)]


def build_step(
    mesh: Mesh,
    *,
    tied: bool = False,
    precision: Any = "fp32",
    one_group: bool = False,
    reshard_after_forward: bool = True,
    max_grad_norm: float | None = 1.0,
    lr: float = 1e-2,
    seed: int = 0,
    dropout: float = 0.0,
) -> LocalStep:
    model = tiny_llama(tied, dropout)
    limit, fsdp.ONE_GROUP_BELOW = fsdp.ONE_GROUP_BELOW, (10**9 if one_group else 0)
    try:
        fsdp.apply_fsdp(model, mesh, precision, fsdp.FsdpOptions(reshard_after_forward=reshard_after_forward))
    finally:
        fsdp.ONE_GROUP_BELOW = limit
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.1, fused=True)
    loss = CausalLoss(model, chunk_rows=8)
    update = Update(optimizer, constant(), mesh, max_grad_norm=max_grad_norm)
    return LocalStep(model, loss, update, mesh, seed=seed)


def run_steps(
    steps: int = 4, accumulate: int = 1, replicate: int = 1, **kwargs: Any
) -> tuple[list[float], list[float]]:
    """Mean losses and gradient norms of `steps` steps, the same on every rank."""
    environment = Environment(device="cpu")
    mesh = Mesh(environment, replicate=replicate)
    step = build_step(mesh, **kwargs)
    losses, norms = [], []
    for number in range(steps):
        result = step(number, microbatches(number, mesh.data_rank, mesh.data_ranks, accumulate))
        loss = result.loss_sum.double()
        if mesh.data_ranks > 1:
            torch.distributed.all_reduce(loss)
        losses.append(loss.item())
        norms.append(result.grad_norm.item())
    return losses, norms
