"""Layers split over ranks compute what the whole model computes, forward and backward, for any plan that is known."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from forgather.distributed.environment import Environment
from forgather.distributed.mesh import Mesh
from forgather.distributed.tensor_layers import SplitByInput
from forgather.distributed.tensor_parallel import apply_tensor_parallel, describe_split
from forgather.errors import DistributedError
from forgather.trainers.loss import CausalLoss
from tests.models.example import package
from tests.models.test_project_models import PROJECTS, construct
from tests.ranks import RankPool
from tests.trainers.tiny import LENGTH, VOCABULARY, join, rows_of_step

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": LENGTH,
    "initializer_range": 0.2,
    "pad_token_id": 70,  # a row of the second rank's
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def llama(**sizes: Any) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**SIZES | sizes))


def llama_with_biases() -> PreTrainedModel:
    return llama(attention_bias=True, mlp_bias=True, tie_word_embeddings=True)


def qwen3() -> PreTrainedModel:
    return Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8))


def gemma3() -> PreTrainedModel:
    return Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=4, query_pre_attn_scalar=8))


def phi3() -> PreTrainedModel:
    return Phi3ForCausalLM(Phi3Config(**SIZES))


def olmo2() -> PreTrainedModel:
    return Olmo2ForCausalLM(Olmo2Config(**SIZES))


def mixtral() -> PreTrainedModel:
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=2))


def gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2, n_positions=LENGTH))


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankPool]:
    with RankPool(2) as pool:
        yield pool


def seeded(make: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    torch.manual_seed(0)
    model = make().train()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:  # norms that are all ones, and biases that are zero, would hide mistakes
            nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
    return model


def compare(model: PreTrainedModel, **options: Any) -> tuple[str, dict[str, float]]:
    """How far the split model is from the whole: logits, loss, loss without gradients, and each gradient."""
    whole = copy.deepcopy(model)
    apply_tensor_parallel(model, Mesh(Environment(device="cpu"), shard=1, tensor=2), **options)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    batch = join(rows_of_step(0))
    inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "use_cache": False}
    far = {"logits": relative(model(**inputs).logits, whole(**inputs).logits)}
    losses = [CausalLoss(each, chunk_rows=24) for each in (model, whole)]
    with torch.no_grad():
        far["evaluation"] = relative(*[loss(batch) for loss in losses])
    values = [loss(batch) for loss in losses]
    far["loss"] = relative(*values)
    for value in values:
        (value / batch.num_targets).backward()
    gradients = {name: parameter.grad for name, parameter in whole.named_parameters()}
    # Of a bias of keys, which softmax does not see, there is only rounding.
    least = 1e-4 * float(torch.nn.utils.get_total_norm(gradients.values()))
    assert [name for name, _ in model.named_parameters()] == list(gradients)
    for name, parameter in model.named_parameters():
        assert isinstance(parameter.grad, DTensor)
        far[name] = relative(parameter.grad.full_tensor(), gradients[name], least)
    return str(describe_split(model)), far


def relative(ours: Tensor, theirs: Tensor, least: float = 0.0) -> float:
    return float((ours.detach() - theirs.detach()).norm() / theirs.detach().norm().clamp(min=least))


def compare_stock(make: Callable[[], PreTrainedModel], **options: Any) -> tuple[str, dict[str, float]]:
    return compare(seeded(make), **options)


@pytest.mark.parametrize("sequence_parallel", [True, False])
@pytest.mark.parametrize("make", [llama, llama_with_biases, qwen3, gemma3, phi3, olmo2], ids=lambda make: make.__name__)
def test_stock_models_compute_what_they_do_whole(ranks, make, sequence_parallel):
    for words, far in ranks.run(compare_stock, make, sequence_parallel=sequence_parallel):
        assert words.startswith("layers split over 2 ranks")
        # Nothing says of Olmo 2's norms of queries and keys what they work on.
        assert ("so are tokens" in words) == (sequence_parallel and make is not olmo2)
        assert max(far.values()) < 5e-6, far


def compare_package(folder: Path) -> tuple[str, dict[str, float]]:
    plan = {
        f"layers.*.{name}": style
        for style, names in {
            "colwise": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.gate_proj"),
            "rowwise": ("self_attn.o_proj", "mlp.down_proj"),
        }.items()
        for name in names
    }
    model = package(folder / "a_llama").construct(device="cpu")
    model.config.base_model_tp_plan = plan
    model.tp_plan = {f"model.{name}": style for name, style in plan.items()} | {
        "lm_head": "colwise_gather_output",
        "model.embed_tokens": "embedding_rowwise",
    }
    return compare(seeded(lambda: model))


def test_a_model_of_our_parts_computes_what_it_does_whole(ranks, tmp_path):
    package(tmp_path / "a_llama")
    for words, far in ranks.run(compare_package, tmp_path):
        assert "so are tokens" in words
        assert max(far.values()) < 5e-6, far


def compare_saved(folder: Path) -> tuple[str, dict[str, float]]:
    return compare(seeded(lambda: AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)))


@pytest.mark.soak
@pytest.mark.parametrize("name", [name for name in PROJECTS if name != "single_head/attention_only"])
def test_every_project_of_ours_computes_what_it_does_whole(ranks, tmp_path, name):
    sizes = {"num_key_value_heads": 2} if name == "gemma3" else {}  # one head cannot be split
    construct(name, tmp_path, **sizes).save_pretrained(tmp_path / "saved")
    for words, far in ranks.run(compare_saved, tmp_path / "saved"):
        assert ("so are tokens" in words) == (name not in ("deepone", "single_head"))  # attention is whole there
        assert max(far.values()) < 5e-6, far


def count_values() -> tuple[int, int]:
    """How many values this rank holds of the matrices, of how many."""
    model = seeded(llama)
    apply_tensor_parallel(model, Mesh(Environment(device="cpu"), shard=1, tensor=2))
    matrices = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    return sum(m.to_local().numel() for m in matrices), sum(m.numel() for m in matrices)


def test_each_rank_holds_its_part(ranks):
    (first, whole), (second, _) = ranks.run(count_values)
    assert first + second == whole
    assert abs(first - second) == 2 * SIZES["hidden_size"]  # the odd token of embedding and head


def text_of(split: bool) -> list[int]:
    model = seeded(llama).eval()
    if split:
        apply_tensor_parallel(model, Mesh(Environment(device="cpu"), shard=1, tensor=2))
    tokens = model.generate(torch.tensor([[3, 5, 7]]), max_new_tokens=9, do_sample=False, pad_token_id=0)
    return tokens[0].tolist()


def test_a_split_model_writes_the_same_text(ranks):
    expected = text_of(False)
    assert len(expected) > 4
    assert ranks.run(text_of, True) == [expected, expected]


def dropped(dropout: float, sequence_parallel: bool) -> tuple[list[Tensor], Tensor, Tensor]:
    """What this rank's heads give, twice with the same seed, when all heads are alike; and its gradient of a norm."""
    model = seeded(lambda: llama(attention_dropout=dropout, num_hidden_layers=1, num_key_value_heads=4))
    for name in ("q_proj", "k_proj", "v_proj"):
        weight = model.model.layers[0].self_attn.get_submodule(name).weight.detach()
        weight.copy_(weight[:8].repeat(4, 1))
    apply_tensor_parallel(
        model, Mesh(Environment(device="cpu"), shard=1, tensor=2), sequence_parallel=sequence_parallel
    )
    seen: list[Tensor] = []
    output = model.model.layers[0].self_attn.o_proj
    assert isinstance(output, SplitByInput)
    output.register_forward_pre_hook(lambda _module, args: seen.append(args[0].detach()))
    for _ in range(2):
        torch.manual_seed(7)
        model(input_ids=torch.arange(LENGTH).unsqueeze(0)).logits.sum().backward()
    gradient = model.model.norm.weight.grad
    assert isinstance(gradient, DTensor)
    return seen, gradient.to_local(), torch.rand(4)


@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_split_heads_drop_out_each_their_own(ranks, sequence_parallel):
    (without, _, _), (same, _, _) = ranks.run(dropped, 0.0, sequence_parallel)
    assert torch.equal(without[0], same[0])
    (first, gradient, after), (second, other_gradient, other_after) = ranks.run(dropped, 0.5, sequence_parallel)
    assert torch.equal(first[0], first[1])  # the same seed, the same draws
    assert not torch.equal(first[0], second[0])
    assert torch.equal(gradient, other_gradient)  # what all ranks compute is still the same
    assert torch.equal(after, other_after)


def refuse(make: Callable[[], PreTrainedModel], tensor: int = 2) -> str:
    model = seeded(make)
    with pytest.raises(DistributedError) as error:
        apply_tensor_parallel(model, Mesh(Environment(device="cpu"), shard=1, tensor=tensor))
    assert not any(isinstance(parameter, DTensor) for parameter in model.parameters())
    return str(error.value)


def odd_heads() -> PreTrainedModel:
    return llama(num_key_value_heads=1)


def odd_channels() -> PreTrainedModel:
    return llama(intermediate_size=45)


REFUSED = {
    gpt2: "mesh.tensor is 2, but GPT2LMHeadModel says nothing of how its layers are split\n"
    "  fix: use mesh.tensor 1 and more of mesh.shard, or give the model's config a base_model_tp_plan",
    mixtral: "mesh.tensor is 2, but the plan of MixtralForCausalLM has a style moe_tp_experts, which is not supported\n"
    "  fix: use mesh.tensor 1 and more of mesh.shard",
    odd_heads: "mesh.tensor is 2, but model.layers.0.self_attn.k_proj of LlamaForCausalLM has 1 head\n"
    "  fix: use mesh.tensor 1",
    odd_channels: "mesh.tensor is 2, but model.layers.0.mlp.gate_proj of LlamaForCausalLM has 45 channels\n"
    "  fix: use mesh.tensor 1",
}


@pytest.mark.parametrize("make", REFUSED, ids=lambda make: make.__name__)
def test_a_model_that_cannot_be_split_is_refused_before_anything_is(ranks, make):
    for message in ranks.run(refuse, make):
        assert message == REFUSED[make]


def odd_rows() -> str:
    model = seeded(llama)
    apply_tensor_parallel(model, Mesh(Environment(device="cpu"), shard=1, tensor=2))
    with pytest.raises(DistributedError) as error:
        model(input_ids=torch.zeros((1, 5), dtype=torch.int64))
    return str(error.value)


def test_rows_that_cannot_be_split_are_refused(ranks):
    for message in ranks.run(odd_rows):
        assert message == (
            "rows of 5 tokens cannot be split over mesh.tensor 2\n"
            "  fix: use a block_length that is a multiple of 2, or sequence_parallel: false"
        )
