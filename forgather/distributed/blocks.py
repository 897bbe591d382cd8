"""The repeated layers of a model, on which options act that change how they run and not what they compute."""

from torch import nn

from forgather.distributed.fsdp import find_blocks
from forgather.errors import ModelError


def blocks_for(option: str, model: nn.Module) -> list[nn.Module]:
    """The blocks of `model`, in order; ModelError, naming the option that wants them, where it does not say its blocks.

    A stage of a pipeline may have none.
    """
    if not getattr(model, "_no_split_modules", None):
        raise ModelError(
            f"{option} acts on the blocks of a model, and {type(model).__name__} does not name its own",
            fix=f"leave {option} as it is by default, or give the class _no_split_modules",
        )
    return list(find_blocks(model))
