"""Parameter groups by name: which parameters decay, which have a learning rate of their own."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from forgather.distributed.pipeline import whole_of
from forgather.errors import ConfigError
from forgather.models.names import plain_name

REST = "rest"  # parameters that no rule claims: they get the optimizer's own values


@dataclass(frozen=True)
class Group:
    """The parameters that one rule claimed, and the options that they get instead of the optimizer's."""

    name: str
    parameters: Mapping[str, nn.Parameter]
    options: Mapping[str, Any]


def split(model: nn.Module, rules: Mapping[str, Mapping[str, Any] | None]) -> list[Group]:
    """The trainable parameters of `model` by the first rule whose `match` is found in their name; the others last.

    A rule is `{match: REGEX, OPTION: VALUE, ...}`; None drops one. A rule that claims nothing is an error, since it is
    most likely misspelt, unless it says `optional: true`. It may claim what is on other stages of a pipeline only.
    """
    whole = {plain_name(name) for name, p in whole_of(model).named_parameters() if p.requires_grad}
    remaining = {plain_name(name): parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    on_other_stages = whole.difference(remaining)
    groups = []
    for rule_name, rule in rules.items():
        if rule is None:
            continue
        options = dict(rule)
        pattern = _compile(rule_name, options.pop("match", None))
        optional = options.pop("optional", False)
        claimed = {name: parameter for name, parameter in remaining.items() if pattern.search(name)}
        if not claimed and not optional and not any(map(pattern.search, on_other_stages)):
            raise ConfigError(
                f"parameter group {rule_name!r}: {pattern.pattern!r} matches no parameter that is left to claim",
                fix=f"parameters are named like {', '.join(list(remaining)[:3])}; optional: true allows no match",
            )
        if claimed:
            groups.append(Group(rule_name, claimed, options))
        remaining = {name: parameter for name, parameter in remaining.items() if name not in claimed}
    if remaining:
        groups.append(Group(REST, remaining, {}))
    return groups


def build_optimizer(
    model: nn.Module,
    optimizer: Callable[[list[dict[str, Any]]], Optimizer],
    groups: Mapping[str, Mapping[str, Any] | None],
) -> Optimizer:
    """`optimizer` over the named parameters of `model`, split by the rules in `groups` (see `split`)."""
    return optimizer(
        [
            {"name": group.name, "params": list(group.parameters.items()), **group.options}
            for group in split(model, groups)
        ]
    )


def describe_groups(optimizer: Optimizer) -> str:
    """One line: the groups with their sizes and what is special about each."""
    return "; ".join(_describe(group, optimizer.defaults) for group in optimizer.param_groups)


def _describe(group: Mapping[str, Any], defaults: Mapping[str, Any]) -> str:
    count = sum(parameter.numel() for parameter in group["params"])
    # The learning rate moves with the schedule, so it is no group's own by being different.
    options = {key: group[key] for key in ("weight_decay", "betas", "eps") if key in group}
    own = [f"{key} {value}" for key, value in options.items() if value != defaults[key] or key == "weight_decay"]
    return f"{group.get('name', 'all')} {len(group['params'])} tensors, {count:,} parameters, {', '.join(own)}"


def _compile(rule_name: str, pattern: object) -> re.Pattern[str]:
    if not isinstance(pattern, str):
        raise ConfigError(f"parameter group {rule_name!r} has no pattern", fix="give it match: 'REGEX'")
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ConfigError(
            f"parameter group {rule_name!r}: {pattern!r} is no regular expression: {error}", fix="mend the pattern"
        ) from error
