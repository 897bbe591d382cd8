"""Recomputing activations in the backward instead of keeping them: less memory for about a third more computing.

Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", arXiv:1604.06174; the selective kind is Korthikanti
et al. 2022, arXiv:2205.05198. A block keeps its class and its parameters their names: only its `forward` is replaced,
so hooks on the block, FSDP's among them, run once and not again when it is recomputed.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from forgather.distributed.blocks import blocks_for, remember
from forgather.distributed.tensor_layers import part_of
from forgather.errors import ConfigError

FULL, SELECTIVE, NONE = "full", "selective", "none"

# What the selective kind keeps: the results of matrix products and attention, which take nearly all of a block's time.
# All else is norms, activations, rotations: many bytes, little to compute.
_KEPT = frozenset(
    getattr(torch.ops.aten, name).default
    for name in (
        "mm",
        "addmm",
        "bmm",
        "baddbmm",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_fused_attention_overrideable",
    )
)


def apply_recompute(model: nn.Module, recompute: str | int) -> int:
    """Let blocks of `model` recompute their activations; returns how many do. Before `torch.compile` and FSDP.

    `none`; `full`, each block; `selective`, each block but for its matrix products and attention; or a number n, the
    first of every n blocks. Blocks are what the model names in `_no_split_modules`. Gradients are the same bits.
    """
    every = read_recompute(recompute)
    if every == 0:
        return 0
    blocks = blocks_for("recompute", model)
    chosen = blocks[::every]
    for block in chosen:
        block.forward = Recomputed(block, selective=recompute == SELECTIVE)
    remember(model, f"{'selectively ' if recompute == SELECTIVE else ''}recomputed {len(chosen)} of {len(blocks)}")
    return len(chosen)


def read_recompute(recompute: str | int) -> int:
    """Of every how many blocks one is recomputed; 0 for none. ConfigError for a word that says nothing."""
    if isinstance(recompute, str) and recompute in (NONE, FULL, SELECTIVE):
        return 0 if recompute == NONE else 1
    if not isinstance(recompute, bool) and str(recompute).isdecimal() and int(recompute) > 0:
        return int(recompute)
    raise ConfigError(f"recompute is {recompute!r}", fix="use none, full, selective, or a number: every so many blocks")


class Recomputed:
    """The forward of `block`, which keeps its inputs, and makes the rest again when the backward asks for it."""

    def __init__(self, block: nn.Module, selective: bool) -> None:
        self.forward: Callable[..., Any] = block.forward
        self.selective = selective
        parts = [part for part in map(part_of, block.modules()) if part is not None]
        if selective:
            # torch would not notice: a linear layer's result is no view of the product of matrices whose memory it is.
            for part in parts:
                part.keeps_product = True
        # Layers that remember their input for one another cannot be recomputed as a part of a compiled backward.
        self.is_traceable = all(part.shared is None or part.sequence for part in parts)
        # Where each parameter of the block stands; which parameter does, changes: see `_as_in_forward`.
        self.places = [(module._parameters, name) for module in block.modules() for name in module._parameters]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.forward(*args, **kwargs)
        if torch.compiler.is_compiling() and self.is_traceable:  # it becomes part of the compiled backward
            options: dict[str, Any] = {"context_fn": _selective_contexts} if self.selective else {}
        else:
            options = {"context_fn": self._eager_contexts}
        return checkpoint(self.forward, *args, use_reentrant=False, **options, **kwargs)

    def _eager_contexts(self) -> tuple[Any, Any]:
        forward, again = _selective_contexts() if self.selective else (nullcontext(), nullcontext())
        return forward, _AsInForward(self, self.now(), again)

    def now(self) -> list[nn.Parameter | None]:
        """The parameters that the block has at this moment."""
        return [parameters[name] for parameters, name in self.places]

    def put(self, values: list[nn.Parameter | None]) -> None:
        for (parameters, name), value in zip(self.places, values, strict=True):
            if parameters[name] is not value:
                parameters[name] = value


class _AsInForward:
    """Within, a block has the parameters that its forward saw: copies in bf16, say, lent for the forward only.

    Entered for each backward over the block: twice, where gradients of inputs and of weights are made apart.
    """

    def __init__(self, block: Recomputed, seen: list[nn.Parameter | None], inner: Any) -> None:
        self.block = block
        self.seen = seen
        self.inner = inner

    def __enter__(self) -> None:
        self.before = self.block.now()
        self.block.put(self.seen)
        self.inner.__enter__()

    def __exit__(self, *error: Any) -> None:
        try:
            self.inner.__exit__(*error)
        finally:
            self.block.put(self.before)


def _choose(_context: Any, operation: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE


_selective_contexts = partial(create_selective_checkpoint_contexts, _choose)
