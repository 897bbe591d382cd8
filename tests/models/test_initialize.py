"""The same values on any sharding, the right distributions, and no parameter or buffer forgotten."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoConfig, GPTNeoForCausalLM, LlamaForCausalLM

from forgather.errors import ModelError
from forgather.models.initialize import BLOCK, initialize, make_whole
from forgather.models.package import Package
from forgather.models.parts.initializers import (
    Constant,
    DepthScaledNormal,
    FanInNormal,
    Keep,
    Normal,
    Ones,
    Orthogonal,
    Uniform,
    XavierUniform,
    ZeroRow,
    Zeros,
)
from tests.models.example import llama_config
from tests.ranks import RankPool

RULES = {
    r"norm.*\.weight$": Ones(),
    r"bias$": Zeros(may_match_nothing=True),
    r"(o|down)_proj": DepthScaledNormal(std=0.02, num_layers=3),
    r"proj|embed|lm_head": Normal(std=0.02),
}


class Odd(nn.Module):
    """Shapes that end blocks, rows and shards in the middle of things."""

    def __init__(self) -> None:
        super().__init__()
        self.long = nn.Parameter(torch.empty(5, BLOCK // 3 + 7))
        self.tall = nn.Parameter(torch.empty(2 * BLOCK + 1, 3))
        self.short = nn.Parameter(torch.empty(3))
        self.one = nn.Parameter(torch.empty(()))
        self.linear = nn.Linear(70, 30)
        self.counted = nn.Parameter(torch.empty(9, 11))
        self.turning = nn.Parameter(torch.empty(7, 13))
        self.fan = nn.Parameter(torch.empty(50, 17))
        self.table = nn.Embedding(9, 6)
        self.even = nn.Parameter(torch.empty(33))


@dataclass(frozen=True)
class ByShape:
    """Values that only one who sees the whole can give: each counts from the first, times what the generator says."""

    may_match_nothing: bool = False
    needs_whole = True

    def fill(self, tensor: torch.Tensor, generator: torch.Generator | None = None) -> None:
        factor = torch.rand((), generator=generator, dtype=tensor.dtype)
        tensor.copy_(torch.arange(tensor.numel(), dtype=torch.float32).view(tensor.shape) * factor)


ODD_RULES = {
    "linear": Keep(),
    "counted": ByShape(),
    "turning": Orthogonal(),
    "fan": XavierUniform(),
    "table": ZeroRow(initializer=FanInNormal(), row=7),
    "even": Uniform(bound=2.0),
    ".": Normal(std=1.0),
}


def odd() -> Odd:
    with torch.device("meta"):
        return Odd()


def drawn(model: nn.Module, rules: Any = RULES, seed: int = 7) -> dict[str, torch.Tensor]:
    model.to_empty(device="cpu")
    initialize(model, rules, seed)
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def stock(**sizes: Any) -> LlamaForCausalLM:
    with torch.device("meta"):
        return LlamaForCausalLM(llama_config(**sizes))


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: pytest.FixtureRequest) -> Iterator[RankPool]:
    with RankPool(request.param) as pool:
        yield pool


def placed(cut: str) -> None:
    """Runs on a rank: each parameter of Odd, placed as `cut` says, has the slice of the whole draw."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (2, size // 2))
    placements = {
        "rows": (Replicate(), Shard(0)),
        "rows, in bfloat16 by default": (Replicate(), Shard(0)),
        "columns": (Shard(1), Replicate()),
        "both": (Shard(0), Shard(1)),
        "rows twice": (Shard(0), Shard(0)),
        "copies": (Replicate(), Replicate()),
    }[cut]
    model, whole = odd().to_empty(device="cpu"), drawn(odd(), ODD_RULES)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            wanted = [p if not isinstance(p, Shard) or p.dim < parameter.dim() else Replicate() for p in placements]
            empty = distribute_tensor(torch.empty(parameter.shape), mesh, wanted)
            module.register_parameter(name, nn.Parameter(empty))
    torch.set_default_dtype(torch.bfloat16 if "bfloat16" in cut else torch.float32)
    initialize(model, ODD_RULES, 7)
    torch.set_default_dtype(torch.float32)
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        assert torch.equal(parameter.full_tensor(), whole[name]), name


@pytest.mark.parametrize("cut", ["rows", "rows, in bfloat16 by default", "columns", "both", "rows twice", "copies"])
def test_a_shard_is_bit_equal_to_its_slice_of_the_whole(ranks: RankPool, cut: str) -> None:
    ranks.run(placed, cut)


def sharded_llama(tie: bool, dtype: torch.dtype) -> None:
    """Runs on a rank: fully_shard, to_empty, initialize give what one process draws; a tie holds."""
    from torch.distributed.fsdp import fully_shard

    whole = drawn(stock(tie_word_embeddings=tie).to(dtype))
    model = stock(tie_word_embeddings=tie).to(dtype)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    shards = drawn(model)
    for name, tensor in whole.items():
        assert torch.equal(shards[name].full_tensor(), tensor), name
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tie
    tokens = torch.arange(24).view(2, 12)
    loss = model(tokens, labels=tokens).loss
    loss.backward()
    assert model.lm_head.weight.grad is not None


@pytest.mark.parametrize(("tie", "dtype"), [(False, torch.float32), (True, torch.float32), (True, torch.bfloat16)])
def test_fully_shard_starts_as_one_process_does(ranks: RankPool, tie: bool, dtype: torch.dtype) -> None:
    ranks.run(sharded_llama, tie, dtype)


@pytest.mark.case(35)
def test_values_depend_on_seed_and_name_alone() -> None:
    first, second, other = drawn(stock()), drawn(stock(num_hidden_layers=2)), drawn(stock(), seed=8)
    name = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(first[name], second[name])
    assert not torch.equal(first[name], other[name])
    assert not torch.equal(first[name], first[name.replace("q_proj", "o_proj")])


def test_names_do_not_hold_the_wrappers_of_compiled_and_recomputed_modules() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    plain, wrapped = stock(), stock()
    wrapped.model.layers[1] = checkpoint_wrapper(wrapped.model.layers[1])
    drawn(plain), drawn(wrapped)
    assert torch.equal(plain.model.layers[1].mlp.up_proj.weight, wrapped.model.layers[1].mlp.up_proj.weight)


def test_low_precision_is_the_float32_draw_rounded() -> None:
    exact, rounded = drawn(stock()), drawn(stock().to(torch.bfloat16))
    for name, tensor in exact.items():
        assert torch.equal(tensor.bfloat16(), rounded[name]), name


@pytest.mark.case(29, 30)
def test_distributions_of_the_llama_set(tiny: Package) -> None:
    model = tiny.construct("cpu")
    std = {name: parameter.std().item() for name, parameter in model.named_parameters()}
    layer = "model.layers.1."
    assert std[layer + "mlp.up_proj.weight"] == pytest.approx(0.02, rel=0.05)
    assert std[layer + "self_attn.q_proj.weight"] == pytest.approx(0.02, rel=0.05)
    assert std[layer + "self_attn.o_proj.weight"] == pytest.approx(0.02 / 6**0.5, rel=0.05)
    assert std[layer + "mlp.down_proj.weight"] == pytest.approx(0.02 / 6**0.5, rel=0.05)
    assert std["model.embed_tokens.weight"] == pytest.approx(1.0, rel=0.05)
    assert std["lm_head.weight"] == pytest.approx(64**-0.5, rel=0.05)
    assert model.lm_head.weight.abs().max() <= 3 * 64**-0.5
    assert torch.equal(model.model.norm.weight, torch.ones(64))


@pytest.mark.case(30)
def test_biases_are_zero_and_so_is_the_row_of_the_padding_token() -> None:
    values = drawn(
        stock(attention_bias=True),
        {r"embed_tokens": ZeroRow(initializer=Normal(std=1.0), row=1), r"k_proj\.bias$": Constant(value=2.5), **RULES},
    )
    assert not values["model.layers.1.self_attn.q_proj.bias"].any()
    assert torch.equal(values["model.layers.1.self_attn.k_proj.bias"], torch.full((32,), 2.5))
    rows = values["model.embed_tokens.weight"].any(dim=1)
    assert rows.tolist() == [row != 1 for row in range(277)]


@pytest.mark.case(31)
def test_the_first_rule_that_matches_wins() -> None:
    values = drawn(stock(), {"up_proj": Zeros(), **RULES})
    assert not values["model.layers.0.mlp.up_proj.weight"].any()
    assert values["model.layers.0.mlp.gate_proj.weight"].any()


@pytest.mark.case(33)
def test_a_parameter_without_a_rule_is_named() -> None:
    rules = {pattern: rule for pattern, rule in RULES.items() if "norm" not in pattern}
    with pytest.raises(ModelError, match=r"no initialisation rule for .*model\.norm\.weight"):
        drawn(stock(), rules)


@pytest.mark.case(32)
def test_a_rule_for_the_bias_alone_leaves_the_weight_to_be_named() -> None:
    with pytest.raises(ModelError, match=r"no initialisation rule for 0\.weight\n"):
        drawn(nn.Sequential(nn.Linear(3, 3, device="meta")), {"bias": Zeros()})


def test_a_rule_for_nothing_is_named_unless_marked() -> None:
    with pytest.raises(ModelError, match="match no parameter: query_proj\n") as raised:
        drawn(stock(), {"query_proj": Ones(), **RULES})
    assert "may_match_nothing" in str(raised.value.fix)
    drawn(stock(), {"query_proj": Ones(may_match_nothing=True), **RULES})


def test_a_rule_that_an_earlier_one_shadows_is_no_error() -> None:
    drawn(stock(), {"(o|down)_proj": Zeros(), **RULES})


def test_still_on_meta() -> None:
    with pytest.raises(ModelError, match=re.escape("still on the meta device: model.embed_tokens.weight")) as raised:
        initialize(stock(), RULES, 0)
    assert "to_empty" in str(raised.value.fix)


def test_buffers_are_recomputed_and_ties_remade(tied: Package) -> None:
    for model in (stock(tie_word_embeddings=True), tied.construct("meta")):
        fresh = LlamaForCausalLM(llama_config()).model.rotary_emb
        model.to_empty(device="cpu")
        model.model.rotary_emb.inv_freq.fill_(-1)
        make_whole(model)
        assert torch.equal(model.model.rotary_emb.inv_freq, fresh.inv_freq)
        assert torch.equal(model.model.rotary_emb.original_inv_freq, fresh.inv_freq)
        assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_buffer_that_nothing_computes_is_named() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3))
    with pytest.raises(ModelError, match=r"buffers 0\.running_mean, 0\.running_var, 0\.num_batches_tracked") as raised:
        initialize(model, {".": Ones()}, 0)
    assert "BatchNorm1d" in str(raised.value.fix)


def test_masks_are_recomputed() -> None:
    """GPT-Neo keeps its causal and its local mask as booleans, in no checkpoint."""
    config = GPTNeoConfig(
        hidden_size=32,
        num_layers=2,
        num_heads=2,
        attention_types=[[["global", "local"], 1]],
        window_size=4,
        vocab_size=64,
        max_position_embeddings=16,
        bos_token_id=0,
        eos_token_id=0,
    )
    fresh = dict(GPTNeoForCausalLM(config).named_buffers())
    with torch.device("meta"):
        model = GPTNeoForCausalLM(config)
    model.to_empty(device="cpu")
    for buffer in model.buffers():
        buffer.fill_(1)
    make_whole(model)
    assert len(fresh) == 2
    assert all(torch.equal(buffer, fresh[name]) for name, buffer in model.named_buffers())


@pytest.mark.case(33)
def test_keep_is_what_torch_draws() -> None:
    values = drawn(odd(), ODD_RULES)
    bound = 70**-0.5  # torch's own for a Linear of 70 inputs
    assert 0.9 * bound < values["linear.weight"].abs().max() <= bound
    assert 0 < values["linear.bias"].abs().max() <= bound
    with pytest.raises(ModelError, match=r"Keep needs Odd to have a method reset_parameters"):
        drawn(odd(), {".": Keep()})


@pytest.mark.case(33)
def test_nothing_is_drawn_where_keep_cannot() -> None:
    first = nn.Linear(3, 3)
    before = first.weight.clone()
    with pytest.raises(ModelError, match="Keep needs Odd"):
        initialize(nn.Sequential(first, odd().to_empty(device="cpu")), {"^0": Zeros(), ".": Keep()}, 0)
    assert torch.equal(first.weight, before)


def test_an_initializer_that_needs_the_whole_gets_it() -> None:
    counted = drawn(odd(), ODD_RULES)["counted"]
    factor = counted[0, 1]
    assert factor > 0
    assert torch.equal(counted, torch.arange(99.0).view(9, 11) * factor)
    assert torch.equal(drawn(odd(), ODD_RULES)["counted"], counted)


@pytest.mark.case(30)
def test_initializers_that_need_the_whole_do_what_they_say() -> None:
    values = drawn(odd(), ODD_RULES)
    turning = values["turning"]
    torch.testing.assert_close(turning @ turning.T, torch.eye(7))
    assert 0.95 < values["fan"].abs().max() / (6 / 67) ** 0.5 <= 1
    assert values["table.weight"].any(dim=1).tolist() == [row != 7 for row in range(9)]
    assert values["table.weight"].std().item() == pytest.approx(6**-0.5, rel=0.4)


def test_drawing_leaves_the_process_generator_alone() -> None:
    before = torch.random.get_rng_state()
    drawn(odd(), ODD_RULES)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_default_dtype_changes_neither_draws_nor_rotary_frequencies(tiny: Package) -> None:
    rounded = tiny.construct("cpu", dtype=torch.bfloat16)
    odd_one = drawn(odd(), ODD_RULES)
    torch.set_default_dtype(torch.bfloat16)
    try:
        models = [tiny.construct("cpu"), tiny.construct("cpu", seed=None), stock().to_empty(device="cpu")]
        make_whole(models[-1])
        low = drawn(odd(), ODD_RULES)
    finally:
        torch.set_default_dtype(torch.float32)
    for model in models:
        assert model.model.rotary_emb.inv_freq.dtype == torch.float32
        assert torch.equal(model.model.rotary_emb.inv_freq, 1.0 / 10000.0 ** (torch.arange(0, 16, 2) / 16))
    assert all(map(torch.equal, models[0].parameters(), rounded.parameters()))
    for name, tensor in odd_one.items():
        assert torch.equal(low[name], tensor.bfloat16()), name


def test_a_model_of_another_family() -> None:
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64, n_positions=32))
    values = drawn(
        model, {r"ln_.*weight": Ones(), "bias$": Zeros(), r"c_proj": Normal(std=0.01), ".": Normal(std=0.02)}
    )
    assert all(tensor.isfinite().all() for tensor in values.values())
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model(torch.arange(8).view(1, 8)).logits.isfinite().all()
