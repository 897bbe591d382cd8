"""What is reported of a model is true of it: blocks add up, memory is what optimizers take, rules are those applied."""

import json
import re

import pytest
import torch
from torch import nn

from forgather.models.construct import load_classes
from forgather.models.explain_init import Explained, describe_init, explain_init
from forgather.models.package import Package
from forgather.models.parts.initializers import Keep, Normal, Ones, ZeroRow
from forgather.models.report import count_blocks, count_parameters, facts, report
from forgather.models.training_memory import training_memory
from tests.models.example import tokenizer

OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "SGD with momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "Adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=0.1),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.1),
}


def test_blocks_add_up_to_the_total(tiny: Package, tied: Package) -> None:
    for package in (tiny, tied):
        model = package.construct()
        blocks = count_blocks(model)
        assert sum(block.parameters for block in blocks) == count_parameters(model).total
        assert [block.name for block in blocks] == [
            "model.embed_tokens",
            *(f"model.layers.{number}" for number in range(3)),
            "model.norm",
            "lm_head",
        ]
        assert len({block.parameters for block in blocks if block.kind == "PreNormLayer"}) == 1
    assert blocks[-1].parameters == 0  # the head of the tied model is its embedding
    assert re.search(r"lm_head +0  Linear  \(shared, counted above\)", report(tied.construct(), tokenizer()))


def test_parameters_beside_the_blocks_are_counted_too() -> None:
    model = nn.Module()
    model.scale = nn.Parameter(torch.ones(5))
    model.layers = nn.ModuleList([nn.Linear(2, 3), nn.ReLU(), nn.Linear(2, 3)])
    assert [(block.name, block.kind, block.parameters) for block in count_blocks(model)] == [
        ("", "Module", 5),
        ("layers.0", "Linear", 9),
        ("layers.2", "Linear", 9),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_memory_for_training_is_what_an_optimizer_takes(tiny: Package, name: str, dtype: torch.dtype) -> None:
    model = tiny.construct("cpu", dtype=dtype)
    model.model.embed_tokens.weight.requires_grad_(False)
    optimizer = OPTIMIZERS[name](model.parameters())
    model(torch.arange(6).view(1, 6), labels=torch.arange(6).view(1, 6)).loss.backward()
    optimizer.step()
    state = [tensor for values in optimizer.state.values() for key, tensor in values.items() if key != "step"]
    [need] = [
        need
        for need in training_memory(model)
        if (need.optimizer, need.dtype) == (name, str(dtype).removeprefix("torch."))
    ]
    assert need.weights == sum(parameter.nbytes for parameter in model.parameters())
    assert need.gradients == sum(parameter.grad.nbytes for parameter in model.parameters() if parameter.requires_grad)
    assert need.optimizer_state == sum(tensor.nbytes for tensor in state if tensor is not None)
    assert need.total == need.weights + need.gradients + need.optimizer_state


def test_fused_memory_is_of_the_largest_gradient(tiny: Package) -> None:
    model = tiny.construct()
    largest = max(parameter.numel() for parameter in model.parameters())
    assert {need.gradients for need in training_memory(model, fused=True)} == {4 * largest, 2 * largest}
    assert "the largest" in report(model, tokenizer(), fused=True)


def test_the_rule_that_is_explained_is_the_one_that_was_applied(tiny: Package) -> None:
    model = tiny.construct("cpu")
    rules = load_classes(tiny.dir).model.init_rules(model.config)
    explained = {each.name: each for each in explain_init(model, rules)}
    assert list(explained) == [name for name, _ in model.named_parameters()]
    for name, parameter in model.named_parameters():
        assert explained[name].shape == tuple(parameter.shape)
        assert explained[name].pattern is not None
        assert re.search(explained[name].pattern, name)
        if explained[name].initializer == "Ones()":
            assert parameter.eq(1).all()
        if match := re.fullmatch(r"Normal\(std=(\S+), mean=0\)", explained[name].initializer or ""):
            assert parameter.std().item() == pytest.approx(float(match[1]), rel=0.1)


def test_the_first_of_two_rules_is_explained_and_none_is_said() -> None:
    model = nn.ModuleDict({"norm": nn.LayerNorm(4), "out": nn.Linear(4, 4, bias=False)})
    explained = explain_init(model, {"norm.weight": Ones(), "norm": Normal(std=0.123456789)})
    assert [(each.pattern, each.initializer) for each in explained] == [
        ("norm.weight", "Ones()"),
        ("norm", "Normal(std=0.123457, mean=0)"),
        (None, None),
    ]
    kept = explain_init(model, {"norm": Keep(), ".": ZeroRow(initializer=Normal(std=1.0), row=2)})
    assert [each.initializer for each in kept] == ["Keep()"] * 2 + ["ZeroRow(initializer=Normal(std=1, mean=0), row=2)"]
    assert describe_init(explained)[-1].split() == ["out.weight", "[4,", "4]", "none"]


def test_layers_alike_share_a_line_and_others_do_not() -> None:
    explained = [
        Explained(f"layers.{number}.mlp.weight", (8, 4), "mlp", "Ones()" if number == 3 else "Zeros()")
        for number in (0, 1, 2, 3, 5)
    ]
    assert [line.split()[0] for line in describe_init(explained)] == [
        "parameter",
        "layers.{0-2,5}.mlp.weight",
        "layers.3.mlp.weight",
    ]


def test_facts_are_plain_data(tied: Package) -> None:
    model = tied.construct()
    said = facts(
        model, tokenizer(), explained=explain_init(model, load_classes(tied.dir).model.init_rules(model.config))
    )
    assert json.loads(json.dumps(said))["parameters"]["total"] == count_parameters(model).total
    assert said["tokenizer"]["special_tokens"]["pad_token"] == "<|pad|>"
    assert not said["gradient_checkpointing"]
    assert "initialization" not in facts(model, tokenizer())
