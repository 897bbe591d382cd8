"""Recomputed activations are the activations: loss and gradients are the same bits, and less is kept till then."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from forgather.distributed.blocks import describe_blocks
from forgather.distributed.compilation import apply_compile
from forgather.distributed.mixed_precision import ComputeCopies
from forgather.distributed.offload import apply_offload
from forgather.distributed.recompute import apply_recompute, read_recompute
from forgather.errors import ConfigError, ModelError
from forgather.trainers.loss import CausalLoss
from tests.trainers.tiny import join, rows_of_step, tiny_llama

# torch.compile looks at .grad of what it traces, and imports what is deprecated.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated"),
]

KINDS: list[str | int] = ["full", "selective", 2, "1"]


def train(
    recompute: str | int, *, dropout: float = 0.3, dtype: torch.dtype | None = None, compile: Any = False
) -> tuple[Tensor, list[Tensor], int]:
    """Loss, gradients, and the bytes that were kept for the backward, parameters not counted."""
    model = tiny_llama(dropout=dropout).train()
    apply_recompute(model, recompute)
    apply_compile(model, compile)
    if dtype is not None:
        ComputeCopies(model, dtype)
    loss = CausalLoss(model, chunk_rows=8)
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor if tensor._base is None else tensor._base, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    torch.manual_seed(3)
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        value = loss(join(rows_of_step(0)))
    num_bytes = sum(tensor.nbytes for tensor in kept.values())
    value.backward()
    return value.detach(), [parameter.grad for parameter in model.parameters()], num_bytes


def assert_equal_bits(ours, expected) -> None:
    assert torch.equal(ours[0], expected[0])
    assert all(torch.equal(a, b) for a, b in zip(ours[1], expected[1], strict=True))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("recompute", KINDS)
def test_gradients_are_the_same_bits(recompute, dtype):
    assert_equal_bits(train(recompute, dtype=dtype), train("none", dtype=dtype))


@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
def test_compiled_blocks_compute_the_same(recompute):
    # aot_eager runs the very operations, so the bits are the same; what a code generator makes of them is its affair.
    compiled = train(recompute, dropout=0.0, compile={"backend": "aot_eager", "fullgraph": True})
    assert_equal_bits(compiled, train("none", dropout=0.0))


def test_all_blocks_of_a_class_are_compiled_once():
    compilations = 0

    def backend(graph: torch.fx.GraphModule, _inputs: Any) -> Callable[..., Any]:
        nonlocal compilations
        compilations += 1
        return graph.forward

    model = tiny_llama().train()
    assert apply_compile(model, {"backend": backend}) == 2
    loss = CausalLoss(model, chunk_rows=8)  # runs a forward of two tokens, which is not compiled
    for step in range(2):
        loss(join(rows_of_step(step))).backward()
    with torch.no_grad():
        loss(rows_of_step(0)[0])
    assert compilations == 1


@pytest.mark.soak  # it compiles C++ for half a minute
def test_the_compiler_that_is_the_default_computes_the_same():
    ours, expected = train("none", dropout=0.0, compile=True), train("none", dropout=0.0)
    torch.testing.assert_close(ours[0], expected[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(ours[1], expected[1], rtol=1e-4, atol=1e-5)


def test_the_names_and_the_type_of_a_model_stay():
    model = tiny_llama()
    names, kinds = list(model.state_dict()), [type(module) for module in model.modules()]
    apply_recompute(model, "full")
    apply_compile(model, {"backend": "eager"})
    assert (list(model.state_dict()), [type(module) for module in model.modules()]) == (names, kinds)


@pytest.mark.parametrize("recompute", ["some", "0", 0, -1, True, "1.5"])
def test_other_words_are_refused(recompute):
    with pytest.raises(ConfigError, match="recompute is"):
        read_recompute(recompute)


def test_a_model_that_names_no_blocks_is_refused():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    apply_recompute(model, "none")
    for option, apply in (
        ("recompute", lambda: apply_recompute(model, "full")),
        ("compile", lambda: apply_compile(model, True)),
        ("offload_activations", lambda: apply_offload(model, torch.device("cuda"))),
    ):
        with pytest.raises(ModelError, match=f"{option} acts on the blocks of a model, and Sequential does not name"):
            apply()


def test_less_is_kept_for_the_backward():
    kept = {recompute: train(recompute)[2] for recompute in ("none", 2, "full")}
    assert kept["full"] < kept[2] < kept["none"]


def test_the_selective_kind_multiplies_no_matrix_twice():
    flops = {}
    for recompute in ("none", "selective", "full"):
        with FlopCounterMode(display=False) as counter:
            train(recompute)
        flops[recompute] = counter.get_total_flops()
    assert flops["selective"] == flops["none"] < flops["full"]


def test_the_lines_before_a_run_say_what_blocks_do():
    model = tiny_llama()
    apply_recompute(model, "none")
    assert describe_blocks(model) == []
    apply_recompute(model, 2)
    apply_compile(model, {"backend": "eager"})
    assert describe_blocks(model) == ["blocks: recomputed 1 of 2, compiled"]
