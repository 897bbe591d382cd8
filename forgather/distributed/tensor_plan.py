"""What a model says of how to split its layers, made sure of before anything is split.

The plan is transformers': patterns over the names of modules, each with a style (`base_model_tp_plan` of the config
for the trunk, `_tp_plan` of the class for the head), which a model shows as `tp_plan`.
"""

from collections.abc import Mapping
from math import gcd
from typing import Any

from torch import nn

from forgather.distributed.tensor_random import drops_out
from forgather.errors import DistributedError

# transformers' names for what we know to do; styles of experts (packed_colwise, moe_tp_experts) are not among them.
BY_OUTPUT = ("colwise", "colwise_gather_output", "colwise_rep")
BY_INPUT = ("rowwise", "rowwise_split_input", "rowwise_rep")
BY_TOKEN = ("embedding_rowwise",)
WHOLE_FOR_HEADS = ("replicated_with_grad_allreduce",)
WHOLE = ("replicate", "sequence_parallel")
KNOWN = (*BY_OUTPUT, *BY_INPUT, *BY_TOKEN, *WHOLE_FOR_HEADS, *WHOLE)


def read_plan(model: nn.Module, ranks: int) -> dict[str, str]:
    """The style of each module that the plan of `model` names; modules are those that are there.

    Raises DistributedError for a model without a plan, a style that is unknown here, and sizes that `ranks` do not
    divide.
    """
    plan: Mapping[str, str] = getattr(model, "tp_plan", None) or {}
    if not any(style in BY_OUTPUT for pattern, style in plan.items() if "*" in pattern):
        raise DistributedError(
            f"mesh.tensor is {ranks}, but {type(model).__name__} says nothing of how its layers are split",
            fix="use mesh.tensor 1 and more of mesh.shard, or give the model's config a base_model_tp_plan",
        )
    styles = {name: plan[_pattern(name)] for name, _ in model.named_modules() if _pattern(name) in plan}
    parameters = [name for name, _ in model.named_parameters() if _pattern(name) in plan]
    unknown = sorted({style for style in styles.values() if style not in KNOWN})
    if unknown or parameters:
        what = f"style {', '.join(unknown)}" if unknown else f"parameter {parameters[0]}"
        raise DistributedError(
            f"mesh.tensor is {ranks}, but the plan of {type(model).__name__} has a {what}, which is not supported",
            fix="use mesh.tensor 1 and more of mesh.shard",
        )
    _require_sizes(model, styles, ranks)
    return styles


def reason_against_split_sequence(model: nn.Module, blocks: list[nn.Module], styles: Mapping[str, str]) -> str | None:
    """Why tokens cannot be split between the layers of a block, or None: what stands there must take each by itself."""
    if not blocks:
        return "it has no blocks"
    names = {module: name for name, module in model.named_modules()}
    for block in blocks:
        if any(True for _ in block.parameters(recurse=False)):
            return f"{type(block).__name__} has parameters of its own"
        for child in block.children():
            owners = [module for module in child.modules() if any(True for _ in module.parameters(recurse=False))]
            split = {styles[names[module]] for module in child.modules() if names[module] in styles}
            if split.difference(("colwise", "rowwise", *WHOLE_FOR_HEADS, *WHOLE)) and drops_out(child):
                return f"{names[child]} drops out what its plan lets all ranks compute"
            if split and not split.intersection(BY_INPUT):
                return f"its plan does not say where {names[child]} ends"
            if split:
                owners = [module for module in owners if names[module] not in styles]
            else:
                owners = [module for module in owners if "norm" not in type(module).__name__.lower()]
            if owners:
                return f"its plan does not split {names[owners[0]]}"
    return None


def _pattern(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _require_sizes(model: nn.Module, styles: Mapping[str, str], ranks: int) -> None:
    """What is split between two layers has to be split into equal parts; heads must stay whole."""
    counts = {
        name: _count_parts(model, name, style)
        for name, style in styles.items()
        if style in ("colwise", "rowwise", "rowwise_split_input", "rowwise_rep")
    }
    for name, (count, what) in counts.items():
        if count % ranks:
            allowed = gcd(*(count for count, _ in counts.values()))
            numbers = [str(number) for number in range(1, allowed + 1) if allowed % number == 0]
            parts = f"{count} {what if count > 1 else what[:-1]}"
            raise DistributedError(
                f"mesh.tensor is {ranks}, but {name} of {type(model).__name__} has {parts}",
                fix=f"use mesh.tensor {' or '.join(numbers)}",
            )
    for name, style in styles.items():
        module: Any = model.get_submodule(name)
        size = module.weight.shape[0] if style not in BY_INPUT and hasattr(module, "weight") else ranks
        if style in (*BY_OUTPUT, *BY_TOKEN) and -(-size // ranks) * (ranks - 1) >= size:
            raise DistributedError(
                f"mesh.tensor is {ranks}, and leaves a rank nothing of the {size} rows of {name}",
                fix="use a lower mesh.tensor",
            )


def _count_parts(model: nn.Module, name: str, style: str) -> tuple[int, str]:
    """Into how many indivisible parts a linear layer may be split, and what they are."""
    module: Any = model.get_submodule(name)
    if not (hasattr(module, "out_features") and hasattr(module, "in_features")):
        raise DistributedError(
            f"the plan of {type(model).__name__} has {name} as {style}, but a {type(module).__name__} is not linear",
            fix="use mesh.tensor 1 and more of mesh.shard",
        )
    features = int(module.out_features if style in BY_OUTPUT else module.in_features)
    head_dim = getattr(model.get_submodule(name.rpartition(".")[0]), "head_dim", None)
    if isinstance(head_dim, int) and head_dim > 0 and features % head_dim == 0:
        return features // head_dim, "heads"
    return features, "channels"
