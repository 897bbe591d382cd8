"""`torch.compile` of each block of a model: one compilation serves all blocks of a class.

Whole models are not compiled: compiling them takes minutes, and FSDP, tensor parallelism and the loss in the head have
their say between the blocks.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from forgather.distributed.blocks import blocks_for, remember


def apply_compile(model: nn.Module, options: bool | Mapping[str, Any]) -> int:
    """Compile each block of `model`; returns how many. After `apply_recompute`, which is compiled too, before FSDP.

    `options` are those of `torch.compile`; true is none of them, false compiles nothing. Blocks are what the model
    names in `_no_split_modules`. Where no gradient is asked for (evaluation, samples) the blocks run as they are.
    """
    if options is False:
        return 0
    blocks = blocks_for("compile", model)
    # Rows and their length are the same in every step, so a second shape is a defect and no reason for symbolic shapes.
    settings = {"dynamic": False, **(options if isinstance(options, Mapping) else {})}
    for block in blocks:
        block.forward = Compiled(block.forward, settings)
    remember(model, "compiled")
    return len(blocks)


class Compiled:
    """A forward that is compiled where gradients are made, and runs as it is elsewhere.

    Samples have another length at every token, and two tokens are run to look at the model's logits: to compile for
    these would take longer than it saves.
    """

    def __init__(self, forward: Callable[..., Any], settings: Mapping[str, Any]) -> None:
        self.forward = forward
        self.compiled = torch.compile(forward, **settings)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return (self.compiled if torch.is_grad_enabled() else self.forward)(*args, **kwargs)
