"""A tiny run with everything that a checkpoint holds; the tests here use it, also in processes of its own."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

from forgather.checkpoint.loading import visible_checkpoint
from forgather.checkpoint.run_folder import RunFolder
from forgather.checkpoint.state import TrainState
from forgather.checkpoint.store import CheckpointStore
from forgather.distributed.collectives import rank, world_size


class Position:
    """A loader's position: which sample comes next."""

    def __init__(self) -> None:
        self.consumed = 0

    def state_dict(self) -> dict[str, Any]:
        return {"consumed": self.consumed, "fingerprint": "abc"}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.consumed = state["consumed"]


class Run:
    """Model, AdamW and a position; `step()` trains on a batch that the position decides, with dropout."""

    def __init__(self, *, seed: int = 0, tied: bool = True, hidden: int = 16, lr: float = 1e-3, sharded: bool = True):
        torch.manual_seed(seed)
        # 15 rows of vocabulary: 2 and 4 ranks divide them unevenly.
        config = LlamaConfig(
            vocab_size=15,
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=32,
            tie_word_embeddings=tied,
            attention_dropout=0.1,
        )
        self.model: nn.Module = LlamaForCausalLM(config)
        torch.manual_seed(seed + 1000 * (1 + rank()))
        random.seed(seed + rank())
        np.random.seed(seed + rank())
        if sharded and world_size() > 1:
            mesh = init_device_mesh("cpu", (world_size(),), mesh_dim_names=("shard",))
            for layer in self.model.model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(self.model, mesh=mesh)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=lr)
        self.position = Position()
        self.state = TrainState(self.model, self.optimizer, {"loader": self.position})

    def step(self) -> float:
        generator = torch.Generator().manual_seed(self.position.consumed)
        rows = torch.randint(0, 15, (4, 8), generator=generator)
        share = rows.chunk(world_size())[rank()]
        self.model.train()
        loss = self.model(input_ids=share, labels=share).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.position.consumed += 4
        random.random(), np.random.rand(), random.gauss(0, 1), np.random.randn()
        return loss.item()

    def values(self) -> dict[str, torch.Tensor]:
        """Weights and optimizer state as whole tensors."""
        named = dict(self.state.weights())
        for name, parameter in list(named.items()):
            for key, value in self.optimizer.state.get(parameter, {}).items():
                named[f"{name}/{key}"] = value
        whole = {
            name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for name, tensor in named.items()
        }
        return {name: tensor.detach().clone() for name, tensor in whole.items()}

    def hash(self) -> str:
        """One digest of weights, optimizer, position and this rank's random numbers."""
        digest = xxhash.xxh3_64()
        for name, tensor in sorted(self.values().items()):
            digest.update(name.encode())
            digest.update(tensor.contiguous().numpy().tobytes())
        digest.update(str(self.position.consumed).encode())
        digest.update(torch.get_rng_state().numpy().tobytes())
        digest.update(repr((random.getstate(), np.random.get_state(legacy=True)[1:])).encode())
        return digest.hexdigest()


def open_store(folder: Path, *, asynchronous: bool = False) -> CheckpointStore:
    return CheckpointStore(RunFolder(folder), asynchronous=asynchronous)


def save_at(folder: str, steps: int, **options: Any) -> tuple[dict[str, torch.Tensor], str]:
    """Train `steps` and save; this rank's view of what was saved."""
    run = Run(**options)
    for _ in range(steps):
        run.step()
    store = open_store(Path(folder))
    store.save(run.state, steps)
    store.run.close()
    return run.values(), run.hash()


def load_newest(folder: str, more_steps: int = 0, **options: Any) -> tuple[dict[str, torch.Tensor], str]:
    """Load into a run of another seed, and perhaps go on."""
    run = Run(seed=99, **options)
    store = open_store(Path(folder))
    checkpoint = store.resume(run.state)
    assert checkpoint is not None
    for _ in range(more_steps):
        run.step()
    store.run.close()
    return run.values(), run.hash()


def damage_in(folder: Path) -> list[str]:
    """What is wrong with the checkpoint in `folder`, every file of it read."""
    opened = visible_checkpoint(folder)
    return opened if isinstance(opened, list) else opened.manifest.damaged_digests(folder, opened.manifest.files)
