"""Where a causal language model can be cut, and what each of its parts costs, found by one forward on meta.

The model declares its blocks (`base_model_pp_plan`, or else `_no_split_modules`); what comes before the first of them
and after the last is seen in that forward. Nothing is computed: tensors on meta have shapes only.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from forgather.errors import ModelError


@dataclass
class Anatomy:
    """The parts of a model. Names are those of its modules.

    blocks: the list of blocks; `before` and `after`: modules with parameters of their own that are called before the
    first block and after the last. Costs are FLOPs of one forward. `block_output` is how a block returns its hidden
    states: 0 for the tensor itself, else the length of a tuple whose first it is. `hidden` is a meta tensor of them.
    """

    blocks: str
    num_blocks: int
    before: list[str] = field(default_factory=list)
    after: list[str] = field(default_factory=list)
    block_costs: list[int] = field(default_factory=list)
    entry_cost: int = 0
    exit_cost: int = 0
    block_output: int = 0
    hidden: torch.Tensor = field(default_factory=lambda: torch.empty(0, device="meta"))


def examine(model: Any, length: int, dtype: torch.dtype | None = None) -> Anatomy:
    """The anatomy of `model`, a Transformers causal LM on meta, by a forward of one row of `length` tokens.

    `dtype` is what the parameters are cast to for the forward, if they are. Raises ModelError for a model that cannot
    be cut into stages, saying what is in the way.
    """
    name, blocks = find_block_list(model)
    anatomy = Anatomy(name, len(blocks))
    _Observer(model, anatomy, blocks, dtype).run(length)
    return anatomy


def find_block_list(model: Any) -> tuple[str, nn.ModuleList]:
    """The list of the blocks that a pipeline may be cut between, with its name."""
    declared = _declared(model)
    classes = set(getattr(model, "_no_split_modules", None) or ())
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module)
        and (name in declared or (not declared and all(type(block).__name__ in classes for block in module)))
    ]
    if len(found) != 1:
        raise ModelError(
            f"{type(model).__name__} has no plan for a pipeline: "
            + (
                f"{len(found)} lists of blocks, {', '.join(name for name, _ in found)}"
                if found
                else "no list of blocks"
            ),
            fix="give its config a base_model_pp_plan that names the list of its blocks, or use mesh.pipeline: 1",
        )
    return found[0]


def _declared(model: Any) -> set[str]:
    """The modules that the plan of the base model names, by their names in the whole model."""
    plan = getattr(model.config, "base_model_pp_plan", None) or {}
    prefix = getattr(model, "base_model_prefix", "")
    return {f"{prefix}.{name}" if prefix else name for name in plan}


class _Observer:
    """Watches one forward: which modules are called in which order, and the FLOPs so far."""

    def __init__(self, model: Any, anatomy: Anatomy, blocks: nn.ModuleList, dtype: torch.dtype | None) -> None:
        self.model = model
        self.cast = {} if dtype is None else {name: p.to(dtype) for name, p in model.named_parameters()}
        self.anatomy = anatomy
        self.blocks = list(blocks)
        self.kind = type(model).__name__
        self.flops = FlopCounterMode(display=False)
        self.owners = dict(_owners(model, self.blocks))
        self.entered = 0  # blocks
        self.left = 0
        self.mark = 0

    def run(self, length: int) -> None:
        handles = [block.register_forward_pre_hook(self._enter, with_kwargs=True) for block in self.blocks]
        handles += [block.register_forward_hook(self._leave) for block in self.blocks]
        handles += [module.register_forward_pre_hook(self._call) for module in self.owners.values()]
        try:
            with torch.enable_grad(), self.flops:
                self._forward(length)
        finally:
            for handle in handles:
                handle.remove()
        self.anatomy.exit_cost = self._spent()
        self._check()

    def _forward(self, length: int) -> None:
        tokens = torch.zeros((1, length), dtype=torch.int64, device="meta")
        # A mask of all pairs is taken as it is; to make one of tokens, transformers would have to see values. A model
        # that makes its own mask cannot take one.
        mask = torch.ones((1, 1, length, length), dtype=torch.bool, device="meta")
        try:
            self._call_model(tokens, mask)
        except (RuntimeError, ValueError, TypeError, IndexError):
            self._restart()
            try:
                self._call_model(tokens, None)
            except (RuntimeError, ValueError, TypeError, IndexError) as error:
                raise ModelError(
                    f"{self.kind} cannot be cut into stages: its forward does not run on meta ({error})",
                    fix="use mesh.pipeline: 1 for this model",
                ) from error

    def _call_model(self, tokens: torch.Tensor, mask: torch.Tensor | None) -> None:
        inputs = {"input_ids": tokens, "attention_mask": mask, "use_cache": False}
        torch.func.functional_call(self.model, self.cast, kwargs=inputs)

    def _restart(self) -> None:
        self.entered = self.left = 0
        self.mark = int(self.flops.get_total_flops())
        self.anatomy.before, self.anatomy.after, self.anatomy.block_costs = [], [], []

    def _spent(self) -> int:
        total = int(self.flops.get_total_flops())
        spent, self.mark = total - self.mark, total
        return spent

    def _enter(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.entered >= len(self.blocks) or block is not self.blocks[self.entered]:
            raise ModelError(
                f"{self.kind} cannot be cut into stages: its blocks are not called once each, in order",
                fix="use mesh.pipeline: 1 for this model",
            )
        if self.entered == 0:
            self.anatomy.entry_cost = self._spent()
        self.entered += 1
        hidden, *others = _tensors((*args, *kwargs.values()))
        self.anatomy.hidden = hidden.detach()
        if any(other.requires_grad and other is not hidden for other in others):
            raise ModelError(
                f"{self.kind} cannot be cut into stages: its blocks hand on more than hidden states",
                fix="use mesh.pipeline: 1 for this model",
            )

    def _leave(self, _block: nn.Module, _args: Any, output: Any) -> None:
        self.anatomy.block_costs.append(self._spent())
        self.anatomy.block_output = 0 if isinstance(output, torch.Tensor) else len(output)
        self.left += 1

    def _call(self, module: nn.Module, _args: Any) -> None:
        name = next(name for name, owner in self.owners.items() if owner is module)
        place = self.anatomy.before if self.entered == 0 else self.anatomy.after
        if self.left < self.entered or (0 < self.left < len(self.blocks)):
            raise ModelError(
                f"{self.kind} cannot be cut into stages: {name} stands between its blocks",
                fix="use mesh.pipeline: 1 for this model",
            )
        if name not in place:
            place.append(name)

    def _check(self) -> None:
        placed = {*self.anatomy.before, *self.anatomy.after}
        twice = set(self.anatomy.before) & set(self.anatomy.after)
        lost = [name for name in self.owners if name not in placed]
        if lost or twice or self.left != len(self.blocks):
            what = ", ".join(sorted(lost or twice)) or "its blocks"
            raise ModelError(
                f"{self.kind} cannot be cut into stages: no stage can have {what} alone",
                fix="use mesh.pipeline: 1 for this model",
            )


def _owners(model: nn.Module, blocks: Sequence[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """The modules outside the blocks that have parameters of their own."""
    inside = {id(module) for block in blocks for module in block.modules()}
    for name, module in model.named_modules():
        if id(module) not in inside and next(module.parameters(recurse=False), None) is not None:
            yield name, module


def _tensors(values: Sequence[Any]) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, tuple | list):
            found += _tensors(value)
    return found
