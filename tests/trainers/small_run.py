"""A whole run in miniature, composed by hand as `configs/lib/train/causal_lm.yaml` composes a real one."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
import xxhash
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

from forgather.checkpoint.run_folder import RunFolder
from forgather.checkpoint.store import CheckpointStore
from forgather.data.loader import EvaluationLoader, Loader
from forgather.data.order import Permutation
from forgather.data.packing import PackedBlocks
from forgather.data.shards import ShardSet
from forgather.distributed.environment import Environment
from forgather.distributed.mesh import Mesh
from forgather.metrics.console import Console
from forgather.metrics.meter import Meter
from forgather.metrics.sinks import JsonLines
from forgather.models.parts.initializers import Normal, Ones
from forgather.optim.groups import build_optimizer
from forgather.optim.schedules import warmup_cosine
from forgather.trainers.assemble import assemble
from forgather.trainers.evaluation import Evaluation
from forgather.trainers.loss import CausalLoss
from forgather.trainers.reports import Reports
from forgather.trainers.step import LocalStep
from forgather.trainers.trainer import Trainer
from forgather.trainers.update import Update
from tests.data.corpora import write_shards

VOCABULARY = 61
LENGTH = 12


def write_corpus(folder: Path) -> ShardSet:
    """Documents that count upwards in steps of one to five: easy to learn."""
    documents = [
        [1 + (start + step * k) % (VOCABULARY - 1) for k in range(17)] for start in range(60) for step in (1, 2, 5)
    ]
    return write_shards(folder, documents, shard_tokens=1000)


class TinySource:
    """A stock Llama, as `assemble` wants its models."""

    init_rules: ClassVar = {"norm": Ones(), ".*": Normal(std=0.1)}

    def __init__(self, tied: bool = False, dropout: float = 0.0) -> None:
        self.config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=LENGTH,
            tie_word_embeddings=tied,
            attention_dropout=dropout,
        )

    def construct(self, device: str = "meta", *, dtype: torch.dtype | None = None) -> LlamaForCausalLM:
        with torch.device(device):
            return LlamaForCausalLM(self.config)


def make_trainer(
    folder: Path,
    corpus: Path,
    *,
    steps: int,
    name: str = "run",
    fresh: bool = False,
    lr: float = 1e-2,
    tied: bool = False,
    dropout: float = 0.0,
    rows_per_step: int = 8,
    save_every: int | None = None,
    asynchronous: bool = False,
    hooks: Mapping[str, Any] | None = None,
    schedule_steps: int | None = None,
) -> Trainer:
    mesh = Mesh(Environment(device="cpu"))
    blocks = PackedBlocks(ShardSet(corpus), LENGTH)
    place: dict[str, Any] = {"data_rank": mesh.data_rank, "data_ranks": mesh.data_ranks}
    data = Loader(blocks, Permutation(len(blocks), 0), rows_per_step=rows_per_step, rows_per_forward=2, **place)
    model = assemble(TinySource(tied, dropout), mesh, seed=5)
    loss = CausalLoss(model)
    optimizer = build_optimizer(
        model,
        partial(torch.optim.AdamW, lr=lr, weight_decay=0.1, fused=True),
        {"no_decay": {"match": "norm", "weight_decay": 0.0}},
    )
    schedule = warmup_cosine(length=schedule_steps or steps, warmup=2)
    run = RunFolder(folder / name, fresh)
    return Trainer(
        model=model,
        optimizer=optimizer,
        step=LocalStep(model, loss, Update(optimizer, schedule, mesh), mesh),
        data=data,
        mesh=mesh,
        meter=Meter(mesh.environment.device),
        reports=Reports(Console(steps), {"jsonl": JsonLines(run.logs / "metrics.jsonl"), "other": None}),
        checkpoints=CheckpointStore(run, asynchronous=asynchronous),
        steps=steps,
        evaluation=Evaluation(loss, EvaluationLoader(blocks, rows_per_forward=3, limit=7, **place), mesh),
        hooks=hooks,
        log_every=1,
        save_every=save_every,
    )


def hash_of(trainer: Trainer, *, with_random: bool = True) -> str:
    """One hash over the weights, the optimizer and the random numbers of this rank, and the place in the data."""
    digest = xxhash.xxh3_128()
    for parameter in trainer.model.parameters():
        for tensor in (parameter, *(v for v in trainer.state.optimizer.state[parameter].values())):
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            digest.update(local.detach().contiguous().numpy().tobytes())
    if with_random:
        digest.update(torch.get_rng_state().numpy().tobytes())
    digest.update(str(trainer.data.state_dict()).encode())
    return digest.hexdigest()
