"""Draws the first weights of a model, the same on any mesh.

The values of a parameter depend on the seed, its name and its shape alone. It is drawn in blocks of 65,536 elements,
each from a generator of its own, on the CPU and in float32; so a rank draws only the blocks that its shard touches, and
1, 2 or 8 ranks, CPU or GPU, hold slices of the same whole. (torch seeds its CPU generator with 32 bits: among the
million blocks of a 70B model about a hundred pairs are equal.)
"""

import copy
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from math import prod

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from forgather.errors import ModelError
from forgather.models.names import plain_name
from forgather.models.parts.initializers import Initializer
from forgather.models.parts.rules import assign
from forgather.tensor_boxes import local_box

BLOCK = 65_536
BLOCKS_AT_ONCE = 64  # what is drawn before it is copied to its place: 16 MiB
InitRules = Mapping[str, Initializer]  # patterns over parameter names, in order
Fill = Callable[[torch.Tensor, torch.Generator], None]


@torch.no_grad()
def initialize(model: nn.Module, rules: InitRules, seed: int, *, whole: nn.Module | None = None) -> None:
    """Give every parameter its first value by `rules`, and make buffers and ties whole again.

    `model` may come straight from `to_empty`, sharded or not; a tied parameter is drawn once, by the name it has first
    in the model. It may be a part of `whole`, a model on meta, which the rules are for. Any transformers model will do.
    Raises ModelError for a parameter without a rule, a rule for no parameter, a parameter still on the meta device, and
    a buffer that nothing computes.
    """
    make_whole(model)
    owners = dict(_parameters(model))
    for name, initializer in choose(model if whole is None else whole, rules).items():
        if name not in owners:
            continue  # another part's
        module, attribute = owners[name]
        if initializer.fill is None:
            _draw_by_module(module, attribute, f"{seed}\0{name}")
        elif initializer.needs_whole:
            _draw_whole(getattr(module, attribute), initializer.fill, f"{seed}\0{name}")
        else:
            _draw(getattr(module, attribute), initializer.fill, f"{seed}\0{name}")


def choose(model: nn.Module, rules: InitRules) -> dict[str, Initializer]:
    """The initializer of each parameter, by name; a model on the meta device will do.

    Raises ModelError for rules that `initialize` cannot draw by.
    """
    owners = dict(_parameters(model))
    try:
        assignment = assign(rules, owners)
    except re.error as error:
        raise ModelError(
            f"init_rules: {error.pattern!r} is no regular expression: {error}", fix="write a dot in a name as \\."
        ) from error
    if assignment.without_rule:
        raise ModelError(
            f"no initialisation rule for {', '.join(assignment.without_rule)}",
            fix="put a rule for it in front with `init_rules: !prepend`, as "
            f"{_last(assignment.without_rule[0])}$: !singleton:forgather.models.parts.initializers:Ones {{}}; "
            "others are in docs/reference/model-initialisation.md",
        )
    if assignment.without_parameter:
        raise ModelError(
            f"initialisation rules that match no parameter: {', '.join(assignment.without_parameter)}",
            fix="correct the pattern, or give its initializer may_match_nothing: true",
        )
    for name, initializer in assignment.chosen.items():
        if initializer.fill is None and not hasattr(owners[name][0], "reset_parameters"):
            raise ModelError(
                f"the initializer Keep needs {type(owners[name][0]).__name__} to have a method reset_parameters()",
                fix="choose another initializer for its parameters",
            )
    return assignment.chosen


@torch.no_grad()
def make_whole(model: nn.Module) -> None:
    """Tie what is tied and compute what no checkpoint holds: what `to_empty` undoes."""
    tie_weights = getattr(model, "tie_weights", None)
    if tie_weights is not None:
        tie_weights()
    on_meta = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if on_meta:
        raise ModelError(f"still on the meta device: {', '.join(on_meta)}", fix="call model.to_empty(device=...) first")
    for name, module, base in _modules(model, model):
        # Masks are booleans and positions integers: any value could be meant, so what is looked at is who wrote there.
        before = {key: (buffer, buffer._version) for key, buffer in module.named_buffers(recurse=False)}
        if not before:
            continue
        reset_buffers, init_weights = (getattr(module, "reset_buffers", None), getattr(base, "_init_weights", None))
        if reset_buffers is not None:
            reset_buffers()
        elif init_weights is not None:
            init_weights(module)
        after = dict(module.named_buffers(recurse=False))
        left = [key for key, (buffer, version) in before.items() if after[key] is buffer and buffer._version == version]
        if left:
            raise ModelError(
                f"nothing computes the buffers {', '.join(f'{name}.{key}' for key in left)}",
                fix=f"give {type(module).__name__} a method reset_buffers()",
            )


def _modules(module: nn.Module, base: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """Each module with its name and the innermost transformers model around it, which knows how to initialise it."""
    base = module if hasattr(module, "_init_weights") else base
    yield prefix.removesuffix("."), module, base
    for name, child in module.named_children():
        yield from _modules(child, base, f"{prefix}{name}.")


def _parameters(model: nn.Module) -> Iterator[tuple[str, tuple[nn.Module, str]]]:
    """Each parameter once: its name, and the module and attribute that hold it."""
    for name, _ in model.named_parameters():
        module, _, attribute = name.rpartition(".")
        owner = model.get_submodule(module)
        yield plain_name(name), (owner, attribute)


def _last(name: str) -> str:
    """`model.layers.0.mlp.gate.weight` -> `gate\\.weight`, which is what a pattern names."""
    return r"\.".join(name.split(".")[-2:])


def _draw(parameter: torch.Tensor, fill: Fill, key: str) -> None:
    """Fill this rank's part of a parameter with its slice of the draw of the whole."""
    local, offsets = _local(parameter)
    if local.numel() == 0:
        return
    shape = parameter.shape if parameter.dim() else torch.Size([1])
    local = local.view(1) if local.dim() == 0 else local
    row = prod(shape[1:])
    rows_at_once = max(1, BLOCKS_AT_ONCE * BLOCK // row)
    whole_rows = local.shape[1:] == shape[1:]
    columns = tuple(slice(start, start + size) for start, size in zip(offsets[1:], local.shape[1:], strict=True))
    straight = whole_rows and local.is_contiguous() and local.device.type == "cpu" and local.dtype == torch.float32
    edges = [*range(0, local.shape[0], rows_at_once), local.shape[0]]
    for first, end in pairwise(edges):
        drawn = local[first:end].view(-1) if straight else torch.empty((end - first) * row, dtype=torch.float32)
        start = ((offsets[0] if offsets else 0) + first) * row
        _draw_range(drawn, start, shape.numel(), fill, key)
        if not straight:
            local[first:end].copy_(drawn.view(end - first, *shape[1:])[(slice(None), *columns)])


def _local(parameter: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...]]:
    """What this rank holds of a parameter, and where that begins in the whole."""
    offsets, _ = local_box(parameter)
    return (parameter.to_local() if isinstance(parameter, DTensor) else parameter.data), offsets


def _draw_range(out: torch.Tensor, start: int, numel: int, fill: Fill, key: str) -> None:
    """Fill `out` (flat, float32) with elements `start`... of a draw of `numel` elements."""
    end = start + out.numel()
    generator = torch.Generator()
    for low in range(start - start % BLOCK, end, BLOCK):
        high = min(low + BLOCK, numel)
        generator.manual_seed(_seed(f"{key}\0{low // BLOCK}"))
        if start <= low and high <= end:
            fill(out[low - start : high - start], generator)
        else:
            block = torch.empty(high - low, dtype=torch.float32)
            fill(block, generator)
            first, last = max(low, start), min(high, end)
            out[first - start : last - start] = block[first - low : last - low]


def _draw_by_module(module: nn.Module, attribute: str, key: str) -> None:
    """Fill this rank's part with what the module's own `reset_parameters` gives to the whole."""
    whole = copy.copy(module)
    whole._parameters = {
        name: None if parameter is None else nn.Parameter(torch.empty(parameter.shape, dtype=torch.float32))
        for name, parameter in module._parameters.items()
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_seed(key))
        reset_parameters: Callable[[], None] = whole.reset_parameters  # type: ignore[assignment]
        reset_parameters()
    _keep_part(getattr(module, attribute), getattr(whole, attribute))


def _draw_whole(parameter: torch.Tensor, fill: Fill, key: str) -> None:
    """Fill this rank's part of a parameter by drawing the whole, for an initializer that looks at all of it."""
    whole = torch.empty(parameter.shape, dtype=torch.float32)
    fill(whole, torch.Generator().manual_seed(_seed(key)))
    _keep_part(parameter, whole)


def _keep_part(parameter: torch.Tensor, whole: torch.Tensor) -> None:
    local, offsets = _local(parameter)
    region = tuple(slice(start, start + size) for start, size in zip(offsets, local.shape, strict=True))
    local.copy_(whole[region])


def _seed(key: str) -> int:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "little")
