"""Each trainable parameter is in exactly one group: that of the first rule that matches its name."""

import re
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from forgather.errors import ConfigError
from forgather.optim.groups import build_optimizer, describe_groups, split

NAMES = (
    "model.embed_tokens.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.0.self_attn.q_proj.bias",
    "model.layers.0.self_attn.q_norm.weight",
    "model.layers.0.input_layernorm.weight",
    "transformer.h.0.ln_1.weight",
    "transformer.ln_f.weight",
    "model.norm.weight",
    "lm_head.weight",
)


class Named(nn.Module):
    """Parameters with the names of several families."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors = {name: nn.Parameter(torch.ones(2)) for name in NAMES}

    def named_parameters(self, *args, **kwargs):
        return iter(self.tensors.items())


def names_of(groups):
    return {group.name: list(group.parameters) for group in groups}


def test_the_shipped_rule_finds_norms_and_biases_of_all_families():
    text = Path("configs/lib/train/causal_lm.yaml").read_text()
    pattern = yaml.safe_load(re.search(r"match: (.*)", text)[1])
    groups = names_of(split(Named(), {"no_decay": {"match": pattern}}))
    assert groups["no_decay"] == list(NAMES[2:8])
    assert groups["rest"] == [NAMES[0], NAMES[1], NAMES[8]]


@pytest.mark.training_case(84)
def test_the_first_match_wins_and_none_drops_a_rule():
    rules = {"head": {"match": "lm_head"}, "dropped": None, "all": {"match": ""}}
    groups = names_of(split(Named(), rules))
    assert groups == {"head": ["lm_head.weight"], "all": list(NAMES[:-1])}


def test_frozen_parameters_are_in_no_group():
    model = Named()
    model.tensors["lm_head.weight"].requires_grad_(False)
    assert names_of(split(model, {})) == {"rest": list(NAMES[:-1])}


def test_a_rule_that_matches_nothing_is_an_error_unless_optional():
    with pytest.raises(ConfigError, match=r"group 'typo': 'layernrom' matches no parameter"):
        split(Named(), {"typo": {"match": "layernrom"}})
    assert names_of(split(Named(), {"typo": {"match": "layernrom", "optional": True}})) == {"rest": list(NAMES)}


@pytest.mark.parametrize("rule", [{"match": "("}, {"weight_decay": 0.0}])
def test_a_rule_without_a_regular_expression_is_an_error(rule):
    with pytest.raises(ConfigError, match="group 'bad'"):
        split(Named(), {"bad": rule})


@pytest.mark.training_case(84)
def test_options_of_a_group_reach_the_optimizer_and_are_described():
    optimizer = build_optimizer(
        Named(),
        partial(torch.optim.AdamW, lr=1.0, weight_decay=0.1),
        {"norms": {"match": "norm|ln_", "weight_decay": 0.0}},
    )
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.1]
    assert describe_groups(optimizer) == (
        "norms 5 tensors, 10 parameters, weight_decay 0.0; rest 4 tensors, 8 parameters, weight_decay 0.1"
    )
