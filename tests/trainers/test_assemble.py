"""A model starts with the same values on any mesh, whole, tied and with its buffers."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

from forgather.distributed import fsdp
from forgather.distributed.collectives import sum_ranks
from forgather.distributed.environment import Environment
from forgather.distributed.fsdp import apply_fsdp, describe_spread, fsdp_modules
from forgather.distributed.mesh import Mesh
from forgather.optim.schedules import constant
from forgather.trainers.assemble import assemble
from forgather.trainers.loss import CausalLoss
from forgather.trainers.step import LocalStep
from forgather.trainers.update import Update
from tests.models.example import package
from tests.ranks import RankPool
from tests.trainers.small_run import TinySource
from tests.trainers.tiny import microbatches


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[RankPool]:
    with RankPool(2) as pool:
        yield pool


def start(tied: bool, seed: int = 3) -> dict[str, torch.Tensor]:
    """All values of a newly assembled model, gathered."""
    model = assemble(TinySource(tied), Mesh(Environment(device="cpu")), seed=seed)
    assert model.training
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    values = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert not any(value.is_meta for value in values.values())
    return {name: (v.full_tensor() if isinstance(v, DTensor) else v).detach() for name, v in values.items()}


@pytest.mark.parametrize("tied", [False, True])
def test_any_mesh_starts_with_the_same_bits(two_ranks, tied):
    one = start(tied)
    assert one["model.layers.0.mlp.up_proj.weight"].std() == pytest.approx(0.1, rel=0.2)
    assert one["model.rotary_emb.inv_freq"][0] == 1.0
    for two in two_ranks.run(start, tied):
        assert two.keys() == one.keys()
        for name, value in one.items():
            assert torch.equal(two[name], value), name


def test_another_seed_gives_other_values():
    assert not torch.equal(start(False, 1)["lm_head.weight"], start(False, 2)["lm_head.weight"])


def train_package(folder: Path, precision: Any) -> tuple[str, list[float]]:
    """How the loss of a model of our own parts is computed, and its first losses."""
    mesh = Mesh(Environment(device="cpu"))
    model = assemble(package(folder / "a_llama", tie_word_embeddings=True), mesh, precision=precision, seed=1)
    loss = CausalLoss(model, chunk_rows=16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    step = LocalStep(model, loss, Update(optimizer, constant(), mesh), mesh)
    losses = []
    for number in range(3):
        total = step(number, microbatches(number, mesh.data_rank, mesh.data_ranks, 2)).loss_sum
        losses.append(float(sum_ranks(total.clone())))
    return loss.describe(), losses


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 2e-6), ("bf16", 2e-3)])
def test_a_package_of_our_parts_trains_the_same_on_two_ranks(two_ranks, tmp_path, precision, tolerance):
    words, one = train_package(tmp_path, precision)
    assert words == "linear cross-entropy, 16 rows at a time"
    for _, two in two_ranks.run(train_package, tmp_path, precision):
        assert two == pytest.approx(one, rel=tolerance)


def spread(one_group_below: int) -> tuple[str, list[str], str]:
    """In words, the groups, and whether the head is still there for the loss after a forward."""
    fsdp.ONE_GROUP_BELOW, before = one_group_below, fsdp.ONE_GROUP_BELOW
    with torch.device("meta"):
        model = LlamaForCausalLM(TinySource().config)
    apply_fsdp(model, Mesh(Environment(device="cpu")))
    fsdp.ONE_GROUP_BELOW = before
    names = {module: name for name, module in model.named_modules()}
    head = "sharded with the root" if not isinstance(model.lm_head, FSDPModule) else "on its own"
    return describe_spread(model), [names[module] for module in fsdp_modules(model)], head


def test_blocks_are_groups_and_the_head_belongs_to_the_root(two_ranks):
    for words, groups, head in two_ranks.run(spread, 0):
        assert words == "FSDP2 in 3 groups, blocks freed after forward, fp32"
        assert groups == ["", "model.layers.0", "model.layers.1"]
        assert head == "sharded with the root"


def test_a_small_model_is_one_group(two_ranks):
    for words, groups, _ in two_ranks.run(spread, 10**6):
        assert words == "FSDP2 in 1 group, fp32"
        assert groups == [""]


def test_a_world_of_one_is_not_wrapped():
    model = LlamaForCausalLM(LlamaConfig(vocab_size=7, hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
    apply_fsdp(model, Mesh(Environment(device="cpu")), "bf16")
    assert not list(fsdp_modules(model))
    assert describe_spread(model) == "not sharded, bf16"
